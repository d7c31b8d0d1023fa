"""The one exchange among the ranks after each step, read at once or one step later.

On a GPU the host is ahead of the device by a step or more. It would have to wait for the device to
read the sums of the step that it has just started, so it reads those of the step before.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.speed import Mark


class StepSums(NamedTuple):
    """Sums over all ranks."""

    losses: list[float]
    """Total, l1 and balance loss and micro-batches since the last point of the curves."""
    wait_s: float
    """Seconds that the ranks waited for data since then."""
    stops: bool
    """Whether a rank was asked to stop."""
    noticed: bool
    """Whether a rank got notice that its node is taken away."""
    damaged: int
    """Corrupt samples of the step that were replaced."""
    updated: bool
    """Whether the step updated the weights."""
    digests: list[int]
    """crc32 of all micro-batches of the step, in order."""


@dataclass(frozen=True)
class Step:
    """What this rank knows of a step at its end."""

    samples: int
    """That the run has trained on, with this step."""
    lr: float
    keys: list[str]
    """Names of this rank's samples."""
    ends_point: bool
    """Whether a point of the curves ends with it."""
    seen: int
    """Samples of all ranks since the last point."""
    seconds: float
    """Since then."""
    marks: Sequence[Mark] = ()
    """When its parts began."""


class Exchange:
    """Adds up over the ranks; every rank makes the same calls."""

    LOSSES = 4

    def __init__(self, device: torch.device, *, late: bool) -> None:
        """`late`: the sums of a step are read when the next one has been started."""
        self._device, self._late = device, late
        self._pending: deque[tuple[Step, Tensor, torch.cuda.Event | None]] = deque()

    def start(
        self,
        step: Step,
        losses: Tensor,
        updated: Tensor,
        *,
        wait_s: float,
        stops: bool,
        noticed: bool,
        damaged: int,
        digests: Sequence[int],
    ) -> None:
        """Start to add up; see `StepSums`. `losses` (4,) and `updated` () are on the device."""
        own = [wait_s, stops, noticed, damaged, *digests]
        # float64 holds the 32 bits of a digest exactly.
        on_host = torch.tensor(own, dtype=torch.float64)
        sums = torch.cat([losses, updated.double().view(1), to_device(on_host, self._device)])
        dist.all_reduce(sums)
        event = None
        if self._device.type == "cuda":
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            sums = host.copy_(sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, sums, event))

    def finished(self, *, everything: bool) -> Iterator[tuple[Step, StepSums]]:
        """The steps whose sums may be read now, in order; `everything` waits for the last too."""
        kept = 1 if self._late and not everything else 0
        while len(self._pending) > kept:
            step, sums, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            values = sums.tolist()
            losses, rest = values[: self.LOSSES], values[self.LOSSES :]
            updated, wait_s, stops, noticed, damaged, *digests = rest
            yield (
                step,
                StepSums(
                    *(losses, wait_s, bool(stops), bool(noticed), int(damaged), updated > 0),
                    digests=[int(crc) for crc in digests],
                ),
            )


def curve_point(step: Step, sums: StepSums, *, world: int, skipped: int) -> dict[str, float]:
    """The metrics of a point of the curves, by their names; means since the last point."""
    total, l1, balance, counted = sums.losses
    counted = counted or math.nan  # all updates were skipped
    return {
        "train/loss": total / counted,
        "train/l1": l1 / counted,
        "train/balance": balance / counted,
        "train/learning_rate": step.lr,
        "train/skipped_updates": skipped,
        "speed/samples_per_s": step.seen / step.seconds,
        "speed/data_wait": min(1.0, sums.wait_s / world / step.seconds),
    }


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for; a CPU's tensor is given back as it is."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Upload:
    """Copies micro-batches to the device, beside the work that still runs there.

    The host is ahead of a GPU, so the copy of the next micro-batch ends before its pass begins. A
    GPU gets bytes and makes floats of them itself.
    """

    SLOTS = 4
    """Pinned buffers: two tensors of a micro-batch are filled while two others are copied."""

    def __init__(self, device: torch.device) -> None:
        """On a GPU copies get a stream of their own."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        # A tensor on the device: torch would multiply by the reciprocal of a number, which
        # rounds differently from the division on a CPU.
        self._white = torch.full((1,), 255.0, device=device)

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy on the device; what is started after this sees it whole.

        Bytes become float32 in [0, 1], the same as on a CPU. A CPU's floats are given back.
        """
        copied = tensor if self._stream is None else self._copy(tensor, self._stream)
        return copied.float() / self._white if copied.dtype == torch.uint8 else copied

    def _copy(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        full = len(self._pinned) == self.SLOTS
        pinned, free = self._pinned.popleft() if full else (None, torch.cuda.Event())
        if full:
            free.synchronize()  # its last copy has ended
        if pinned is None or pinned.shape != tensor.shape or pinned.dtype != tensor.dtype:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor)
        with torch.cuda.stream(stream):
            copied = pinned.to(self._device, non_blocking=True)
            free.record(stream)
        self._pinned.append((pinned, free))
        user = torch.cuda.current_stream(self._device)
        user.wait_stream(stream)
        copied.record_stream(user)  # else its memory could be taken while `user` still reads it
        return copied
