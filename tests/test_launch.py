"""What is refused before a run starts on this machine alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed.config import ScalingConfig, TrainConfig
from distributed.launch import refuse_missing_gpu
from measnet.hardware import Card, Machine
from tests.test_train import ROOT, command

CARD = Card(name="NVIDIA T4", memory=16 * 2**30, capability=(7, 5))


def asking(device: str, workers: str) -> TrainConfig:
    return TrainConfig(scaling=ScalingConfig(device=device, workers=workers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "workers", "cards", "message"),
    [
        ("gpu", "1", 0, "gpu and scaling.workers is 1, but this machine has no GPU that torch "),
        ("gpu", "4", 1, "scaling.workers is 4, but this machine has only 1 of 4 GPUs"),
        ("gpu", "2..8", 1, "scaling.workers is 2..8, but this machine has only 1 of 2 GPUs"),
        ("gpu", "1..8", 1, ""),
        ("gpu", "4", 4, ""),
        ("auto", "1", 0, ""),
        ("cpu", "1", 0, ""),
    ],
)
def test_gpus_that_are_not_there(device: str, workers: str, cards: int, message: str) -> None:
    machine = Machine(cores=2, cards=(CARD,) * cards)
    if not message:
        refuse_missing_gpu(asking(device, workers), machine)
        return
    with pytest.raises(ValueError, match=message) as refused:
        refuse_missing_gpu(asking(device, workers), machine)
    assert "--scaling.device cpu" in str(refused.value)


def test_the_reason_is_told() -> None:
    machine = Machine(cores=2, problem="the GPU driver is 470, but torch needs 580 or newer")
    with pytest.raises(ValueError, match="the GPU driver is 470, but torch needs 580 or newer"):
        refuse_missing_gpu(asking("gpu", "1"), machine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_without_a_gpu_is_refused_before_anything_is_made(
    packed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distributed.train", *command(packed, "--scaling.device", "gpu")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: scaling.device is gpu and scaling.workers is 1, but")
    assert not list(tmp_path.iterdir())
