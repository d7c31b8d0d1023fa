"""Time and memory of the network compared with its plain version (bench/plain.py), as ratios.

    python bench/model.py [--json] [--cases NAME ...] [--repeats 5]

Both compute the same function with the same weights; their outputs are compared before timing. Runs
alternate, so that other load on the machine affects both. A ratio is the median of "plain / ours"
over the pairs, by wall clock and by processor seconds. Peak memory is the growth of the resident
set over one step in a new process. fp32, 2 threads.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Threads that wait burn no time, so that processor seconds mean work; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import Tensor, nn

from bench import plain
from measnet import config as configs
from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.transformer import TransformerBlock

Step = Callable[[], Tensor]
NARROW = {"dim": 16, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
AGREES = 0.98
"""Share of the numbers that must be the same."""
SIZES = {
    "train 2x128": ("train", 2, 128),
    "train 4x64": ("train", 4, 64),
    "infer 1x128": ("infer", 1, 128),
}


def cases() -> dict[str, tuple[ModelConfig, str, int, int]]:
    """Name -> configuration, mode, batch, side."""
    found = {}
    for variant, preset in (("official", configs.official()), ("paper", configs.paper())):
        for width, config in (("full", preset), ("width16", replace_dotted(preset, NARROW))):
            for size, (mode, batch, side) in SIZES.items():
                found[f"{variant} {width} {size}"] = (config, mode, batch, side)
    return found


def network_steps(config: ModelConfig, mode: str, batch: int, side: int) -> tuple[Step, Step]:
    """One step of ours and of the plain formulation, on the same weights."""
    torch.manual_seed(0)
    model = MEASNet(config).train(mode == "train")
    for block in model.extra.values():
        nn.init.constant_(block.alpha, 0.1)
    image, clean = torch.rand(batch, 3, side, side), torch.rand(batch, 3, side, side)
    generator = torch.Generator()

    def step(forward: Callable[..., object]) -> Tensor:
        generator.manual_seed(1)
        if mode == "infer":
            with torch.no_grad():
                return forward(image, generator=generator).image
        model.zero_grad(set_to_none=True)
        restoration = forward(image, generator=generator)
        restoration_loss(restoration, clean, 1e-3).total.backward()
        return restoration.image.detach()

    def plainly(image: Tensor, generator: torch.Generator) -> object:
        return plain.forward(model, image, generator)

    return lambda: step(model), lambda: step(plainly)


def block_steps() -> dict[str, tuple[Step, Step]]:
    """Forward and backward of single blocks at the shapes of 128×128 crops."""
    torch.manual_seed(0)

    def pair(ours: Callable, plainly: Callable, *shape: int) -> tuple[Step, Step]:
        x = torch.randn(*shape)
        x_bhwc = x.permute(0, 2, 3, 1).contiguous().requires_grad_()
        x_bchw = x.clone().requires_grad_()

        def step(compute: Callable, inputs: Tensor, back: bool) -> Tensor:
            out = compute(inputs)
            out.square().mean().backward()
            return out.detach() if back else out.detach().permute(0, 3, 1, 2)

        return lambda: step(ours, x_bhwc, False), lambda: step(plainly, x_bchw, True)

    found = {}
    for channels, side in ((96, 128), (48, 128), (96, 64), (192, 32), (384, 16)):
        block = TransformerBlock(channels, channels // 48, 2.66)
        found[f"transformer {channels}@{side}"] = pair(
            block, lambda x, b=block: plain.transformer_block(x, b), 1, channels, side, side
        )
    paper, official = MEASNet(configs.paper()), MEASNet(configs.official())
    prompt = torch.randn(1, 256)
    for name, model in (("paper", paper), ("official", official)):
        found[f"{name} FD-MEE 96@128"] = pair(
            lambda x, m=model: m.frequency1(x)[0],
            lambda x, m=model: plain.frequency_experts(x, m.frequency1),
            *(2, 96, 128, 128),
        )
        model.experts1.eval()  # without noise, for the comparison
        found[f"{name} pixel experts 48@128"] = pair(
            lambda x, m=model: m.experts1(x, prompt).features,
            lambda x, m=model: plain.pixel_experts(x, prompt, m.experts1, None)[0],
            *(1, 48, 128, 128),
        )
    image, mining = torch.rand(1, 3, 128, 128), official.extra["decoder2"]
    nn.init.constant_(mining.alpha, 0.1)
    found["official mining 96@64"] = pair(
        lambda x: mining(x, image),
        lambda x: plain.frequency_mining(x, image, mining),
        *(1, 96, 64, 64),
    )
    return found


def compare(steps: tuple[Step, Step], repeats: int) -> dict[str, float]:
    """Ratios plain / ours, and what ours takes in seconds."""
    ours, theirs = (step() for step in steps)
    # Where two experts are as likely as each other, rounding chooses: a few pixels may differ.
    apart = (ours - theirs).abs().flatten().quantile(AGREES)
    difference = (apart / theirs.abs().max()).item()
    if difference > 1e-3:
        raise AssertionError(f"outputs differ by {difference:.1e}: the times mean nothing")
    walls: list[tuple[float, float]] = []
    processors: list[tuple[float, float]] = []
    for _ in range(repeats):
        pair = [_timed(step) for step in steps]
        walls.append((pair[0][0], pair[1][0]))
        processors.append((pair[0][1], pair[1][1]))
    return {
        "wall_ratio": statistics.median(b / a for a, b in walls),
        "cpu_ratio": statistics.median(b / a for a, b in processors),
        "seconds": statistics.median(a for a, _ in walls),
        "cpu_seconds": statistics.median(a for a, _ in processors),
        "difference": difference,
    }


def _timed(step: Step) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def peak_memory(case: str, which: str) -> float:
    """MiB that one step adds to the resident set, in a fresh process."""
    command = [sys.executable, __file__, "--peak", which, "--cases", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(case: str, which: str) -> None:
    """What the fresh process does."""
    steps = network_steps(*cases()[case])
    before = _resident("VmRSS")
    steps[which == "plain"]()
    print((_resident("VmHWM") - before) / 1024)


def _resident(field: str) -> int:
    """KiB; unlike getrusage's figure, the high-water mark is of this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time and memory of the network compared with its plain version, as ratios."""

    json: bool = False
    """Print one JSON object instead of a table."""
    cases: tuple[str, ...] = ()
    """Names or beginnings of names; default: all."""
    repeats: int = 5
    """Timed pairs of each case."""
    peak: Literal["ours", "plain"] | None = None
    """Print only the peak memory of one step of the first case, in MiB; for the new processes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = tyro.cli(Arguments, args=argv, prog="python bench/model.py")
    torch.set_num_threads(2)
    for function in (torch.exp, torch.log, torch.erf, torch.tanh, torch.sigmoid):
        function(torch.ones(4))  # a first, multi-threaded call can be inexact (torch 2.13, CPU)
    if arguments.peak:
        print_peak(arguments.cases[0], arguments.peak)
        return
    wanted = tuple(arguments.cases or ("",))
    results: dict[str, dict[str, float]] = {}
    if not arguments.json:
        print(f"{'case':<36}{'wall ×':>8}{'cpu ×':>8}{'ours s':>9}{'memory ×':>10}")
    networks = {name: c for name, c in cases().items() if name.startswith(wanted)}
    blocks = block_steps() if any(not w or w.startswith("block") for w in wanted) else {}
    for name in [*networks, *(f"block {name}" for name in blocks)]:
        if name in networks:
            result = compare(network_steps(*networks[name]), arguments.repeats)
            ours, theirs = (peak_memory(name, which) for which in ("ours", "plain"))
            result |= {"peak_mib": ours, "memory_ratio": ours / theirs}
        else:
            result = compare(blocks[name.removeprefix("block ")], arguments.repeats)
        results[name] = result
        if not arguments.json:
            figures = f"{result['wall_ratio']:>8.2f}{result['cpu_ratio']:>8.2f}"
            memory = f"{result['memory_ratio']:>10.2f}" if "memory_ratio" in result else ""
            print(f"{name:<36}{figures}{result['seconds']:>9.3f}{memory}", flush=True)
    if arguments.json:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "fp32"}
        print(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
