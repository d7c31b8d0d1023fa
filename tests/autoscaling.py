"""A Ray cluster that starts and ends its own nodes on this machine: a head without CPUs, Ray's
autoscaler, and Ray's fake cloud.

`ray.cluster_utils.AutoscalingCluster` does the same, but it reads a file that Ray's wheel lacks,
and it ends all other Rays of the machine.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.node_launch_exception import NodeLaunchException

from distributed.internals.spot import SpotFirst
from tests.chaos import NODE_HEALTH

ROOT = Path(__file__).resolve().parent.parent
EMPTY = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
    *("rsync_exclude", "rsync_filter"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Recorded(FakeMultiNodeProvider):
    """Ray's fake cloud; writes a line for each machine that it starts or refuses."""

    has_spot = True

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> Any:
        spot = "InstanceMarketOptions" in node_config
        refused = spot and not self.has_spot
        with open(self.provider_config["log"], "a") as log:
            log.write(("refused" if refused else "spot" if spot else "on demand") + "\n")
        if refused:
            raise NodeLaunchException("InsufficientInstanceCapacity", "no spot machines", None)
        return super().create_node_with_resources_and_labels(
            node_config, tags, count, resources, labels
        )


class WithoutSpot(Recorded):
    """A cloud that has no spot machines."""

    has_spot = False


class SpotFirstRecorded(SpotFirst, Recorded):
    """The cloud through the provider of the cluster files."""


class SpotFirstWithoutSpot(SpotFirst, WithoutSpot):
    """The cloud without spot machines through the provider of the cluster files."""


class AutoscalingCluster:
    """The head; nodes come when something asks for them."""

    def __init__(
        self,
        folder: Path,
        node_types: Mapping[str, Mapping[str, Any]],
        *,
        provider: type[FakeMultiNodeProvider] = Recorded,
        idle_s: float = 15.0,
    ) -> None:
        """Start it.

        Args:
            folder: for its files.
            node_types: as `available_node_types` of a cluster file, without the head.
            provider: the cloud.
            idle_s: seconds after which an idle node ends.
        """
        port = free_port()
        self._temporary = Path(f"/tmp/ray-fake-{port}")  # short: sockets lie in it
        self._machines = folder / "machines.txt"
        self.address = f"127.0.0.1:{port}"
        head = {"resources": {}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "fake",
            "max_workers": 8,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                "type": "external",
                "module": f"{provider.__module__}.{provider.__qualname__}",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": self.address,
                "log": str(folder / "machines.txt"),
            },
            "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **node_types},
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            **{name: [] for name in EMPTY},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            "file_mounts_sync_continuously": False,
        }
        path = folder / "cluster.json"
        path.write_text(json.dumps(config))
        python = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        own |= {"PYTHONPATH": python, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = own | {"RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"}
        log = folder / "head.txt"
        self._log = log.open("ab")
        self._head = psutil.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "0"),
                *("--include-dashboard", "false", "--object-store-memory", str(80 * 2**20)),
                *("--temp-dir", str(self._temporary)),
                f"--autoscaling-config={path}",
            ],
            env={
                **own,
                **NODE_HEALTH,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        try:
            self.wait_for(lambda: "Ray runtime started" in log.read_text(), 300)
        except BaseException:
            self.close()
            raise

    def machines(self) -> list[str]:
        """What the cloud was asked for so far: `spot`, `on demand` or `refused`."""
        return self._machines.read_text().splitlines() if self._machines.exists() else []

    def nodes(self) -> int:
        """Nodes beside the head that run now."""
        running = [p for p in self._head.children(recursive=True) if _name(p) == "raylet"]
        return max(0, len(running) - 1)

    def wait_for(self, ready: Callable[[], bool], limit_s: float) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: it did not come within the limit, or the head has ended.
        """
        deadline = time.monotonic() + limit_s
        while not ready():
            if time.monotonic() > deadline or self._head.poll() is not None:
                raise TimeoutError(f"waited {limit_s:.0f} s, see {self._log.name}")
            time.sleep(0.2)

    def close(self) -> None:
        """End all of its processes."""
        processes = [self._head]
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += self._head.children(recursive=True)
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)
        self._log.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.name()
    return ""
