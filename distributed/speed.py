"""How fast a run is, beside samples/s: the network's arithmetic, and the time of each part.

Nothing here makes the host wait for a GPU. Its times come from CUDA events, which are read when the
sums of their step are read.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch

from measnet.hardware import Card, Peak, peak

Phase = Literal["data", "forward", "backward", "graph", "update"]
"""Parts of a step; `graph` is the forward and the backward pass as one CUDA graph."""
Mark = tuple[Phase, float | torch.cuda.Event]
"""What begins, and when: seconds on a CPU, an event on a GPU."""
SIDE = 256
"""Height and width of the picture that `measnet.complexity.network_cost` counts."""
Function = TypeVar("Function", bound=Callable[..., None])


def flops_per_sample(multiply_adds: float, crop: int) -> float:
    """Operations of a forward and a backward pass for one crop.

    A multiply-add counts as 2, and the backward pass as twice the forward pass. What activation
    checkpointing computes again does not count. The count follows the area of the crop; for
    `paper` at 128 this differs by 0.2 % from a count at 128.

    Args:
        multiply_adds: of one picture of 256×256.
        crop: side of the training crops in pixels.
    """
    return 3 * 2 * multiply_adds * (crop / SIDE) ** 2


def arithmetic(
    samples_per_s: float, *, flops: float, world: int, peak: Peak | None
) -> dict[str, float]:
    """`speed/model_tflops` of all workers, and their share of the cards' peak in bf16.

    Args:
        samples_per_s: of all workers.
        flops: from `flops_per_sample`.
        world: number of workers, each with a card like rank 0's.
        peak: of one card; None leaves the share out.
    """
    tflops = samples_per_s * flops / 1e12
    share = {"speed/peak_share": tflops / (world * peak.tflops)} if peak else {}
    return {"speed/model_tflops": tflops, **share}


class StepClock:
    """Notes when the parts of a step begin, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is noted yet."""
        self._on_gpu = device.type == "cuda"
        self._marks: list[Mark] = []

    def begin(self, phase: Phase) -> None:
        """The part before ends here; `data` is the time between steps and is not shown."""
        self._marks.append((phase, self._now()))

    def end_step(self) -> list[Mark]:
        """The marks of the step that ends here."""
        self.begin("data")
        ended, self._marks = self._marks, []
        return ended

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def durations(marks: Sequence[Mark]) -> dict[Phase, float]:
    """Seconds of each part of a step whose work the device has finished."""
    seconds: dict[Phase, float] = defaultdict(float)
    for (phase, start), (_, end) in pairwise(marks):
        if isinstance(start, float) and isinstance(end, float):
            seconds[phase] += end - start
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            seconds[phase] += start.elapsed_time(end) / 1000
    return dict(seconds)


class Speed:
    """Rank 0's view of the speed since the last point of the curves."""

    def __init__(self, world: int, card: Card | None) -> None:
        """See `arithmetic`; `card` is None on a CPU."""
        self._world = world
        self._peak = peak(card.name) if card else None
        self._start_point()

    def _start_point(self) -> None:
        self._steps = 0
        self._seconds: dict[str, float] = defaultdict(float)

    def after_step(
        self,
        point: Mapping[str, float],
        marks: Sequence[Mark],
        *,
        flops: float,
        last: bool,
        forward_share: float | None = None,
    ) -> dict[str, float]:
        """Count a step whose sums have been read; the metrics, of which times are means per step.

        Args:
            point: from `distributed.exchange.curve_point`.
            marks: of the step.
            flops: of one of its samples, from `flops_per_sample`.
            last: whether the point of the curves ends with it.
            forward_share: of the forward pass in a graph's time; None if it is not known. Then
                only the sum of both passes is.
        """
        found = durations(marks)
        graph_s = found.get("graph", 0.0)
        forward_s, backward_s = found.get("forward", 0.0), found.get("backward", 0.0)
        self._steps += 1
        self._seconds["forward_backward_s"] += forward_s + backward_s + graph_s
        self._seconds["update_s"] += found.get("update", 0.0)
        if not graph_s or forward_share is not None:
            share = forward_share or 0.0
            self._seconds["forward_s"] += forward_s + share * graph_s
            self._seconds["backward_s"] += backward_s + (1 - share) * graph_s
        parts = {f"speed/{name}": sum_s / self._steps for name, sum_s in self._seconds.items()}
        if last:
            self._start_point()
        rate = point["speed/samples_per_s"]
        return parts | arithmetic(rate, flops=flops, world=self._world, peak=self._peak)


def timed(name: str) -> Callable[[Function], Function]:
    """Keeps how long each call of a session's method stopped the loop, as the metric `name`."""

    def decorate(method: Function) -> Function:
        @wraps(method)
        def call(session: Any) -> None:
            started = time.perf_counter()
            method(session)
            session.keep_metrics({name: time.perf_counter() - started}, session.samples)

        return call  # type: ignore[return-value]

    return decorate
