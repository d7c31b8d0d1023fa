"""What Ray and DeepSpeed add to a step, and what a checkpoint costs: ratios within one run.

    python bench/overhead.py [--steps 40] [--json]

The same network on the same samples: a bare PyTorch loop in this process before and after, and in
between the whole system on one worker, with a checkpoint every 20 steps. Both use all cores.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools

from distributed.config import DataConfig, IntervalConfig, Recipe, TrackingConfig, TrainConfig
from distributed.engine import build_optimizer, learning_rate
from distributed.launch import launch
from distributed.run import CONSUMED
from measnet.config import tiny
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from shards.stream import TrainStream
from tests.photographs import pack_photographs

CHECKPOINT_EVERY = 20
"""Steps between two checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Overhead of the system over a bare loop, and of checkpoints over none."""

    steps: int = 60
    """Steps of the whole system; the bare loop makes half as many before and after."""
    json: bool = False
    """Print JSON."""


def configuration(folder: Path, steps: int) -> TrainConfig:
    """Steps of about a second on two cores."""
    batch = 16
    return TrainConfig(
        name="overhead",
        storage=str(folder / "runs"),
        model=replace(tiny(), dim=24),
        data=DataConfig(
            train=str(folder / "train"),
            validation=str(folder / "test"),
            crop=64,
            repeats=dict.fromkeys(DataConfig().repeats, 1),
            loader_workers=0,
        ),
        recipe=Recipe(samples=steps * batch, global_batch=batch, micro_batch=4, lr=1e-3),
        every=IntervalConfig(
            checkpoint=CHECKPOINT_EVERY * batch,
            validate=0,
            validation_pictures=1,
            log=10 * batch,
        ),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )


def bare(config: TrainConfig, steps: int) -> list[float]:
    """Seconds of each step of a plain loop."""
    recipe = config.recipe
    torch.manual_seed(config.seed)
    model = MEASNet(config.model).train()
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, recipe)
    batches = TrainStream(config.data, config.seed).batches(
        0,
        steps * recipe.global_batch,
        global_batch=recipe.global_batch,
        micro_batch=recipe.micro_batch,
        world=1,
        rank=0,
    )
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step * recipe.global_batch)
        for _ in range(recipe.micro_batches):
            batch = next(batches)
            losses = restoration_loss(model(batch.degraded), batch.clean, recipe.balance_weight)
            (losses.total / recipe.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.001)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def system(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Seconds of steps without and with a checkpoint, of the whole system."""
    outcome = launch(config, console=Console(stderr=True), export=False)
    if outcome.status != "finished":
        raise SystemExit(f"the run {outcome.status}: {outcome.reason}")
    lines = (Path(config.folder) / CONSUMED).read_text().splitlines()
    ends = [json.loads(line)["time"] for line in lines]
    # A step's line is written before its checkpoint: the checkpoint falls into the next interval.
    took = [later - earlier for earlier, later in itertools.pairwise(ends)]
    saving = [s for n, s in enumerate(took, 1) if n % CHECKPOINT_EVERY == 0]
    plain = [s for n, s in enumerate(took, 1) if n % CHECKPOINT_EVERY and n > 2]
    return plain, saving


def main() -> int:
    """Measure and print; returns the exit code."""
    given = tyro.cli(Arguments, prog="python bench/overhead.py")
    with tempfile.TemporaryDirectory() as name:
        folder = pack_photographs(Path(name))
        config = configuration(folder, given.steps)
        before = bare(config, given.steps // 2)
        plain, saving = system(config)
        after = bare(config, given.steps // 2)
    loop, step = statistics.median(before + after), statistics.median(plain)
    stall = statistics.median(saving) - step
    result = {
        "bare_step_s": round(loop, 4),
        "system_step_s": round(step, 4),
        "overhead": round(step / loop - 1, 4),
        "checkpoint_stall_s": round(stall, 4),
        "checkpoint_stall_share": round(stall / (CHECKPOINT_EVERY * step), 5),
        "drift": round(statistics.median(after) / statistics.median(before) - 1, 4),
    }
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"step: bare {loop:.3f} s, system {step:.3f} s: overhead {step / loop - 1:+.1%}")
    print(
        f"checkpoint every {CHECKPOINT_EVERY} steps: {stall * 1000:+.0f} ms each, "
        f"{result['checkpoint_stall_share']:+.2%} of the time"
    )
    print(f"the bare loop after the run against before: {result['drift']:+.1%} (the noise)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
