"""What Ray and DeepSpeed add to a step, and what a checkpoint costs: ratios within one run.

    python bench/overhead.py [--steps 24] [--rounds 4] [--json]

The same network on the same samples, in turn: a bare PyTorch loop in this process, and the whole
system on one worker with a checkpoint every few steps. The speed of a machine drifts, so each turn
of the system is compared with the bare loops right before and after it. Once the steps leave one
core free, where Ray's processes find room as they do beside a GPU; once the steps take all cores,
and each of Ray's processes that wakes up stops them for a moment.
"""

import itertools
import json
import os
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

from distributed.config import (
    DataConfig,
    IntervalConfig,
    Recipe,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from distributed.launch import launch
from distributed.optimizer import build_optimizer
from distributed.run_log import CONSUMED
from distributed.schedule import learning_rate
from measnet.config import tiny
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from shards.stream import TrainStream
from tests.photographs import pack_photographs

CHECKPOINT_EVERY = 8
"""Steps between two checkpoints: many, so that their median says something."""
MINUTE = 60.0
"""Seconds between the checkpoints whose share of the time is given: runs make them less often."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Overhead of the system over a bare loop, and of checkpoints over none."""

    steps: int = 24
    """Steps of the whole system in each round; the bare loop makes half as many."""
    rounds: int = 4
    """Turns of bare loop and system; the bare loop runs once more at the end."""
    json: bool = False
    """Print JSON."""


def configuration(folder: Path, name: str, steps: int, cores: int) -> TrainConfig:
    """Steps of about a second, on any number of cores."""
    batch = 12 * cores
    return TrainConfig(
        name=name,
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
        scaling=ScalingConfig(cpus_per_worker=cores),
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


def measure(folder: Path, given: Arguments, cores: int) -> dict[str, float]:
    """Medians over all rounds, with `cores` cores for the steps."""
    torch.set_num_threads(cores)
    loops: list[float] = []
    plain: list[list[float]] = []
    saving: list[float] = []
    for turn in range(given.rounds):
        config = configuration(folder, f"{cores}-cores-{turn}", given.steps, cores)
        loops.append(statistics.median(bare(config, given.steps // 2)))
        without, with_checkpoint = system(config)
        plain.append(without)
        saving += with_checkpoint
    loops.append(statistics.median(bare(config, given.steps // 2)))
    step = statistics.median(itertools.chain(*plain))
    overheads = [
        statistics.median(own) / statistics.fmean(beside) - 1
        for own, beside in zip(plain, itertools.pairwise(loops), strict=True)
    ]
    stall = statistics.median(saving) - step
    return {
        "cores": cores,
        "bare_step_s": round(statistics.median(loops), 4),
        "system_step_s": round(step, 4),
        "overhead": round(statistics.median(overheads), 4),
        "overhead_least": round(min(overheads), 4),
        "overhead_most": round(max(overheads), 4),
        "checkpoint_stall_s": round(stall, 4),
        "checkpoint_stall_share": round(stall / MINUTE, 5),
        "noise": round(max(loops) / min(loops) - 1, 4),
    }


def main() -> int:
    """Measure and print; returns the exit code."""
    given = tyro.cli(Arguments, prog="python bench/overhead.py")
    for name, least in {"steps": CHECKPOINT_EVERY + 1, "rounds": 1}.items():
        if getattr(given, name) < least:
            value = getattr(given, name)
            print(f"--{name} is {value}, but must be at least {least}", file=sys.stderr)
            return 2
    all_cores = os.cpu_count() or 1
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pack_photographs(Path(name))
        for title, cores in {"one_core_free": all_cores - 1, "all_cores": all_cores}.items():
            if cores:
                results[title] = measure(folder, given, cores)
            else:
                print("left out: with one core none can be left free", file=sys.stderr)
    if given.json:
        print(json.dumps(results))
        return 0
    for title, r in results.items():
        print(
            f"{title.replace('_', ' ')}: step bare {r['bare_step_s']:.3f} s, "
            f"system {r['system_step_s']:.3f} s: overhead {r['overhead']:+.1%} "
            f"({r['overhead_least']:+.1%} to {r['overhead_most']:+.1%} in each turn); "
            f"a checkpoint stalls it by {r['checkpoint_stall_s'] * 1000:+.0f} ms, "
            f"{r['checkpoint_stall_share']:+.2%} of the time at one a minute; "
            f"bare loops among themselves {r['noise']:.1%} (the noise)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
