"""What MEASNet takes on a GPU: steps, inference, operations, and what of it can only be counted.

    python bench/gpu.py                      # all sections, under 4 minutes
    python bench/gpu.py --json --sections network operations
    python bench/gpu.py --sections counts    # needs no GPU

Each time stands beside that of torch's own operations in the same run, the network's weights being
the same. `network` trains in a bare loop without Ray and DeepSpeed; `system` trains in
`distributed.train`. `counts` lists the launches and the memory traffic of one step, counted from
tensors that have sizes and no numbers: these figures are not measured. A part that fails is named
under `errors`, and the others go on.
"""

import contextlib
import gc
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from skimage import data
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gpu_counts, gpu_operations
from bench.gpu_steps import Training, build
from measnet import config as configs
from measnet.compile_ahead import compile_ahead, kernels_of_a_step
from measnet.errors import typed
from measnet.network import MEASNet
from measnet.ops import gpu_library
from measnet.ops.choice import torch_only
from measnet.tiling import full_precision

Section = Literal["network", "inference", "operations", "system", "counts", "tune"]
Found = Iterator[tuple[str, dict[str, Any]]]
"""Names, and the figures of each."""
GIB = 2**30
FAILED = "failed"
"""End of a figure's name: why there is none. Such a row counts among the errors."""
STARTED = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure on this machine's first GPU."""

    sections: tuple[Section, ...] = ("network", "inference", "operations", "system", "counts")
    """Parts to run; `tune` tries other tile sizes, and runs only if named."""
    json: bool = False
    """One JSON object instead of tables."""
    steps: int = 10
    """Steps that are timed."""
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


def train_case(case: Case, device: torch.device, steps: int) -> Found:
    """Milliseconds and memory of one step: fused with a CUDA graph, fused without, and torch's.

    `ms`: steps that follow each other, as in training; `alone_ms`: the median of steps that the
    host waits for, with their start; `compile_s`: compiling the kernels, as training does first.
    """
    found: dict[str, Any] = {}
    if device.type == "cuda" and gpu_library.choice(device).choice == "triton":
        started = time.perf_counter()
        wanted = {"micro_batch": case.batch, "crop": case.crop, "bf16": case.precision == "bf16"}
        compile_ahead(kernels_of_a_step(build(case.preset).config, **wanted), os.cpu_count() or 1)
        found["compile_s"] = time.perf_counter() - started
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
                found |= {f"{label}ms": None, f"{label}reason": "does not fit into this card"}
            except RuntimeError as error:  # the other labels can still be measured
                found |= {f"{label}ms": None, f"{label}{FAILED}": typed(error)}
            training = None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    ms = found.get("ms") or found.get("eager_ms")
    found["samples_per_s"] = case.batch / ms * 1e3 if ms else None
    yield case.name, found


