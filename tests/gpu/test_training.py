"""Training by Ray and DeepSpeed on a card: kill and resume, workers on the CPU, other cards."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distributed.mlflow_tracker import read_metrics
from tests import chaos

pytestmark = pytest.mark.gpu

Figure = Callable[[str, float], None]
CONTEXT = 64 * 2**20
"""A process that opens a card takes several times these bytes of it."""
STEPS = 30
"""Of each run."""
LONGER = 100 if torch.cuda.is_available() else STEPS
"""Of runs that are killed: enough that they are not over before."""
OPTIONS = (
    *("--scaling.workers", "1", "--scaling.device", "auto", "--data.crop", "48"),
    # At the demo's rate a difference of rounding grows threefold with every step.
    *("--recipe.samples", str(STEPS * chaos.BATCH), "--recipe.lr", "2e-4"),
    *("--engine.compile", "off"),  # would take longer than all else here
)


@pytest.fixture
def start(tmp_path: Path, packed: Path) -> Callable[..., chaos.Run]:
    """Starts a run of `STEPS`, with a checkpoint after every fifth, in a folder by its name."""

    def run(name: str, *more: str) -> chaos.Run:
        (tmp_path / name).mkdir()
        return chaos.Run(tmp_path / name, packed, {"RAY_AUTH_MODE": "disabled"}, *OPTIONS, *more)

    return run


def log(run: chaos.Run) -> str:
    return Path(run.log.name).read_text()


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all weights, over their norm."""
    squares = [((one[n] - other[n]).square().sum(), one[n].square().sum()) for n in one]
    between, own = (torch.stack(part).double().sum() for part in zip(*squares, strict=True))
    return (between / own).sqrt().item()


def test_a_killed_worker_changes_nothing(
    gpu: torch.device, figure: Figure, start: Callable[..., chaos.Run], tmp_path: Path
) -> None:
    """The killed runs resume from a checkpoint."""
    del gpu  # there is one, or this is tried on a CPU
    samples = ("--recipe.samples", str(LONGER * chaos.BATCH))
    deterministic = ("--engine.deterministic", "on", *samples)
    runs = {"undisturbed": start("undisturbed", *deterministic)}
    for name, options in (("killed", deterministic), ("killed-not-exact", samples)):
        runs[name] = start(name, *options)
        assert runs[name].wait_for_step(13), log(runs[name])
        chaos.worker(runs[name], None, random.Random(0))
    ends = {}
    for name, run in runs.items():
        assert run.end() == 0, log(run)
        assert ("resumed from checkpoint" in log(run)) == name.startswith("killed")
        ends[name] = chaos.final_state(tmp_path / name)
        speeds = [r["metrics"].get("speed/samples_per_s") for r in read_metrics(run.folder)]
        figure(f"tiny_{name}_samples_per_s", [speed for speed in speeds if speed][-1])
    assert ends["undisturbed"]["samples"] == LONGER * chaos.BATCH
    assert chaos.difference(ends["undisturbed"], ends["killed"]) == ""
    between = distance(ends["undisturbed"]["weights"], ends["killed-not-exact"]["weights"])
    figure("weights_after_a_kill_not_exact", between)
    assert between < 1e-3 * LONGER / STEPS


def test_workers_on_the_cpu_leave_the_card_alone(
    gpu: torch.device, figure: Figure, start: Callable[..., chaos.Run]
) -> None:
    def free() -> int:
        return torch.cuda.mem_get_info()[0] if gpu.type == "cuda" else 0

    before = least = free()
    run = start("cpu", "--scaling.device", "cpu", "--scaling.workers", "2")

    def over() -> bool:
        nonlocal least
        least = min(least, free())
        return run.process.poll() is not None

    run.wait_for(over)
    assert run.end() == 0, log(run)
    assert run.step() == STEPS
    figure("mib_taken_by_workers_on_the_cpu", (before - least) / 2**20)
    assert before - least < CONTEXT


TRACK = """
import subprocess, sys, tempfile, time
from pathlib import Path
import torch
from distributed.mlflow_tracker import Tracker, read_metrics
from distributed.run_log import RunLog
def used():
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return list(map(int, subprocess.check_output(command, text=True).split()))
torch.ones(1, device="cuda")
before, folder = used(), Path(tempfile.mkdtemp())
tracker = Tracker(RunLog(str(folder), 0), None, every_s=0.05)
while not any("system/" in name for r in read_metrics(folder) for name in r["metrics"]):
    time.sleep(0.05)
after = used()
tracker.close()
print(*(b - a for a, b in zip(before, after)))
"""


def test_the_tracker_opens_no_other_card(gpu: torch.device, figure: Figure) -> None:
    if gpu.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs a machine with two GPUs")
    command = [sys.executable, "-c", TRACK]
    done = subprocess.run(
        command, cwd=chaos.ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    _first, *others = map(int, done.stdout.split())
    figure("mib_taken_by_the_tracker_on_other_cards", max(others))
    assert max(others) * 2**20 < CONTEXT
