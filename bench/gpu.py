"""What MEASNet takes on a GPU: steps, inference, operations, and what of it can only be counted.

    python bench/gpu.py                      # all sections, under 4 minutes
    python bench/gpu.py --json --sections network operations
    python bench/gpu.py --sections counts    # needs no GPU

Each time stands beside that of torch's own operations in the same run, the network's weights being
the same. `network` trains in a bare loop without Ray and DeepSpeed; `system` trains in
`distributed.train`. `counts` lists the launches and the memory traffic of one step, counted from
tensors that have sizes and no numbers: these figures are not measured.
"""

import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gpu_counts, gpu_operations
from bench.gpu_steps import Training, build
from measnet import config as configs
from measnet.ops import gpu_library
from measnet.ops.choice import torch_only

Section = Literal["network", "inference", "operations", "system", "counts", "tune"]
GIB = 2**30
STARTED = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure on this machine's first GPU."""

    sections: tuple[Section, ...] = ("network", "inference", "operations", "system", "counts")
    """Parts to run; `tune` tries other tile sizes, and runs only if named."""
    json: bool = False
    """One JSON object instead of tables."""
    steps: int = 10
    """Steps that are timed; the median counts."""
    small: bool = False
    """Small networks and pictures: a trial of this program, for a CPU too."""


@dataclass(frozen=True)
class Case:
    """A training step of the bare loop."""

    preset: str
    batch: int
    crop: int
    precision: Literal["bf16", "fp32"]

    @property
    def name(self) -> str:
        return f"{self.preset} train {self.batch}x{self.crop} {self.precision}"


CASES = (
    Case("paper", 8, 128, "bf16"),
    Case("official", 8, 128, "bf16"),
    Case("paper", 14, 128, "bf16"),
    Case("paper", 32, 128, "bf16"),
    Case("paper", 8, 128, "fp32"),
)
SMALL_CASES = (Case("tiny", 2, 32, "bf16"),)


def train_case(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """Milliseconds and memory of one step: fused with a CUDA graph, fused without, and torch's."""
    found: dict[str, Any] = {}
    for label, graph, accelerated in (
        ("", True, True),
        ("eager_", False, True),
        ("plain_", False, False),
    ):
        if graph and device.type != "cuda":
            continue
        with contextlib.nullcontext() if accelerated else torch_only():
            try:
                training = Training(
                    build(case.preset), device, case.batch, case.crop, case.precision
                )
                found |= _timed(training, label, graph, steps, device)
            except torch.OutOfMemoryError:
                found[f"{label}ms"] = None  # does not fit into this card
            training = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    ms = found.get("ms") or found.get("eager_ms")
    found["samples_per_s"] = case.batch / ms * 1e3 if ms else None
    return found


def _timed(
    training: Training, label: str, graph: bool, steps: int, device: torch.device
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = training.graphed() if graph else training.step
    step()
    _wait(device)
    first = time.perf_counter() - started
    for _ in range(2):
        step()
    seconds = []
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    found = {f"{label}ms": statistics.median(seconds) * 1e3, f"{label}first_step_s": first}
    if device.type == "cuda":
        found[f"{label}peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


@torch.no_grad()
def infer(device: torch.device, side: int, preset: str, steps: int) -> Iterator[tuple[str, Any]]:
    """Whole pictures through the network."""
    torch.manual_seed(0)
    model = build(preset).to(device).eval()
    image = torch.rand(1, 3, side, side, device=device)
    exact: Tensor | None = None
    for precision in ("fp32", "bf16"):
        times, peaks = {}, {}
        for label, accelerated in (("", True), ("plain_", False)):
            with contextlib.nullcontext() if accelerated else torch_only():
                run = _inference(model, image, precision)
                restored = run()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times[label] = _median(run, steps, device)
                if device.type == "cuda":
                    peaks[label] = torch.cuda.max_memory_allocated() / GIB
            if accelerated:
                kept = restored
            elif precision == "fp32":
                exact = restored
        assert exact is not None
        found = {f"{label}ms": ms * 1e3 for label, ms in times.items()}
        found |= {f"{label}peak_gib": peak for label, peak in peaks.items()}
        found["difference"] = (kept - exact).abs().max().item()
        yield f"{preset} infer {side}x{side} {precision}", found


def _inference(model: torch.nn.Module, image: Tensor, precision: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(image).image.float()

    return run


def _median(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    seconds = []
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(name: str, found: dict[str, Any]) -> None:
    """One line of a table."""
    figures = "  ".join(
        f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
    )
    print(f"  {name:<42} {figures}", flush=True)


def main() -> int:
    """Command line; 1 where there is no GPU for a section that needs one."""
    given = tyro.cli(Arguments, prog="python bench/gpu.py", description=__doc__)
    has_gpu = torch.cuda.is_available()
    needs_gpu = set(given.sections) - {"counts"}
    if needs_gpu and not (has_gpu or given.small):
        print(
            f"there is no GPU for the sections {', '.join(sorted(needs_gpu))}; --sections counts "
            "needs none, and --small tries this program on a CPU",
            file=sys.stderr,
        )
        return 1
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "torch": torch.__version__,
        "kernels": gpu_library.choice(device).reason if has_gpu else "none: a CPU",
        "cases": {},
        "operations": {},
    }

    def add(kind: str, name: str, found: dict[str, Any]) -> None:
        report[kind][name] = found
        if not given.json:
            show(name, found)

    def title(text: str) -> None:
        if not given.json:
            print(text, flush=True)

    title(f"{report['device']}, torch {report['torch']}, kernels: {report['kernels']}")
    if "network" in given.sections:
        title("training in a bare loop")
        for case in SMALL_CASES if given.small else CASES:
            add("cases", case.name, train_case(case, device, given.steps))
    if "inference" in given.sections:
        title("restoring whole pictures")
        for preset in ("tiny",) if given.small else ("paper", "official"):
            for name, found in infer(device, 64 if given.small else 512, preset, given.steps):
                add("cases", name, found)
    if "operations" in given.sections:
        title("operations, forward and backward, bf16")
        for name, found in gpu_operations.measure(device, given.steps, small=given.small):
            add("operations", name, found)
    if "system" in given.sections:
        from bench.gpu_system import run_system

        title("training in distributed.train")
        steps = 12 if given.small else 60
        for name, found in run_system(steps=steps, small=given.small, device=device.type):
            add("cases", name, found)
    if "counts" in given.sections:
        title("one step of paper 8x128 bf16, counted and not measured")
        report["counts"] = {}
        for name, found in gpu_counts.count(configs.tiny() if given.small else configs.paper()):
            add("counts", name, found)
    if "tune" in given.sections:
        title("other tile sizes")
        report["tune"] = {}
        for name, found in gpu_operations.tune(device, given.steps):
            add("tune", name, found)
    report["seconds"] = time.perf_counter() - STARTED
    if given.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{report['seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
