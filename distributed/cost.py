"""Estimates the hours, samples/s and price of a run from a measured step.

    python -m distributed.cost paper-5task --price 1.2

It times some micro-batches of the preset on this machine's device, without Ray and without data.
More workers share the same global batch; the time to exchange gradients is not included.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from distributed.config import TrainConfig
from distributed.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Hours, samples per second and price of a preset, from a step measured on this machine."""

    preset: tyro.conf.Positional[str] = "local-4090"
    """The preset."""
    steps: int = 3
    """Micro-batches to time, after one warm-up."""
    step_seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.0
    """Seconds per micro-batch, if measured elsewhere; 0 measures it on this machine."""
    price: float = 0.0
    """Price of one worker per hour, in any currency."""


def measure(config: TrainConfig, steps: int) -> tuple[float, str]:
    """Median seconds per micro-batch (forward, backward and update), and the device as text."""
    import torch

    from distributed.decisions import decide
    from distributed.engine import build_optimizer
    from measnet.hardware import card_of, choose_device, this_machine
    from measnet.losses import restoration_loss
    from measnet.network import MEASNet

    device = torch.device(choose_device("auto", this_machine()).choice)
    decisions = decide(config, 1, card_of(device))
    model = MEASNet(config.model).to(device).train()
    model.activation_checkpointing = decisions.checkpointing.choice == "on"
    optimizer = build_optimizer(model, config.recipe)
    shape = (config.recipe.micro_batch, 3, config.data.crop, config.data.crop)
    pictures = torch.rand(shape, device=device)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, decisions.precision.choice == "bf16"):
            losses = restoration_loss(model(pictures), pictures, config.recipe.balance_weight)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return statistics.median(seconds[1:]), f"{name}, {decisions.precision.choice}"


def worker_counts(config: TrainConfig, most: int = 64) -> list[int]:
    """Numbers of workers that can share the global batch evenly."""
    micro_batches = config.recipe.micro_batches
    return [n for n in range(1, min(micro_batches, most) + 1) if micro_batches % n == 0]


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
        seconds, where = given.step_seconds, "as given"
    else:
        seconds, where = measure(config, given.steps)
    console = Console(soft_wrap=True)
    console.print(
        f"{given.preset}: {recipe.samples:,} samples; a micro-batch of {recipe.micro_batch} crops "
        f"of {config.data.crop} takes {seconds:.3f} s ({where})",
        highlight=False,
    )
    table = Table("workers", "samples/s to deliver", "hours", "worker-hours", "price")
    for workers in worker_counts(config):
        rate = workers * recipe.micro_batch / seconds
        hours = recipe.samples / rate / 3600
        price = f"{hours * workers * given.price:,.0f}" if given.price else "-"
        table.add_row(
            str(workers), f"{rate:,.1f}", f"{hours:,.1f}", f"{hours * workers:,.1f}", price
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
