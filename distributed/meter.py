"""What a rank counts while it trains: losses, samples, the use of experts, the wait for data."""

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.speed import StepClock
from measnet.losses import Losses
from measnet.network import Restoration
from shards.stream import Batch


class Meter:
    """Sums over the micro-batches of one rank since they were last taken."""

    def __init__(self, device: torch.device, *, counts: bool) -> None:
        """Start at zero. `counts` is False for an idle rank: its work has no weight."""
        self._device, self._counts = device, counts
        self._usage: dict[str, Tensor] = {}
        self.clock = StepClock(device)
        self.step_keys: list[str] = []
        self.step_digests: list[int] = []
        self.damage: list[str] = []
        """Corrupt samples of this step that were replaced, and what is wrong with them."""
        self.reset()

    def reset(self) -> None:
        """Begin the next point of the curves."""
        self._losses = torch.zeros(4, dtype=torch.float64, device=self._device)
        self.micro_batches = 0
        self.wait_s = 0.0
        self.started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it the rank waits for a batch; then it computes with it."""
        self.clock.begin("data")
        since = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - since
        self.clock.begin("forward")

    def add(self, losses: Losses, restoration: Restoration, batch: Batch) -> None:
        """Count one micro-batch on the device, without waiting for it."""
        if not self._counts:
            return
        of_one = torch.stack([*(loss.detach() for loss in losses), losses.total.new_ones(())])
        of_one = torch.where(of_one.isfinite().all(), of_one, 0)  # skipped steps have no loss
        self._losses += of_one.double()
        self.micro_batches += 1
        self.step_keys += batch.keys
        self.damage += batch.damage
        self.step_digests.append(zlib.crc32(batch.degraded.numpy().tobytes()))
        for library, share_bn in restoration.routing.items():
            chosen = share_bn.detach().double().sum(0)
            self._usage[library] = (
                self._usage[library] + chosen if library in self._usage else chosen
            )

    def sums(self) -> Tensor:
        """Total, l1 and balance loss, and micro-batches: (4,) float64 on the device."""
        return self._losses.clone()

    def end_step(self) -> tuple[list[str], list[int]]:
        """Names and crc32 of the micro-batches of the step that ends."""
        ended = self.step_keys, self.step_digests
        self.step_keys, self.step_digests, self.damage = [], [], []
        return ended

    def take_usage(self) -> dict[str, list[float]]:
        """How much each expert of each library was chosen since the last call; a collective
        call."""
        own = {library: chosen.tolist() for library, chosen in self._usage.items()}
        gathered: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        counted = [part for part in gathered if part]
        usage = {
            library: [sum(experts) for experts in zip(*(p[library] for p in counted), strict=True)]
            for library in (counted[0] if counted else {})
        }
        self._usage = {}
        return usage
