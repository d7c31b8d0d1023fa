"""Notice of pre-emption, from servers that answer as those of the clouds do."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributed import checkpoint as checkpoints
from distributed.preemption import AWS, GCP, NoticeWatcher, notice_of, which_cloud

ACTION = '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'


class Metadata:
    """The metadata server of EC2 (version 2 only) and of Compute Engine."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.action: str | None = None
        self.preempted = "FALSE"
        self.environment = {AWS: url + "/", GCP: url.removeprefix("http://")}


@contextmanager
def metadata() -> Iterator[Metadata]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
            right = self.path == "/latest/api/token" and lifetime
            self._answer(200 if right else 400, "a token")

        def do_GET(self) -> None:
            if self.path == "/latest/meta-data/spot/instance-action":
                if self.headers.get("X-aws-ec2-metadata-token") != "a token":
                    self._answer(401, "")
                else:
                    self._answer(404 if known.action is None else 200, known.action or "")
            elif self.path == "/computeMetadata/v1/instance/preempted":
                google = self.headers.get("Metadata-Flavor") == "Google"
                self._answer(200 if google else 403, known.preempted)
            else:
                self._answer(404, "")

        def _answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known = Metadata(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield known
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_both_clouds_are_understood(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with metadata() as server:
        assert notice_of("aws", server.environment) == ""
        assert notice_of("gcp", server.environment) == ""
        server.action, server.preempted = ACTION, "TRUE"
        wanted = "EC2 will terminate this node at 2026-09-18T08:22:00Z"
        assert notice_of("aws", server.environment) == wanted
        assert "takes this node away" in notice_of("gcp", server.environment)
        server.action = "in a form of the future"
        assert server.action in notice_of("aws", server.environment)


def test_the_cloud_is_read_from_the_machine(tmp_path: Path) -> None:
    vendor = tmp_path / "sys_vendor"
    assert which_cloud("auto", vendor) == "off"
    for name, cloud in (("Amazon EC2\n", "aws"), ("Google\n", "gcp"), ("LENOVO\n", "off")):
        vendor.write_text(name)
        assert which_cloud("auto", vendor) == cloud
    assert which_cloud("gcp", vendor) == "gcp"


def test_a_notice_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.preemption.ASK_EVERY_S", 0.01)
    said: list[str] = []
    with metadata() as server:
        monkeypatch.setenv(AWS, server.environment[AWS])
        watcher = NoticeWatcher("aws", said.append)
        assert watcher.take() == ""
        server.action = ACTION
        assert "terminate" in _taken(watcher)
        assert watcher.take() == "" and not said


def test_a_server_that_does_not_answer_is_said_once_and_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distributed.preemption.ASK_EVERY_S", 0.01)
    monkeypatch.setenv(AWS, "http://127.0.0.1:9")
    said: list[str] = []
    watcher = NoticeWatcher("aws", said.append)
    with metadata() as server:
        server.action = ACTION
        time.sleep(0.2)
        assert len(said) == 1 and "--scaling.preemption-notice off" in said[0]
        monkeypatch.setenv(AWS, server.environment[AWS])
        assert "terminate" in _taken(watcher)
    assert len(said) == 1


def _taken(watcher: NoticeWatcher) -> str:
    deadline = time.monotonic() + 10
    while not (notice := watcher.take()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return notice


@pytest.mark.slow
def test_all_ranks_save_a_checkpoint_after_a_notice(packed: Path, tmp_path: Path) -> None:
    """One run on two workers that gets a notice: the checkpoint is not at a regular position."""
    with metadata() as server:
        command = [sys.executable, "-m", "distributed.train", "demo", "--name", "noticed"]
        command += ["--storage", str(tmp_path), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
        for name, value in {
            "data.train": packed / "train",
            "data.validation": packed / "test",
            "recipe.samples": 240,
            "recipe.warmup-samples": 0,
            "every.validate": 240,
            "every.checkpoint": 240,
            "every.log": 8,
            "scaling.preemption-notice": "aws",
        }.items():
            command += [f"--{name}", str(value)]
        environment = {**os.environ, AWS: server.environment[AWS]}
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        run, metrics = str(tmp_path / "noticed"), tmp_path / "noticed" / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        server.action = ACTION
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "rank 0: EC2 will terminate this node" in output
    positions = [c.samples for c in checkpoints.listed(run) if c.problem() is None]
    assert positions[-1] == 240 and len(positions) == 2 and 0 < positions[0] < 240
