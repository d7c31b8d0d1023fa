"""How many trials run at once on the cluster: a pure function, used before anything starts.

A trial itself takes no CPU or GPU; only its training workers do. So a trial never holds resources
that its own workers wait for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distributed.cluster import cpus_per_worker
from shards.wording import counted
from tune.config import SearchConfig


@dataclass(frozen=True)
class Capacity:
    """How many trials run at once, and what each of their workers gets."""

    parallel: int
    workers: int
    """Workers of a trial."""
    cpus: int
    """CPUs of a worker."""
    gpu: bool
    """Whether a worker gets a GPU."""

    def describe(self) -> str:
        """One line for the user."""
        each = counted(self.cpus, "CPU") + (" and 1 GPU" if self.gpu else "")
        trials, workers = counted(self.parallel, "trial"), counted(self.workers, "worker")
        return f"{trials} at a time, each of {workers} with {each}"


def needed(config: SearchConfig) -> tuple[list[dict[str, float]], str]:
    """What must be free before a search can start on a cluster, per worker and in words.

    The workers of `--parallel` trials; of one trial where that is left open. Nodes that an
    autoscaler has yet to start are not known, so they cannot be counted.
    """
    scaling, trials = config.train.scaling, config.parallel or 1
    gpu = scaling.device == "gpu"
    cpus = cpus_per_worker(config.train, local=False, use_gpu=gpu)
    worker: dict[str, float] = {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}
    count = trials * scaling.bounds[1]
    each = counted(cpus, "CPU") + (" and 1 GPU" if gpu else "")
    words = f"{count} worker{'s' * (count > 1)} of {each} ({trials} trial{'s' * (trials > 1)})"
    return [worker] * count, words


def plan_capacity(config: SearchConfig, nodes: Sequence[Mapping[str, float]]) -> Capacity:
    """Divide the nodes' resources among trials.

    Args:
        config: of the search.
        nodes: resource -> amount of each node, as Ray gives it.

    Raises:
        ValueError: there is no room for one trial, or for as many as asked for.
    """
    scaling = config.train.scaling
    workers = scaling.bounds[1]
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpu = scaling.device == "gpu" or (scaling.device == "auto" and total["GPU"] > 0)
    cpus = scaling.cpus_per_worker
    if not cpus and gpu:  # the CPUs per GPU of the node with the fewest
        cpus = int(min((n.get("CPU", 0) / n["GPU"] for n in nodes if n.get("GPU")), default=1))
    elif not cpus:
        cpus = int(total["CPU"] / ((config.parallel or 2) * workers))
    cpus = max(1, cpus)
    slots = sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpu else float("inf")))
        for node in nodes
    )
    room = slots // workers
    has = f"the cluster has {total['GPU']:g} GPUs and {total['CPU']:g} CPUs on {len(nodes)} nodes"
    need = f"{workers} GPUs and {workers * cpus} CPUs" if gpu else f"{workers * cpus} CPUs"
    if room == 0:
        raise ValueError(
            f"a trial needs {need}, but {has}; lower scaling.workers or scaling.cpus_per_worker"
        )
    if config.parallel > room:
        raise ValueError(
            f"--parallel is {config.parallel}, but there is room for {room}: "
            f"a trial needs {need}, and {has}"
        )
    default = room if gpu else min(room, 2 if len(nodes) == 1 else 64)
    return Capacity(config.parallel or default, workers, cpus, gpu)
