"""Losses and gradients that are not finite: count skipped steps, decide when to go back.

Also the log of consumed samples. All ranks have the same values here, so all decide the same.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from distributed.config import TrainConfig
from distributed.exchange import Exchange, Step, StepSums
from measnet.config import ModelConfig
from measnet.network import PIXEL_LIBRARIES
from measnet.routing import has_collapsed, measures
from shards.reader import DamagedError
from shards.storage import open_folder, read_json, write_json

PASSED_OVER = "passed_over.json"
"""File of a run: spans of samples that are left out because all their steps were skipped."""


Cause = Literal[
    "", "diverged", "out of memory", "corrupt data", "worker lost", "no workers", "other"
]
"""Why a run failed, for use by programs; empty if it did not fail."""


class GoBackError(RuntimeError):
    """Too many updates in a row were skipped; Ray restarts the workers from the last checkpoint."""


def cause_of(error: BaseException) -> Cause:
    """Classify the failure of a run by the type of its exception, or of its workers' exceptions.

    If several workers failed, the first matching cause of the list counts: when one worker diverges
    or runs out of memory, the others lose their connection to it and fail too.
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
    """The chained digest after one more step, from the crc32 of its micro-batches in order."""
    checksums = ",".join(f"{crc:08x}" for crc in micro_batches)
    return hashlib.sha256(f"{before}:{checksums}".encode()).hexdigest()


class SpikeDetector:
    """Finds losses far above the running mean."""

    WARM_UP = 50
    """Steps before any loss counts as a spike."""
    DECAY = 0.98

    def __init__(self, deviations: float) -> None:
        """A spike is more than `deviations` standard deviations above the mean."""
        self._deviations = deviations
        self._mean = self._square = 0.0
        self._steps = 0

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is a spike; also adds it to the running mean."""
        if not math.isfinite(loss):
            return False  # skipped and counted elsewhere
        correction = 1 - self.DECAY**self._steps if self._steps else 1.0
        mean, square = self._mean / correction, self._square / correction
        spread = math.sqrt(max(0.0, square - mean**2))
        spike = self._steps >= self.WARM_UP and loss > mean + self._deviations * spread
        self._mean += (1 - self.DECAY) * (loss - self._mean)
        self._square += (1 - self.DECAY) * (loss**2 - self._square)
        self._steps += 1
        return spike


class SkipCounter:
    """Counts skipped updates and decides when to go back to the last checkpoint."""

    def __init__(self, folder: str, limit: int) -> None:
        """Read which samples of the run in `folder` are left out already."""
        self._fs, root = open_folder(folder)
        self._path = f"{root}/{PASSED_OVER}"
        self._limit = limit
        self._since: int | None = None
        self.in_a_row = 0
        """Updates skipped in a row, up to now."""
        self.spans = joined(read_json(self._fs, self._path) if self._fs.exists(self._path) else [])
        """Spans [first, end) of samples that are left out, in order and apart; `end` is not part of
        the span."""

    def after_skipped(self, samples: int) -> int:
        """`samples`; if that is in a span that is left out, the end of that span."""
        for first, last in self.spans:
            if first <= samples < last:
                samples = last
        return samples

    def after_step(self, first: int, *, skipped: bool) -> bool:
        """Count the step whose first sample is `first`; True if the run has to go back."""
        if not skipped:
            self.in_a_row, self._since = 0, None
            return False
        self._since = first if self._since is None else self._since
        self.in_a_row += 1
        return self.in_a_row >= self._limit

    def pass_over(self, last: int) -> list[int]:
        """Save that the samples of the steps skipped in a row, up to `last`, are left out."""
        span = [self._since if self._since is not None else last, last]
        write_json(self._fs, self._path, [*self.spans, span])
        return span


def joined(spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Spans [first, end) in order, those that touch as one."""
    apart: list[list[int]] = []
    for first, end in sorted(map(list, spans)):
        if apart and first <= apart[-1][1]:
            apart[-1][1] = max(apart[-1][1], end)
        else:
            apart.append([first, end])
    return apart


def watch_unused(model: nn.Module) -> Callable[[], list[str]]:
    """Watch which parameters get a gradient; the returned function names those without one."""
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
    """Finds a learning rate of zero in the optimizer: such steps take time and learn nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Watch all parameter groups of `optimizer`."""
        self._optimizer = optimizer
        self._at_zero = False

    def falls_to_zero(self) -> bool:
        """Whether a group's rate is zero now, and none was at the last call."""
        before, self._at_zero = (
            self._at_zero,
            not all(g["lr"] for g in self._optimizer.param_groups),
        )
        return self._at_zero and not before


