"""Pictures through the command line: folders, wrong files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from measnet import config as configs
from measnet import restore as module
from measnet.config import replace_dotted
from measnet.network import MEASNet
from measnet.restore import main, restore


@pytest.fixture(scope="module")
def model() -> MEASNet:
    torch.manual_seed(0)
    network = MEASNet(replace_dotted(configs.tiny(), {"dim": 8}))
    return network.eval()


@pytest.fixture
def weights(model: MEASNet, tmp_path: Path) -> str:
    path = tmp_path / "weights.safetensors"
    model.save_pretrained(path)
    return str(path)


def save(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_file(model: MEASNet, weights: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", 19, 33)
    assert main([str(source), str(tmp_path / "out.png"), "--weights", weights]) == 0
    expected = (restore(model, module.read_picture(source)) * 255).round()
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (33, 19)
        ours = torch.from_numpy(np.asarray(out).copy()).permute(2, 0, 1)
    assert (ours - expected).abs().max() <= 1
    assert not list(tmp_path.glob(".*"))


def test_a_folder_keeps_its_structure(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a.jpg", 20, 24), save(folder / "b" / "grey.png", 16, 40, "L")
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    assert (
        main([str(folder), str(out), "--weights", weights, "--tile", "24", "--overlap", "8"]) == 2
    )
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert written == ["a.png", "b/grey.png"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "broken.png" in message


def test_wrong_inputs_are_one_line(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "twice" / "a.png", 16, 16), save(tmp_path / "twice" / "a.jpg", 16, 16)
    picture = str(save(tmp_path / "picture.png", 16, 16))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for source, file, expected in (
        ("nowhere", weights, "no file or folder"),
        ("empty", weights, "no pictures"),
        ("twice", weights, "both"),
        (picture, "nowhere.ckpt", "no file"),
        (picture, str(tmp_path / "bad.safetensors"), "whole safetensors"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / "out"), "--weights", file]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and expected in message


def test_real_pictures(weights: str, real_pictures: Path, tmp_path: Path) -> None:
    sources = sorted(p for p in real_pictures.rglob("*") if p.suffix in module.SUFFIXES)
    source = min(sources, key=lambda p: p.stat().st_size)
    assert main([str(source), str(tmp_path), "--weights", weights, "--tile", "256"]) == 0
    with Image.open(tmp_path / f"{source.stem}.png") as out, Image.open(source) as original:
        assert out.size == original.size
