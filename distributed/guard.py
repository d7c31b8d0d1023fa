"""Numbers that go wrong: what was trained on, which steps were skipped, and when to go back.

Everything here follows from values that all ranks share, so all ranks come to the same decision.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from shards.reader import DamagedError
from shards.storage import open_folder, read_json, write_json

PASSED_OVER = "passed_over.json"
"""File of a run: spans of samples that are not trained on, because they led to nothing but NaN."""


Cause = Literal[
    "", "diverged", "out of memory", "corrupt data", "worker lost", "no workers", "other"
]
"""Why a run failed, for programs to decide by; empty where it did not fail."""


class GoBackError(RuntimeError):
    """Too many updates in a row were skipped; Ray restarts the workers from the last checkpoint."""


def cause_of(error: BaseException) -> Cause:
    """Sort the failure of a run by the type of the exception, or of those of Ray Train's workers.

    Where several workers failed, the first cause of the list counts: those who wait for a worker
    that diverged or ran out of memory fail too, by a lost connection.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

    types: dict[Cause, tuple[type[BaseException], ...]] = {
        "diverged": (GoBackError, FloatingPointError),
        "out of memory": (torch.OutOfMemoryError, OutOfMemoryError, MemoryError),
        "corrupt data": (DamagedError,),
        "worker lost": (RayActorError, WorkerCrashedError),
        "no workers": (TimeoutError,),
    }
    failures = getattr(error, "worker_failures", None) or {0: error}
    for cause, kinds in types.items():
        if any(isinstance(failure, kinds) for failure in failures.values()):
            return cause
    return "other"


def chain(before: str, micro_batches: Sequence[int]) -> str:
    """The chained digest after one more step, from the crc32 of its micro-batches in their
    order."""
    told = ",".join(f"{crc:08x}" for crc in micro_batches)
    return hashlib.sha256(f"{before}:{told}".encode()).hexdigest()


class SpikeDetector:
    """Running mean and spread of the loss; tells which losses stand out."""

    WARM_UP = 50
    """Steps before anything stands out."""
    DECAY = 0.98

    def __init__(self, deviations: float) -> None:
        """A spike lies this many standard deviations above the mean."""
        self._deviations = deviations
        self._mean = self._square = 0.0
        self._steps = 0

    def is_spike(self, loss: float) -> bool:
        """Whether this loss stands out from those before; then it counts among them."""
        if not math.isfinite(loss):
            return False  # skipped and counted elsewhere
        correction = 1 - self.DECAY**self._steps if self._steps else 1.0
        mean, square = self._mean / correction, self._square / correction
        spread = math.sqrt(max(0.0, square - mean**2))
        stands_out = self._steps >= self.WARM_UP and loss > mean + self._deviations * spread
        self._mean += (1 - self.DECAY) * (loss - self._mean)
        self._square += (1 - self.DECAY) * (loss**2 - self._square)
        self._steps += 1
        return stands_out


class SkipCounter:
    """Counts updates that were skipped, and says when it is time to go back."""

    def __init__(self, folder: str, limit: int) -> None:
        """Read which samples of the run in `folder` are passed over already."""
        self._fs, root = open_folder(folder)
        self._path = f"{root}/{PASSED_OVER}"
        self._limit = limit
        self._since: int | None = None
        self.in_a_row = 0
        """Updates skipped one after the other, up to now."""
        self.spans: list[list[int]] = (
            read_json(self._fs, self._path) if self._fs.exists(self._path) else []
        )
        """[first, behind the last] samples that are not trained on."""

    def behind(self, samples: int) -> int:
        """Where training goes on after `samples` samples: there, or behind what is left out."""
        for first, last in self.spans:
            if first <= samples < last:
                samples = last
        return samples

    def after_step(self, first: int, last: int, *, skipped: bool) -> bool:
        """Count the step over samples [first, last); True where the run has to go back."""
        if not skipped:
            self.in_a_row, self._since = 0, None
            return False
        self._since = first if self._since is None else self._since
        self.in_a_row += 1
        return self.in_a_row >= self._limit

    def pass_over(self, last: int) -> list[int]:
        """Write down that the present streak, up to `last` samples, is to be left out."""
        span = [self._since if self._since is not None else last, last]
        write_json(self._fs, self._path, [*self.spans, span])
        return span


def watch_unused(model: nn.Module) -> Callable[[], list[str]]:
    """Note which parameters get a gradient; the function returned names those that never did."""
    unused = {name for name, p in model.named_parameters() if p.requires_grad}
    handles = [
        p.register_post_accumulate_grad_hook(lambda _p, name=name: unused.discard(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]

    def finish() -> list[str]:
        for handle in handles:
            handle.remove()
        return sorted(unused)

    return finish


class RateWatch:
    """Notices a learning rate of zero in the optimizer: steps that cost their time and learn
    nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at all its parameter groups."""
        self._optimizer = optimizer
        self._at_zero = False

    def falls_to_zero(self) -> bool:
        """Whether a group's rate is zero now and none was at the last look."""
        before, self._at_zero = (
            self._at_zero,
            not all(g["lr"] for g in self._optimizer.param_groups),
        )
        return self._at_zero and not before


def describe_samples(keys: Sequence[str], most: int = 8) -> str:
    """Names of samples in one line."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def log_line(samples: int, consumed: str, micro_batches: Sequence[int], at: float) -> bytes:
    """A line of the log of consumed samples."""
    told = {
        "samples": samples,
        "consumed": consumed,
        "micro_batches": [f"{crc:08x}" for crc in micro_batches],
        "time": round(at, 3),
    }
    return json.dumps(told).encode() + b"\n"
