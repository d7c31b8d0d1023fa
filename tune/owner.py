"""One process at a time in a folder: of a search, or of a trial.

All of a search's own processes run on one machine (the head node of a cluster), so the id of a
process says whether it still lives.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from shards.storage import open_folder

OWNER = "owner.pid"
"""File of the folder: the process that works in it."""


@contextlib.contextmanager
def ownership(folder: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Work in `folder` alone.

    Raises:
        ValueError: another living process of this machine works there, also after `wait_s` seconds.
    """
    fs, root = open_folder(folder)
    path = f"{root}/{OWNER}"
    fs.makedirs(root, exist_ok=True)
    deadline = time.monotonic() + wait_s
    while (owner := _owner(fs, path)) is not None:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"process {owner['pid']} is at work in {folder}; wait for it or end it"
            )
        time.sleep(0.5)
    me = psutil.Process()
    with fs.open(path, "w") as file:
        file.write(
            json.dumps(
                {"pid": me.pid, "started": me.create_time(), "machine": socket.gethostname()}
            )
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fs.rm(path)


def _owner(fs: Any, path: str) -> Mapping[str, Any] | None:
    """The process that the file names, where it lives and is another one."""
    try:
        with fs.open(path, "r") as file:
            owner = json.loads(file.read())
        if owner["pid"] == os.getpid() or owner["machine"] != socket.gethostname():
            return None
        lives = abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return dict(owner) if lives else None
