"""Estimates the time, samples/s and price of a run from a measured step.

    python -m distributed.cost paper-5task --price 1.2

It times some micro-batches of the preset on this machine's device, without Ray and without data.
If the preset is for a GPU and this machine has none, it uses a measurement from `MEASURED`.
More GPUs share the same global batch; the time to exchange gradients is not included. Workers on
one CPU machine share its cores, so more of them are not faster.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import tyro

from distributed.config import TrainConfig
from distributed.presets import PRESETS
from measnet.hardware import Machine, this_machine


class Rate(NamedTuple):
    """Samples per second of one GPU, or of one CPU machine."""

    low: float
    high: float
    source: str
    """What was measured, in words."""
    cpu: bool = False
    """Whether it is the rate of a CPU machine, whose workers share its cores."""


MEASURED = {
    "NVIDIA H100 80GB": Rate(
        24.0,
        28.0,
        "the system trained 24 to 28 samples/s at 8x128 bf16 before the Triton kernels; "
        "not measured since",
    )
}
"""Card -> what `distributed.train` reached on it with the network `paper`."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time, samples per second and price of a preset, from a step measured on this machine."""

    preset: tyro.conf.Positional[str] = "local-4090"
    """The preset."""
    steps: int = 3
    """Micro-batches to time, after one warm-up."""
    step_seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """Seconds per micro-batch on one GPU, mean of the run, if measured elsewhere; 0 measures it on
    this machine."""
    price: float = 0.0
    """Price of one GPU, or of one CPU machine, per hour, in any currency."""


def measure(config: TrainConfig, steps: int) -> Rate:
    """The rate of one worker on this machine's device; the mean of the run, if its crops change."""
    stages = config.data.crop_stages(config.recipe.samples)
    measured = [_measure_step(_with_crops(config, side), steps) for _, side in stages]
    parts = zip(stages, measured, strict=True)
    seconds = sum(samples * step.seconds for (samples, _), step in parts) / config.recipe.samples
    first = measured[0]
    return rate_of(seconds, config, f"measured on {first.device}", cpu=first.cpu)


class Step(NamedTuple):
    """A measured micro-batch."""

    seconds: float
    """Of one micro-batch, with its part of an update."""
    device: str
    """Device and precision, in words."""
    cpu: bool


def _with_crops(config: TrainConfig, side: int) -> TrainConfig:
    data = dataclasses.replace(config.data, crop=side, later_crops="")
    return dataclasses.replace(config, data=data)


