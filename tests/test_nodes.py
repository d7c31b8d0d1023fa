"""Training on two nodes with different addresses; one loses its network, and the run continues.

The nodes are network namespaces joined by a virtual cable, which takes root; where they cannot be
made the test says so and skips.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distributed import checkpoint as checkpoints
from tests.chaos import NODE_HEALTH
from tests.test_train import command, losses

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NODES = {"measnet1": "10.77.0.1", "measnet2": "10.77.0.2"}
HEAD = "measnet1"
PORT = 26379


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_nodes() -> Iterator[None]:
    """Two namespaces joined by a cable whose ends are called ray0."""
    try:
        for name in NODES:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make network namespaces here: {error}")
    first, second = NODES
    try:
        ip("-n", first, "link", "add", "ray0", "type", "veth", "peer", "ray0", "netns", second)
        for name, address in NODES.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "ray0")
            ip("-n", name, "link", "set", "ray0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            pids = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split()
            for pid in pids:
                if psutil.pid_exists(int(pid)):
                    psutil.Process(int(pid)).kill()
            ip("netns", "del", name)


def on_node(name: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Run a command as if on that machine."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",  # nobody else is on this network
        "RAY_USAGE_STATS_ENABLED": "0",
        "GLOO_SOCKET_IFNAME": "ray0",
        **NODE_HEALTH,
    }
    if arguments[0] == "python":
        environment["RAY_ADDRESS"] = f"{NODES[HEAD]}:{PORT}"
    out = log.open("ab")
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *arguments],
        env=environment,
        cwd=log.parent,
        stdout=out,
        stderr=out,
    )


def ray_start(name: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a node of the cluster."""
    return on_node(
        name,
        *("ray", "start", "--block", "--node-ip-address", NODES[name], "--num-cpus", "1"),
        *("--object-store-memory", str(80 * 2**20), *more),
        log=folder / f"{name}.txt",
    )


def test_the_run_continues_without_a_node_that_is_cut_off(
    two_nodes: None, packed: Path, tmp_path: Path
) -> None:
    temporary = Path(f"/tmp/ray-nodes-{os.getpid()}")
    ray_start(
        HEAD,
        tmp_path,
        *("--head", "--port", str(PORT), "--include-dashboard", "false"),
        *("--temp-dir", str(temporary)),
    )
    time.sleep(8)
    ray_start("measnet2", tmp_path, "--address", f"{NODES[HEAD]}:{PORT}")
    time.sleep(8)
    log = tmp_path / "log.txt"
    arguments = command(
        packed,
        *("--recipe.samples", "1200", "--scaling.workers", "1..2"),
        *("--scaling.cpus-per-worker", "1", "--scaling.health-timeout-s", "15"),
        *("--scaling.resize-interval-s", "600"),
    )
    run = on_node(HEAD, "python", "-m", "distributed.train", *arguments, log=log)
    folder = tmp_path / "runs" / "demo"

    def wait_for(samples: int, limit_s: float) -> float:
        started = time.monotonic()
        while True:
            found = checkpoints.newest_complete(str(folder))
            if found is not None and found.samples >= samples:
                return time.monotonic() - started
            assert run.poll() is None, log.read_text()
            assert time.monotonic() - started < limit_s, log.read_text()
            time.sleep(0.5)

    wait_for(64, 200)
    assert "/ 2 workers" in log.read_text()  # both nodes train
    reached = checkpoints.newest_complete(str(folder))
    assert reached is not None
    ip("-n", "measnet2", "link", "set", "ray0", "down")
    took = wait_for(reached.samples + 64, 200)
    print(f"cut off at {reached.samples} samples; 64 samples further after {took:.0f} s")
    assert run.wait(600) == 0, log.read_text()
    output = log.read_text()
    assert re.findall(r"/ (\d) workers", output)[-1] == "1"
    assert "finished 1,200 samples" in output
    assert len(losses(folder)) == 300
    shutil.rmtree(temporary, ignore_errors=True)
