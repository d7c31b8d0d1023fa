"""The Ray cluster of a run: the one that RAY_ADDRESS names, or a local one on this machine."""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from distributed.config import ScalingConfig, TrainConfig
from distributed.internals.ray_train import LEAVE_S, PREEMPTION_WATCHER, configure
from shards.storage import open_folder

if TYPE_CHECKING:
    import torch

PLACEMENT_S = 2.0
"""Seconds to wait for workers if their number is a range. Their resources are reserved, so they
start at once. If they do not, a node was lost, and Ray must count the resources again."""

LOCAL_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    PREEMPTION_WATCHER: "0",
}
"""Environment of a local Ray; variables that the caller has set are kept.

GOMP_SPINCOUNT: threads that wait for work stay awake for a fraction of a millisecond. That is
longer than the time between two operations, and short enough to leave the core to the loader.
MALLOC_*: memory of a step is kept for the next one, so its pages are not zeroed again. All three
are set, because one alone switches off the automatic adjustment of the others."""

GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Environment of workers on GPUs. Expandable segments waste less memory when sizes change, as
between training crops and the whole pictures of a validation."""

_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
"""The monitor shows what users need to see; Ray keeps the workers' own logs."""


def starts_its_own_ray() -> bool:
    """Whether a run starts a local Ray: no cluster is named, and this process has no Ray yet."""
    ray = sys.modules.get("ray")
    return is_local() and not (ray and ray.is_initialized())


@contextmanager
def ray_cluster(config: TrainConfig, console: Console) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start a local one; at exit, disconnect or stop it.

    The local one listens on 127.0.0.1 only and refuses requests without its token, which is in the
    environment of this process.
    """
    start_s = config.scaling.start_timeout_s
    if config.scaling.elastic:
        start_s = min(start_s, PLACEMENT_S)
    configure(start_s, config.scaling.health_timeout_s)
    if is_local() and "ray" not in sys.modules:
        _require_token()
    if not is_local():
        console.print(f"connecting to the Ray cluster at {os.environ['RAY_ADDRESS']}")
    # Allow more workers than cores: slow, but it lets you try a cluster's run on one machine.
    wanted = config.scaling.bounds[1] * cpus_per_worker(config, local=True, use_gpu=False)
    with connected(wanted, {LEAVE_S: os.environ[LEAVE_S]}):
        yield


@contextmanager
def connected(cpus: int, worker_environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Use the Ray that this process has, else the cluster of RAY_ADDRESS, else a local one.

    A connection that is made here ends with the block.

    Args:
        cpus: that a local Ray offers, or as many as this machine has if that is more.
        worker_environment: variables of the processes on a cluster.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if is_local():
        start_local_ray(num_cpus=max(os.cpu_count() or 1, cpus))
    else:
        join_cluster({"env_vars": dict(worker_environment)} if worker_environment else None)
    try:
        yield
    finally:
        ray.shutdown()


def join_cluster(runtime_environment: dict[str, Any] | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS; Ray sends no usage reports.

    Raises:
        OSError: its head does not answer.
        RuntimeError: the cluster has another version of Ray or Python.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(runtime_env=runtime_environment, **_QUIET)


def is_local() -> bool:
    """Whether the run uses this machine only: RAY_ADDRESS names no cluster."""
    return not os.environ.get("RAY_ADDRESS")


def cpus_per_worker(config: TrainConfig, *, local: bool, use_gpu: bool) -> int:
    """As configured; else an equal part of this machine's cores; on a cluster 1, beside a GPU 4."""
    if config.scaling.cpus_per_worker:
        return config.scaling.cpus_per_worker
    if local:
        return max(1, (os.cpu_count() or 1) // config.scaling.bounds[1])
    return 4 if use_gpu else 1


def _require_token() -> None:
    """Make the local Ray refuse requests without a token that only this process and its children
    have. Ray reads this once, when it is imported."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_local_ray(**options: Any) -> None:
    """Start a local Ray that listens on 127.0.0.1 only."""
    for name, value in (LOCAL_ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0"}).items():
        os.environ.setdefault(name, value)
    from distributed.internals.ray import init_on_loopback

    init_on_loopback(**_QUIET, **options)


def wait_for_resources(
    workers: Sequence[dict[str, float]],
    wanted: str,
    limits: ScalingConfig,
    console: Console,
    over: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until all workers fit on the cluster's free resources at once.

    A placement group asks for them, so Ray's autoscaler starts the nodes that are missing. It is
    removed again when they are there, and the nodes stay until they are idle for too long.

    Args:
        workers: resources of each worker.
        wanted: the same in words, for messages.
        limits: how long to wait (`give_up_s`), and how often to say so (`start_timeout_s`).
        console: for messages.
        over: whether the user no longer wants it; asked twice a second.

    Raises:
        TimeoutError: they did not fit within `give_up_s`.
    """
    from ray.util import placement_group, remove_placement_group

    from distributed.progress import waiting_line

    group = placement_group(list(workers))
    started = said = time.monotonic()
    try:
        while not over() and not group.wait(0.5):
            now = time.monotonic()
            if now - started > limits.give_up_s:
                raise TimeoutError(
                    f"no room for {wanted} within {limits.give_up_s:.0f} s (scaling.give_up_s); "
                    "`ray status` shows which nodes are requested; the same command tries again"
                )
            if now - said > limits.start_timeout_s:
                said = now
                line = waiting_line("the search", wanted, now - started, limits)
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    finally:
        remove_placement_group(group)


def ray_storage(storage: str) -> dict[str, Any]:
    """Where Ray keeps its own files of a run, as arguments of its RunConfig."""
    if "://" not in storage:
        return {"storage_path": storage}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = open_folder(storage)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def own_device(kind: str) -> "torch.device":
    """In a worker: its GPU if the run uses GPUs, else the CPU.

    torch is not asked: Ray does not hide GPUs from a worker that has requested none.
    """
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device