def _measure_step(config: TrainConfig, steps: int) -> Step:
    """The median of some micro-batches, by a CUDA graph where training takes one."""
    import torch

    from distributed.decisions import accumulation_steps
    from distributed.engine import decide_for
    from distributed.graphs import graph_micro_batches
    from distributed.optimizer import build_optimizer
    from measnet.hardware import choose_device
    from measnet.losses import restoration_loss
    from measnet.network import MEASNet

    device = torch.device(choose_device("auto", this_machine()).choice)
    decisions = decide_for(device, config, 1)
    model = MEASNet(config.model).to(device).train()
    model.activation_checkpointing = decisions.checkpointing.choice == "on"
    optimizer = build_optimizer(model, config.recipe)
    shape = (config.recipe.micro_batch, 3, config.data.crop, config.data.crop)
    pictures = torch.rand(shape, device=device)
    accumulated = accumulation_steps(config.recipe, 1)
    engine = SimpleNamespace(module=model)
    graph, _ = graph_micro_batches(engine, config, decisions, 1.0 / accumulated)
    weights = config.recipe.balance_weight, config.recipe.frequency_weight

    def one_pass() -> None:
        if graph is not None:
            graph(pictures, pictures)
            return
        with torch.autocast(device.type, torch.bfloat16, decisions.precision.choice == "bf16"):
            losses = restoration_loss(model(pictures), pictures, *weights)
        losses.total.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def seconds_of(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rounds = [(seconds_of(one_pass), seconds_of(update)) for _ in range(steps + 1)]
    a_pass, an_update = (statistics.median(part) for part in zip(*rounds[1:], strict=True))
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    where = f"{name}, {decisions.precision.choice}"
    return Step(a_pass + an_update / accumulated, where, cpu=not on_gpu)


def rate_of(seconds: float, config: TrainConfig, source: str, *, cpu: bool = False) -> Rate:
    """Samples per second, where a micro-batch takes `seconds` on average."""
    crops = config.recipe.micro_batch
    sides = [str(side) for _, side in config.data.crop_stages(config.recipe.samples)]
    mean = " on average" if len(sides) > 1 else ""
    step = f"a micro-batch of {crops} crops of {', '.join(sides)} takes {seconds:.3g} s{mean}"
    return Rate(crops / seconds, crops / seconds, f"{step}, {source}", cpu)


def choose_rate(config: TrainConfig, machine: Machine, steps: int) -> Rate:
    """Measured here; from `MEASURED` if the preset is for a GPU and this machine has none."""
    if config.scaling.device == "cpu" or machine.cards:
        return measure(config, steps)
    card, known = next(iter(MEASURED.items()))
    return known._replace(
        source=f"no GPU here, so by an earlier measurement on {card}: {known.source}"
    )


def span(low: float, high: float, show: Callable[[float], str]) -> str:
    """`low to high`; one number if both are shown alike."""
    ends = list(dict.fromkeys((show(low), show(high))))
    return " to ".join(ends)


def duration(low: float, high: float) -> str:
    """Hours as `3.4 min` below one hour, else as `12.5 h`; `12.5 to 14.0 h` for a range."""
    if high < 1:
        return f"{span(low * 60, high * 60, '{:.1f}'.format)} min"
    return f"{span(low, high, '{:,.1f}'.format)} h"


def amount(price: float) -> str:
    """A price with at least two digits that are not zero."""
    if price >= 100:
        return f"{price:,.0f}"
    return f"{price:.2f}" if price >= 0.1 or price == 0 else f"{price:.2g}"


MOST_WORKERS = 64
"""Largest number of workers that the table shows."""


def rows(config: TrainConfig, rate: Rate, price: float) -> list[tuple[str, ...]]:
    """Per number of workers: it, samples/s, duration, hours to pay, price."""
    found: list[tuple[str, ...]] = []
    for workers in (n for n in config.recipe.worker_counts if n <= MOST_WORKERS):
        paid = 1 if rate.cpu else workers  # GPUs, or the one machine
        low, high = rate.low * paid, rate.high * paid
        long, short = (config.recipe.samples / one / 3600 for one in (low, high))
        found.append(
            (
                str(workers),
                span(low, high, "{:,.1f}".format),
                duration(short, long),
                duration(short * paid, long * paid),
                span(short * paid * price, long * paid * price, amount) if price else "-",
            )
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.cost")
    if given.preset not in PRESETS:
        known = ", ".join(PRESETS)
        print(f"error: unknown preset {given.preset!r}; choose one of {known}", file=sys.stderr)
        return 2
    if given.steps < 1 or given.step_seconds < 0 or given.price < 0:
        print("error: steps must be 1 or more, seconds and price not negative", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    config = PRESETS[given.preset]()
    recipe = config.recipe
    if given.step_seconds:
        rate = rate_of(given.step_seconds, config, "as given")
    else:
        rate = choose_rate(config, this_machine(), given.steps)
    console = Console(soft_wrap=True)
    console.print(f"{given.preset}: {recipe.samples:,} samples; {rate.source}", highlight=False)
    if rate.cpu:
        console.print("workers on one CPU machine share its cores: more of them are not faster")
    unit = "machine" if rate.cpu else "GPU"
    table = Table("workers", "samples/s to deliver", "time", f"{unit} time", "price")
    for row in rows(config, rate, given.price):
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