class StepGuard:
    """Looks at the numbers of each step: names what is wrong, and decides when to go back."""

    def __init__(
        self,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        unused: Callable[[], list[str]],
        note: Callable[[str], None],
    ) -> None:
        """Watch a run; every rank has one.

        Args:
            config: of the run.
            optimizer: its learning rates are watched.
            unused: names the parameters that got no gradient; called once, after the first step.
            note: records a line among the events of the run.
        """
        self.skips = SkipCounter(config.folder, config.guard.skips_in_a_row)
        self._config, self._note = config, note
        self._spikes = SpikeDetector(config.guard.spike)
        self._rates = RateWatch(optimizer)
        self._unused: Callable[[], list[str]] | None = unused
        self._losses = [0.0] * Exchange.LOSSES

    def after_step(self, step: Step, sums: StepSums) -> None:
        """Judge a step; a collective call.

        Raises:
            GoBackError: too many steps in a row were skipped.
        """
        self._warn(step)
        before = self._losses
        self._losses = [0.0] * Exchange.LOSSES if step.ends_point else sums.losses
        micro_batches = sums.losses[3] - before[3]
        loss = (sums.losses[0] - before[0]) / micro_batches if micro_batches else math.nan
        spike = self._spikes.is_spike(loss)
        first = step.samples - self._config.recipe.global_batch
        if sums.updated and not spike:
            self.skips.after_step(first, skipped=False)
            return
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, step.keys)
        named = describe_samples([key for part in gathered for key in part])
        if spike:
            self._note(f"loss {loss:.4f} stands out at {step.samples:,} samples: {named}")
        if sums.updated:
            return
        self._note(
            f"update skipped on all ranks at {step.samples:,} samples, a gradient is not finite: "
            f"{named}"
        )
        if self.skips.after_step(first, skipped=True):
            self._go_back(step.samples)

    def _warn(self, step: Step) -> None:
        """Name parameters without a gradient, and a learning rate that has fallen to zero."""
        if self._unused is not None:
            if unused := self._unused():
                self._note(f"warning: no gradient ever reaches {describe_samples(unused)}")
            self._unused = None
        if self._rates.falls_to_zero():
            self._note(
                f"warning: the learning rate is 0 at {step.samples:,} samples, though the recipe "
                f"asks for up to {self._config.recipe.lr:g} (recipe.lr) until its end"
            )

    def _go_back(self, samples: int) -> None:
        reason = f"{self._config.guard.skips_in_a_row} updates in a row were skipped"
        if dist.get_rank() == 0:
            first, end = self.skips.pass_over(samples)
            self._note(f"{reason}; going back, leaving out samples {first:,} to {end:,}")
            time.sleep(1.0)  # until the line is sent
        dist.barrier()
        raise GoBackError(f"{reason} up to {samples:,} samples (guard.skips_in_a_row)")


def routing_warnings(usage: Mapping[str, Sequence[float]], model: ModelConfig) -> list[str]:
    """A warning per library whose experts are hardly used, since the last validation.

    Args:
        usage: library -> how often each expert was chosen.
        model: the network.
    """
    warnings = []
    for library, chosen in usage.items():
        if not sum(chosen):
            continue
        pixel = library in PIXEL_LIBRARIES
        top_k = model.pixel_top_k if pixel else model.image_top_k
        effective = measures({"all": {library: chosen}})[library].effective_experts
        idle = [str(n) for n, times in enumerate(chosen) if times == 0]
        if has_collapsed(effective, experts=len(chosen), top_k=top_k):
            weight = "recipe.balance-weight" if pixel else "model.routing.picture-weight"
            warnings.append(
                f"warning: {library} has collapsed: it uses {effective:.1f} of {len(chosen)} "
                f"experts, and {top_k} is the least; try a larger --{weight}, or "
                "--model.routing.bias-rate 0.001 (docs/routing.md)"
            )
        elif idle:
            warnings.append(
                f"warning: experts {', '.join(idle)} of {library} were not chosen once since the "
                "last validation"
            )
    return warnings


def describe_samples(keys: Sequence[str], most: int = 8) -> str:
    """Names of samples in one line."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def log_line(samples: int, consumed: str, micro_batches: Sequence[int], at: float) -> bytes:
    """A line of the log of consumed samples."""
    line = {
        "samples": samples,
        "consumed": consumed,
        "micro_batches": [f"{crc:08x}" for crc in micro_batches],
        "time": round(at, 3),
    }
    return json.dumps(line).encode() + b"\n"
