"""Steps that are recorded for torch's profiler."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from distributed.config import TrainConfig
from distributed.profiling import Profiling
from shards.storage import list_names, read

CPU = torch.device("cpu")


def train(
    storage: str, asked: int, steps: int, *, rank: int = 0, device: torch.device = CPU
) -> list[str]:
    """Make steps, of which the n-th one is named `step n` in a trace; the lines that are shown."""
    said: list[str] = []
    config = TrainConfig(storage=storage, name="run", profile=asked)
    profiling = Profiling(config, rank, device, said.append)
    layer = torch.nn.Linear(8, 8, device=device)
    for step in range(1, steps + 1):
        with torch.profiler.record_function(f"step {step}"):
            layer(torch.rand(4, 8, device=device)).sum().backward()
        profiling.after_step(last=step == steps)
    return said


def recorded(run: str) -> list[str]:
    """The steps in a trace."""
    events = json.loads(read(f"{run}/profile/trace.json"))["traceEvents"]
    found = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name for name in found if name.startswith("step "))


@pytest.mark.parametrize(
    ("asked", "made", "steps"),
    [(2, 8, ["step 4", "step 5"]), (9, 5, ["step 4", "step 5"]), (1, 4, ["step 4"])],
)
@pytest.mark.parametrize("bucket", [False, True])
def test_steps_after_the_warm_ones_are_recorded(
    asked: int, made: int, steps: list[str], bucket: bool, tmp_path: Path
) -> None:
    storage = f"memory://profiles/{asked}-{made}" if bucket else str(tmp_path)
    run = f"{storage}/run"
    said = train(storage, asked, made)
    assert recorded(run) == steps
    assert list_names(f"{run}/profile") == ["trace.json"]
    (line,) = said
    assert f"{len(steps)} steps" in line and f"{run}/profile/trace.json" in line
    assert "https://ui.perfetto.dev" in line


def test_nothing_is_recorded_unless_asked(tmp_path: Path) -> None:
    assert not train(str(tmp_path), 0, 5)
    assert not train(str(tmp_path), 2, 8, rank=1)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    said = train(str(tmp_path), 2, 3)
    assert "ended after 3 steps" in said[0] and not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    said = train(str(tmp_path), 1, 5)
    assert "could not be written" in said[0]


@pytest.mark.gpu
def test_memory_of_a_gpu(gpu: torch.device, tmp_path: Path) -> None:
    if gpu.type != "cuda":
        pytest.skip("torch records the memory of CUDA alone")
    said = train(str(tmp_path), 2, 6, device=gpu)
    memory = pickle.loads((tmp_path / "run" / "profile" / "memory.pickle").read_bytes())
    assert any(memory["device_traces"]) and "https://pytorch.org/memory_viz" in said[0]
