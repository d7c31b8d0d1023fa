"""Restore the pictures of an evaluation on all workers of a Ray cluster.

This process reads and degrades the pictures, so the data need not be where the workers are. The
chunks, the tiling and the number of CPU threads are the same for all workers, and the same as in
one process: so are the scores, on machines of one kind. A worker that dies is started again, and
its chunks are computed again.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distributed import iqa
from distributed.cluster import connected
from distributed.iqa import Name
from distributed.scores import Score
from distributed.scoring import Seen, ahead, network_scorer
from measnet.config import ModelConfig
from measnet.hardware import DeviceChoice, choose_device, this_machine
from measnet.metrics import Protocol
from measnet.network import MEASNet
from measnet.tiling import Tiling, choose_tiling
from shards.stream import Picture

Count = int | Literal["all"]
"""Number of workers; `all`: one for each GPU of the cluster, or for the CPUs that it has."""
DEPTH = 2
"""Chunks that a worker has at a time: the next one is there when it has restored one."""
START_S = 300.0
"""Seconds to wait for the workers."""
RESTARTS = 3
"""Times that a worker that died is started again."""


class Job(NamedTuple):
    """How pictures are restored and compared."""

    protocol: Protocol
    tiling: Tiling
    ensemble: bool = False
    iqa: tuple[Name, ...] = ()


class _Network(NamedTuple):
    config: ModelConfig
    state: dict[str, Tensor]

    def on(self, device: str) -> MEASNet:
        model = MEASNet(self.config)
        model.load_state_dict(self.state)
        return model.to(device).eval()


class _Worker:
    """Runs in an actor."""

    def __init__(self, device: DeviceChoice, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = choose_device(device, this_machine()).choice
        self._key: tuple[str, Job] | None = None

    def why_not(self, names: Sequence[Name]) -> str:
        try:
            iqa.check(names)
        except ValueError as error:
            return str(error)
        return ""

    def machine(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def tiling(self, network: _Network, overlap: int, processes: int) -> Tiling:
        return choose_tiling(network.on(self._device), overlap=overlap, processes=processes)

    def score(
        self, network: list[Any], job: Job, chunk: Sequence[Picture], wanted: Sequence[bool]
    ) -> list[tuple[Score, Tensor | None]]:
        """The scores of a chunk, with the restored picture on the CPU where it is wanted."""
        (reference,) = network
        key = (reference.hex(), job)
        if key != self._key:
            import ray

            model = ray.get(reference).on(self._device)
            self._scorer = network_scorer(
                model, job.tiling, protocol=job.protocol, ensemble=job.ensemble, iqa=job.iqa
            )
            self._key = key
        return [
            # A copy, else it would carry the memory of the whole batch.
            (one.score, one.image.cpu().clone() if keep else None)
            for one, keep in zip(self._scorer(chunk), wanted, strict=True)
        ]


class Workers:
    """Actors on their devices."""

    def __init__(self, actors: Sequence[Any], device: str) -> None:
        """Takes the actors' handles, and `cpu` or `cuda`."""
        self.device = device
        self._actors = list(actors)
        self._sent: tuple[MEASNet, Any] | None = None

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._actors)

    def check(self, names: Sequence[Name]) -> None:
        """Refuse metrics that a worker cannot compute.

        Raises:
            ValueError: as `iqa.check`, for the first such worker.
        """
        import ray

        for text in ray.get([actor.why_not.remote(names) for actor in self._actors]):
            if text:
                raise ValueError(f"on a worker: {text}")

    def tiling(self, model: MEASNet, overlap: int) -> Tiling:
        """By the worker with the least free memory, for all."""
        import ray

        machines = ray.get([actor.machine.remote() for actor in self._actors])
        shared = Counter(machines)
        network = self._network(model)
        found: list[Tiling] = ray.get(
            [
                actor.tiling.remote(network, overlap, shared[machine])
                for actor, machine in zip(self._actors, machines, strict=True)
            ]
        )
        return min(found, key=lambda one: one.at_once)

    def score(
        self, model: MEASNet, job: Job, source: Iterable[list[Picture]], *, rows: int, seen: Seen
    ) -> list[Score]:
        """Restore chunks and compare them.

        Args:
            model: the network; the workers get its weights.
            job: how.
            source: chunks.
            rows: pictures per degradation that `seen` gets.
            seen: is called at the end, in the order of the pictures.

        Returns:
            The scores, in the order of the pictures.

        Raises:
            OSError: a worker died too often.
        """
        import ray
        from ray.exceptions import RayActorError

        network = self._network(model)
        free = deque(self._actors * DEPTH)
        running: dict[Any, Any] = {}
        count: Counter[str] = Counter()
        pictures: dict[int, Picture] = {}
        found: list[tuple[Score, Tensor | None]] = []

        def collect() -> None:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            free.append(running.pop(done))
            try:
                found.extend(ray.get(done))
            except RayActorError as error:
                raise OSError(
                    f"a worker of the evaluation died more than {RESTARTS} times; "
                    f"`ray logs` on its machine says why: {error}"
                ) from error

        for chunk in ahead(source):
            if not free:
                collect()
            wanted = []
            for picture in chunk:
                count[picture.degradation] += 1
                wanted.append(count[picture.degradation] <= rows)
                if wanted[-1]:
                    pictures[picture.position] = picture
            actor = free.popleft()
            running[actor.score.remote([network], job, chunk, wanted)] = actor
        while running:
            collect()
        found.sort(key=lambda one: one[0].position)
        for score, image in found:
            if image is not None:
                seen(score, pictures[score.position], image)
        return [score for score, _ in found]

    def _network(self, model: MEASNet) -> Any:
        """The weights in Ray's object store, put there once."""
        import ray

        if self._sent is None or self._sent[0] is not model:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            self._sent = model, ray.put(_Network(model.config, state))
        return self._sent[1]


