"""`--dry-run`: what is printed can be run, and nothing is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed.config import ScalingConfig, TrainConfig, from_yaml
from distributed.dry_run import dry_run
from distributed.presets import PRESETS
from distributed.train import main
from measnet.hardware import Card, Machine

GIB = 2**30
LAPTOP = Machine(cores=8)
H100 = Machine(cores=16, cards=(Card(name="H100", memory=80 * GIB, capability=(9, 0)),))
T4 = Machine(cores=4, cards=(Card(name="T4", memory=15 * GIB, capability=(7, 5)),))


@pytest.mark.parametrize(
    ("machine", "device", "workers", "lines"),
    [
        (LAPTOP, "auto", "2", ["device: cpu (there is no GPU)", "precision: fp32", "kernels: "]),
        (LAPTOP, "cpu", "2", ["device: cpu (scaling.device is cpu)", "accumulation: 4 "]),
        (H100, "auto", "1", ["device: cuda (H100)", "precision: bf16", "accumulation: 8 "]),
        (T4, "gpu", "1", ["precision: fp32 (T4 has no bf16", "others: open (the workers decide"]),
        (None, "auto", "2", ["device: open (the cluster"]),
        (None, "gpu", "2", ["device: cuda", "others: open"]),
        (None, "cpu", "1..8", ["accumulation: 1 (for 8 workers"]),
    ],
)
def test_known_decisions_are_shown(
    machine: Machine | None, device: str, workers: str, lines: list[str]
) -> None:
    scaling = ScalingConfig(workers=workers, device=device)  # type: ignore[arg-type]
    config = TrainConfig(scaling=scaling)
    text = dry_run(config, machine)
    for line in lines:
        assert f"# {line}" in text
    assert from_yaml(text) == config


def test_the_command_starts_nothing_and_prints_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--recipe.lr", "1e-4", "--dry-run"]) == 0
    config = from_yaml(capsys.readouterr().out)
    assert config.recipe.lr == 1e-4 and config.model == PRESETS["demo"]().model
    assert config.storage == str(tmp_path / "runs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_command_imports_no_ray_and_refuses_a_missing_gpu(device: str) -> None:
    """In a process of its own: other tests start a Ray in this one, which counts as a cluster."""
    code = (
        "import sys; from distributed.train import main; "
        f"status = main(['demo', '--dry-run', '--scaling.device', '{device}']); "
        "sys.exit(status + ('ray' in sys.modules))"
    )
    root = Path(__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    refused = device == "gpu" and not torch.cuda.is_available()
    assert run.returncode == (2 if refused else 0), run.stderr
    assert ("scaling.device" in run.stderr) == refused
