"""What it gains to add up gradients during the backward pass: milliseconds of a step.

    python bench/reduction.py [--workers 2] [--json]

Two engines train the same network in turn in the same processes: one adds up the gradients of the
workers during the backward pass, the other one after it, by DeepSpeed. With as many GPUs as workers
it is `paper`, 8×128 in bf16, by NCCL, without CUDA graphs; else a small network on the CPU by gloo.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed import engine as engines
from distributed.config import EngineConfig, Recipe, TrainConfig
from distributed.decisions import decide
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from tests.ranks import run_ranks

WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare on this machine."""

    workers: int = 2
    """Processes; on GPUs one for each."""
    steps: int = 8
    """Steps of each engine in a round."""
    rounds: int = 6
    """Turns; the medians of all steps are compared."""
    json: bool = False
    """Print JSON."""


def measure(on_gpu: bool, steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step on this rank, by `overlap` and `after`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    preset, micro_batch, crop = ("paper", 8, 128) if on_gpu else ("tiny", 2, 64)
    model = replace_dotted(getattr(configs, preset)(), {"expert_path": "dense"})
    recipe = Recipe(samples=10**6, global_batch=micro_batch * world, micro_batch=micro_batch)
    precision = EngineConfig(precision="bf16" if on_gpu else "fp32")
    config = TrainConfig(model=model, recipe=recipe, engine=precision)
    decisions = decide(config, world, None)

    def engine(overlap: bool) -> Any:
        torch.manual_seed(0)
        network = MEASNet(model).to(device).train()
        return engines.initialize(config, decisions, network, overlap=overlap)

    both = {"overlap": engine(True), "after": engine(False)}
    image, clean = (torch.rand(micro_batch, 3, crop, crop, device=device) for _ in range(2))

    def step(engine: Any) -> float:
        dist.barrier()
        started = time.perf_counter()
        losses = restoration_loss(engine(image), clean, recipe.balance_weight)
        engine.backward(losses.total)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e3

    for one in both.values():
        for _ in range(WARM_UP):
            step(one)
    took: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(rounds):
        for name in sorted(both, reverse=turn % 2 == 0):
            took[name] += [step(both[name]) for _ in range(steps)]
    return took


def main() -> None:
    """Command line."""
    given = tyro.cli(Arguments, prog="python bench/reduction.py", description=__doc__)
    on_gpu = torch.cuda.device_count() >= given.workers
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    took = run_ranks(given.workers, measure, on_gpu, given.steps, given.rounds, backend=backend)[0]
    overlap, after = (statistics.median(took[name]) for name in ("overlap", "after"))
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        **{"workers": given.workers, "overlap_ms": overlap, "after_ms": after},
        "ratio": after / overlap,
    }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['device']}, {given.workers} workers, milliseconds of a step (median)")
    print(f"  during the backward pass {overlap:.1f}, after it {after:.1f}: {after / overlap:.2f}x")


if __name__ == "__main__":
    main()
