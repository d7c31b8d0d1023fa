"""What a training step takes of a card: its memory against the prediction, its time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from measnet.memory import Precision, predict
from tests.chaos import ROOT
from tests.gpu import loop

pytestmark = pytest.mark.gpu


def measure(gpu: torch.device, **options: Any) -> dict[str, float]:
    """The bare loop in a process of its own, so that nothing else counts."""
    arguments = [sys.executable, "-m", "tests.gpu.loop", "--device", gpu.type]
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name}")
        else:
            arguments += [f"--{name}", str(value)]
    # On a CPU the allocator would keep what was freed, and be measured instead.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.mark.parametrize(
    ("checkpointing", "batch", "kernels"), [(False, 8, False), (True, 16, False), (False, 8, True)]
)
def test_memory_is_what_was_predicted(
    gpu: torch.device,
    figure: Callable[[str, float], None],
    checkpointing: bool,
    batch: int,
    kernels: bool,
) -> None:
    preset, crop, tolerance = "paper", 128, 0.1
    precision: Precision = "bf16"
    kernels = kernels and gpu.type == "cuda"
    if gpu.type == "cpu":  # measures what the process holds, not what tensors take
        preset, batch, crop, precision, tolerance = "tiny", batch // 4, 64, "fp32", 0.2
    options = {
        **{"preset": preset, "precision": precision},
        **{"checkpointing": checkpointing, "kernels": kernels},
    }
    measured = measure(gpu, **options, batch=batch, crop=crop, steps=3)["peak"]
    memory = predict(
        loop.network(preset), precision=precision, checkpointing=checkpointing, kernels=kernels
    )
    predicted = memory.total(batch, crop)
    name = f"{preset}_{batch}x{crop}_{precision}{'_checkpointing' if checkpointing else ''}"
    name += "_kernels" if kernels else ""
    figure(f"{name}_gib", measured / 2**30)
    figure(f"{name}_gib_predicted", predicted / 2**30)
    assert measured == pytest.approx(predicted, rel=tolerance)


def test_what_repeating_exactly_costs(
    gpu: torch.device, figure: Callable[[str, float], None]
) -> None:
    options: dict[str, Any] = {"preset": "paper", "batch": 8, "crop": 128}
    if gpu.type == "cpu":
        options = {"preset": "tiny", "batch": 1, "crop": 32, "precision": "fp32", "steps": 2}
    free, exact, again = (measure(gpu, **options, deterministic=on) for on in (False, True, True))
    name = f"{options['preset']}_{options['batch']}x{options['crop']}_samples_per_s"
    figure(name, free["samples_per_s"])
    figure(f"{name}_deterministic", exact["samples_per_s"])
    assert exact["loss"] == again["loss"]
    assert free["loss"] == pytest.approx(exact["loss"], rel=0.02)
