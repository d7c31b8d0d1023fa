"""Perceptual metrics by the real pyiqa, with made-up weights; skipped where it is not installed."""

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from distributed import iqa
from distributed.evaluate import main
from measnet.config import tiny
from measnet.network import MEASNet
from shards.packing import pack

needs_pyiqa = pytest.mark.skipif(find_spec("pyiqa") is None, reason="pyiqa is not installed")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub"


def test_missing_files_are_named_with_their_addresses(home: Path) -> None:
    missing = iqa.missing(["lpips", "niqe"])
    assert [(name, file.path) for name, file in missing] == [
        ("lpips", home / "checkpoints" / "alexnet-owt-7be5be79.pth"),
        ("lpips", home / "pyiqa" / "LPIPS_v0.1_alex-df73285e.pth"),
        ("niqe", home / "pyiqa" / "niqe_modelparameters.mat"),
    ]
    (home / "pyiqa").mkdir(parents=True)
    missing[2][1].path.write_bytes(b"")
    assert iqa.missing(["niqe"]) == [] and iqa.missing([]) == []


def test_the_command_refuses_before_it_restores(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MEASNet(tiny()).save_pretrained(tmp_path / "model.safetensors")
    given = [str(tmp_path / "model.safetensors"), "nowhere", "--iqa", "niqe", "musiq"]
    assert main([*given, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    if find_spec("pyiqa") is None:
        assert 'pip install "measnet-ray[iqa]"' in said
    else:
        assert f"{home}/pyiqa/niqe_modelparameters.mat from https://huggingface.co/" in said
        assert f"{home}/pyiqa/musiq_koniq_ckpt-e95806b9.pth" in said


@pytest.fixture
def weights(home: Path) -> Iterator[Path]:
    """Random weights of LPIPS and NIQE, in the files that pyiqa reads."""
    from scipy.io import savemat
    from torchvision.models import alexnet

    for _, file in iqa.missing(["lpips", "niqe"]):
        file.path.parent.mkdir(parents=True, exist_ok=True)
    backbone, own, prior = (file.path for _, file in iqa.missing(["lpips", "niqe"]))
    torch.save(alexnet().state_dict(), backbone)
    from pyiqa.archs.lpips_arch import LPIPS

    plain = LPIPS(pretrained=False)
    torch.save({k: v.abs() if "lin" in k else v for k, v in plain.state_dict().items()}, own)
    savemat(prior, {"mu_prisparam": np.ones((1, 36)), "cov_prisparam": np.eye(36)})
    yield home


@needs_pyiqa
def test_values_are_those_of_the_package(weights: Path) -> None:
    import pyiqa

    clean = torch.from_numpy(data.astronaut()[:200, :220] / 255).permute(2, 0, 1).float()[None]
    noisy = clean + torch.randn(2, *clean.shape[1:]) * torch.tensor([0.0, 0.1])[:, None, None, None]
    found = iqa.Perceptual(("lpips", "niqe"), "cpu")(noisy, clean)
    assert found["lpips"][0] == pytest.approx(0, abs=1e-6) and found["lpips"][1] > 1e-3
    for name, given in (("lpips", (clean,)), ("niqe", ())):
        metric = pyiqa.create_metric(name, device=torch.device("cpu"))
        expected = [float(metric(one[None].clamp(0, 1), *given)) for one in noisy]
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@needs_pyiqa
def test_the_command_adds_columns(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    Image.fromarray(data.coffee()[:128, :160]).save(tmp_path / "raw" / "coffee.png")
    pack("clean", str(tmp_path / "raw"), str(tmp_path / "shards"), workers=1)
    MEASNet(tiny()).save_pretrained(tmp_path / "model.safetensors")
    given = [str(tmp_path / "model.safetensors"), str(tmp_path / "shards"), "--device", "cpu"]
    assert main([*given, "--iqa", "lpips", "niqe"]) == 0
    assert "LPIPS (lower is better)" in " ".join(capsys.readouterr().out.split())
    rows = list(csv.DictReader((tmp_path / "evaluation" / "pictures.csv").open()))
    assert float(rows[2]["input_lpips"]) > float(rows[0]["input_lpips"]) > 0
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert set(summary["iqa"]["denoise_15"]) == {"lpips", "niqe"}
    assert summary["iqa"]["denoise_15"]["lpips"][0] == pytest.approx(
        float(rows[0]["input_lpips"]), abs=1e-6
    )
