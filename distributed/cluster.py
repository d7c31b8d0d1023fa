"""The Ray that a run uses: a cluster that RAY_ADDRESS names, or one of this machine alone."""

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from distributed.config import TrainConfig
from shards.storage import open_folder

if TYPE_CHECKING:
    import torch

PLACEMENT_S = 2.0
"""Seconds to wait for the workers of a range. Their resources are reserved, so they start at once;
if not, a node was lost, and Ray has to ask for as many workers as are left."""

LEAVE_S = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
"""Environment variable: seconds in which the workers' process group must shut down. A hung worker
never does, and Ray would wait 30 s before it replaces it."""

LOCAL_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""What a Ray of this machine alone runs with, unless the caller's environment says otherwise.

GOMP_SPINCOUNT: threads that wait for work stay awake for a fraction of a millisecond. That bridges
two operations, and leaves the core to the loader after it. MALLOC_*: the memory of a step is kept
for the next one; otherwise its pages would be zeroed again in each step. All three are set, because
one alone switches off the automatic adjustment of the others. The pre-emption watcher is a process
of its own, and nobody pre-empts one's own machine."""

GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""What workers on GPUs run with. Segments that grow waste less memory when sizes change, as between
training and the whole pictures of a validation."""

_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
"""What people need to see comes through the monitor; Ray keeps the workers' own logs."""


def starts_its_own_ray() -> bool:
    """Whether a run uses this machine alone: no cluster is named, and none is connected to."""
    ray = sys.modules.get("ray")
    return not os.environ.get("RAY_ADDRESS") and not (ray and ray.is_initialized())


@contextmanager
def ray_cluster(config: TrainConfig, console: Console) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one of this machine alone for the time
    inside.

    The local one listens on 127.0.0.1 only and answers nobody without its token, which lives in
    this process's environment.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints each line twice
    # How often Ray Train looks at its workers: the lower, the sooner a lost one is replaced.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault(LEAVE_S, "5")
    patience = config.scaling.start_timeout_s
    if config.scaling.elastic:
        patience = min(patience, PLACEMENT_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    elsewhere = os.environ.get("RAY_ADDRESS")
    if not elsewhere and "ray" not in sys.modules:
        _require_token()
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scaling.health_timeout_s)
    import ray

    if ray.is_initialized():
        yield
        return
    if elsewhere:
        console.print(f"connecting to the Ray cluster at {elsewhere}")
        ray.init(runtime_env={"env_vars": {LEAVE_S: os.environ[LEAVE_S]}}, **_QUIET)
    else:
        # More workers than cores is slow, not wrong: how else to try a cluster's run at home?
        wanted = config.scaling.bounds[1] * cpus_per_worker(config, local=True, use_gpu=False)
        start_local_ray(num_cpus=max(os.cpu_count() or 1, wanted))
    try:
        yield
    finally:
        ray.shutdown()


def is_local() -> bool:
    """Whether the run stays on this machine: no cluster is named by RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")


def cpus_per_worker(config: TrainConfig, *, local: bool, use_gpu: bool) -> int:
    """As configured; else this machine's cores in equal parts, or what a cluster's node spares."""
    if config.scaling.cpus_per_worker:
        return config.scaling.cpus_per_worker
    if local:
        return max(1, (os.cpu_count() or 1) // config.scaling.bounds[1])
    return 4 if use_gpu else 1


def _require_token() -> None:
    """Have the local Ray answer this process's children only; Ray reads this once, at its
    import."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_local_ray(**options: Any) -> None:
    """Start Ray on this machine alone, bound to 127.0.0.1, its cores for the training steps."""
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    from distributed.internals.ray import bound_to_loopback

    # Ray Train's helper processes ask the cluster that RAY_ADDRESS names, else any that they find
    # on this machine. Another cluster does not know this run, and they would end its workers.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pinned = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    os.environ.update(pinned)
    try:
        with bound_to_loopback():
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                **_QUIET,
                **options,
            )
    finally:
        for name in pinned:  # for Ray's own processes only
            del os.environ[name]


def ray_storage(storage: str) -> dict[str, Any]:
    """Where Ray keeps its own files of a run, as arguments of its RunConfig."""
    if "://" not in storage:
        return {"storage_path": storage}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = open_folder(storage)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def own_device(kind: str) -> "torch.device":
    """In a worker, the device that the run decided on: this worker's GPU, or the CPU.

    Ray does not hide a GPU from a worker that asked for none, so torch is never asked here.
    """
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device
