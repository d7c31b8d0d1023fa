"""How many trials fit on the cluster at once: worked out before anything starts.

A trial itself takes no CPU or GPU, only its training workers do; so trials cannot hold what each
other's workers wait for, and no more are started than have room.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tune.config import SearchConfig


@dataclass(frozen=True)
class Room:
    """What a worker gets, and how many trials run at once."""

    parallel: int
    workers: int
    cpus: int
    gpu: bool

    def describe(self) -> str:
        """In words."""
        each = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}" + (" and 1 GPU" if self.gpu else "")
        return f"{self.parallel} at a time, each of {self.workers} workers of {each}"


def fit(config: SearchConfig, nodes: Sequence[Mapping[str, float]]) -> Room:
    """Share the nodes' resources out among trials.

    Args:
        config: of the search.
        nodes: node -> resource -> amount, as Ray tells it.

    Raises:
        ValueError: not even one trial fits, or not as many as asked for.
    """
    scaling = config.train.scaling
    workers = scaling.bounds[1]
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpu = scaling.device == "gpu" or (scaling.device == "auto" and total["GPU"] > 0)
    cpus = scaling.cpus_per_worker
    if not cpus:
        cpus = _share(nodes, total["CPU"] / ((config.parallel or 2) * workers), gpu)
    slots = sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpu else float("inf")))
        for node in nodes
    )
    parallel = slots // workers
    has = f"the cluster has {total['GPU']:g} GPUs and {total['CPU']:g} CPUs on {len(nodes)} nodes"
    need = f"{workers} GPUs and {workers * cpus} CPUs" if gpu else f"{workers * cpus} CPUs"
    if parallel == 0:
        raise ValueError(
            f"a trial needs {need}, but {has}; lower scaling.workers or scaling.cpus_per_worker"
        )
    if config.parallel > parallel:
        raise ValueError(
            f"--parallel is {config.parallel}, but there is room for {parallel}: "
            f"a trial needs {need}, and {has}"
        )
    most = config.parallel or (parallel if gpu else min(parallel, 2 if len(nodes) == 1 else 64))
    return Room(most, workers, cpus, gpu)


def _share(nodes: Sequence[Mapping[str, float]], alone: float, gpu: bool) -> int:
    """CPUs of a worker: those that come with its GPU on the node that has least, else `alone`."""
    if gpu:
        alone = min((n.get("CPU", 0) / n["GPU"] for n in nodes if n.get("GPU")), default=1)
    return max(1, int(alone))