def kernels(case: Case, device: torch.device) -> Found:
    """Kernels that a step starts without a graph, as torch's profiler sees them."""
    training = Training(build(case.preset), device, case.batch, case.crop, case.precision)
    for _ in range(2):
        training.step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        training.step()
        _wait(device)
    events = [one for one in seen.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    yield case.name, {"eager_kernels": len(events)}


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
    found = {
        f"{label}ms": _mean(step, steps, device) * 1e3,
        f"{label}alone_ms": _median(step, steps, device) * 1e3,
        f"{label}first_step_s": first,
    }
    if device.type == "cuda":
        found[f"{label}peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


PRECISIONS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "fp32": full_precision,
    "tf32": contextlib.nullcontext,
    "bf16": contextlib.nullcontext,
}
"""How pictures are restored: with fp32 all through, as `measnet.restore` does; with torch's
defaults, which are TF32 in convolutions; and in autocast."""


@torch.no_grad()
def infer(device: torch.device, side: int, preset: str, steps: int) -> Found:
    """A whole picture with noise through the network; `small` has trained weights.

    The quality is that of the kernels beside torch's own operations in fp32 all through.
    """
    model = MEASNet.from_pretrained("small") if preset == "small" else build(preset)
    model = model.to(device).eval()
    clean = torch.from_numpy(data.astronaut()[:side, :side] / 255).permute(2, 0, 1)[None].float()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * 25 / 255
    clean, image = clean.to(device), (clean + noise).to(device)
    with torch_only(), full_precision():
        exact = model(image).image
    for precision, context in PRECISIONS.items():
        found: dict[str, Any] = {}
        run = _inference(model, image, precision)
        for label, accelerated in (("", True), ("plain_", False)):
            with contextlib.nullcontext() if accelerated else torch_only(), context():
                restored = run()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                found[f"{label}ms"] = _median(run, steps, device) * 1e3
                if device.type == "cuda":
                    found[f"{label}peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            if accelerated:
                found["difference"] = (restored - exact).abs().max().item()
                found["db_from_fp32"] = _psnr(restored, clean) - _psnr(exact, clean)
        yield f"{preset} infer {side}x{side} {precision}", found


def _psnr(image: Tensor, clean: Tensor) -> float:
    return -10 * math.log10((image.clamp(0, 1) - clean).square().mean().item())


def _inference(model: torch.nn.Module, image: Tensor, precision: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(image).image.float()

    return run


def _mean(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds of one of `steps` that the host starts one behind the other."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    _wait(device)
    return (time.perf_counter() - start) / steps


def _median(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds of one that the host waits for before it starts the next."""
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


class Report:
    """What has been found so far; also shown line by line, beside JSON on stderr."""

    def __init__(self, device: torch.device, *, beside_json: bool) -> None:
        on_gpu = device.type == "cuda"
        self._device, self._file = device, sys.stderr if beside_json else sys.stdout
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "kernels": gpu_library.choice(device).reason if on_gpu else "none: a CPU",
            "cases": {},
            "operations": {},
            "errors": {},
        }

    def title(self, text: str) -> None:
        """Above the lines that follow."""
        print(text, file=self._file, flush=True)

    def attempt(self, kind: str, what: str, part: Callable[[], Found]) -> None:
        """Add what a part finds; if it fails, say so, and keep the figures of all others."""
        figures = self.found.setdefault(kind, {})
        try:
            for name, found in part():
                figures[name] = figures.get(name, {}) | found
                self._line(name, found)
                failed = {key: one for key, one in found.items() if key.endswith(FAILED)}
                self.found["errors"] |= {f"{name} {key}": one for key, one in failed.items()}
        except Exception as error:  # a card fails in many ways
            self.found["errors"][what] = typed(error)
            traceback.print_exc()
            self.title(f"  {what} failed: {self.found['errors'][what]}")
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _line(self, name: str, found: dict[str, Any]) -> None:
        figures = "  ".join(
            f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
        )
        self.title(f"  {name:<42} {figures}")


def run(given: Arguments, device: torch.device, report: Report) -> None:
    """All sections that are asked for."""
    found, small, steps = report.found, given.small, given.steps
    report.title(f"{found['device']}, torch {found['torch']}, kernels: {found['kernels']}")
    if "network" in given.sections:
        report.title("training in a bare loop")
        cases = SMALL_CASES if small else CASES
        for case in cases:
            report.attempt("cases", case.name, partial(train_case, case, device, steps))
        if device.type == "cuda":
            first = cases[0]
            report.attempt("cases", f"kernels of {first.name}", partial(kernels, first, device))
    if "inference" in given.sections:
        report.title("restoring whole pictures")
        for preset in ("tiny", "small") if small else ("paper", "official", "small"):
            part = partial(infer, device, 64 if small else 512, preset, steps)
            report.attempt("cases", f"{preset} infer", part)
    if "operations" in given.sections:
        report.title("operations, forward and backward, bf16")
        both = (gpu_operations.operations, gpu_operations.operations_of_official)
        for name, step in chain.from_iterable(some(device, small=small) for some in both):
            part = partial(gpu_operations.measure, name, step, device, steps)
            report.attempt("operations", name, part)
    if "system" in given.sections:
        report.title("training in distributed.train")
        report.attempt("cases", "system", partial(system, given, device, found["cases"]))
    if "counts" in given.sections:
        report.title("one step of paper 8x128 bf16, counted and not measured")
        config = configs.tiny() if small else configs.paper()
        report.attempt("counts", "counts", partial(gpu_counts.count, config))
    if "tune" in given.sections:
        report.title("other tile sizes")
        report.attempt("tune", "tune", partial(gpu_operations.tune, device, steps))


def system(given: Arguments, device: torch.device, cases: dict[str, Any]) -> Found:
    """The running system, and its share of the bare loop's speed where that was measured."""
    from bench.gpu_system import run_system

    bare = cases.get(CASES[0].name, {}).get("samples_per_s")
    steps = 12 if given.small else 60
    for name, found in run_system(steps=steps, small=given.small, device=device.type):
        yield name, found | ({"of_bare": found["samples_per_s"] / bare} if bare else {})


def main() -> int:
    """Command line; 1 where there is no GPU for a section that needs one, or a part failed."""
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
    report = Report(device, beside_json=given.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as `timeout` sends it
    try:
        run(given, device, report)
    finally:  # also if it is stopped
        report.found["seconds"] = time.perf_counter() - STARTED
        report.title(f"{report.found['seconds']:.0f} s in all")
        if given.json:
            print(json.dumps(report.found, indent=1))
    return 1 if report.found["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
