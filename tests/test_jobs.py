"""`ray job submit` as in the README, on a real head, with and without a token."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributed import checkpoint as checkpoints

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """A port outside of the range that Ray's workers take."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port > 20000:
            return int(port)


@dataclass
class Head:
    """A Ray head with its dashboard."""

    environment: dict[str, str]

    def ray(self, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a `ray` command against it."""
        return subprocess.run(
            [RAY, *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=check,
        )

    def submit(self, *entrypoint: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submit the project and a training command."""
        waiting = [] if wait else ["--no-wait"]
        return self.ray("job", "submit", *waiting, "--working-dir", ".", "--", *entrypoint)


@pytest.fixture(params=["token", "disabled"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Head]:
    """A head that is started and stopped for one test."""
    port, dashboard, temporary = free_port(), free_port(), Path(f"/tmp/ray-{os.getpid()}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs say `python`
        "RAY_AUTH_MODE": request.param,
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    environment.pop("RAY_ADDRESS", None)
    (tmp_path / "token").write_text("ab" * 32)
    started = Head(environment)
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--port", str(port), "--num-cpus", "2"),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--temp-dir", str(temporary), "--object-store-memory", str(100 * 2**20)),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while started.ray("job", "list").returncode != 0:
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(1)
        yield started
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def training(packed: Path, folder: Path, *more: str) -> list[str]:
    """A short training command with absolute paths, as on a cluster."""
    return [
        *("python", "-m", "distributed.train", "demo", "--storage", str(folder / "runs")),
        *("--tracking.uri", f"sqlite:///{folder}/mlflow.db"),
        *("--data.train", str(packed / "train"), "--data.validation", str(packed / "test")),
        *("--data.crop", "32", "--model.dim", "8", "--scaling.cpus-per-worker", "1"),
        *("--recipe.global-batch", "4", "--recipe.micro-batch", "2"),
        *("--recipe.warmup-samples", "8", "--every.validate", "0", *more),
    ]


def test_a_job_runs_fails_stops_and_resumes(head: Head, packed: Path, tmp_path: Path) -> None:
    wrong = head.submit(*training(packed, tmp_path, "--recipe.lr", "-1"))
    assert wrong.returncode != 0
    assert "recipe.lr is -1.0" in wrong.stdout + wrong.stderr

    long = training(packed, tmp_path, "--recipe.samples", "4000", "--every.checkpoint", "40")
    submitted = head.submit(*long, wait=False)
    assert submitted.returncode == 0, submitted.stderr
    job = re.search(r"raysubmit_\w+", submitted.stdout + submitted.stderr)
    assert job is not None
    run = str(tmp_path / "runs" / "demo")
    deadline = time.monotonic() + 200
    while checkpoints.newest_complete(run) is None:
        assert time.monotonic() < deadline, head.ray("job", "logs", job.group()).stdout
        time.sleep(0.5)
    assert head.ray("job", "stop", job.group()).returncode == 0
    newest = checkpoints.newest_complete(run)
    assert newest is not None and newest.samples >= 40

    logs = head.ray("job", "logs", job.group()).stdout
    assert "/4,000 samples" in logs  # progress streams to the log
    short = [*long, "--name", "short"]
    short[short.index("4000")] = "32"
    finished = head.submit(*short)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "finished 32 samples" in finished.stdout + finished.stderr
    again = head.submit(*short)
    assert again.returncode == 0
    assert "is finished" in again.stdout + again.stderr