@contextmanager
def ray_workers(count: Count, device: DeviceChoice) -> Iterator[Workers]:
    """Start workers on the cluster of RAY_ADDRESS, or on a local Ray; they end with the block.

    Args:
        count: number of workers.
        device: of each worker; `auto`: GPUs if the cluster has them. A worker on a CPU takes as
            many threads as this process, because the last digits depend on their number.

    Raises:
        ValueError: the cluster has no room for them.
    """
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    threads = torch.get_num_threads()
    with connected((1 if count == "all" else count) * threads):
        each, number = room(ray.cluster_resources(), count, device, threads)
        group = placement_group([each] * number)
        try:
            if not group.wait(START_S):
                raise ValueError(
                    f"the cluster has no room for {number} workers with {_words(each)} within "
                    f"{START_S:.0f} s; give a lower number with --workers, or see `ray status`"
                )
            actor = ray.remote(_Worker).options(
                num_cpus=each["CPU"],
                num_gpus=each.get("GPU", 0),
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            kind: DeviceChoice = "cuda" if "GPU" in each else "cpu"
            yield Workers([actor.remote(kind, threads) for _ in range(number)], kind)
        finally:
            remove_placement_group(group)


def room(
    has: dict[str, float], count: Count, device: DeviceChoice, threads: int
) -> tuple[dict[str, float], int]:
    """Resources of each worker, and the number of workers.

    Raises:
        ValueError: GPUs are asked for, and the cluster has none.
    """
    gpus = int(has.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise ValueError("--device is cuda, but the Ray cluster has no GPU; use --device cpu")
    if device != "cpu" and gpus:
        return {"CPU": 1.0, "GPU": 1.0}, gpus if count == "all" else count
    fitting = max(1, int(has.get("CPU", 1)) // threads)
    return {"CPU": float(threads)}, fitting if count == "all" else count


def _words(each: dict[str, float]) -> str:
    return " and ".join(f"{number:g} {name}" for name, number in each.items())
