"""Pictures through the command line: sizes, tiles, folders, wrong files."""

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


def test_at_once_is_the_network_clamped(model: MEASNet) -> None:
    batch = torch.rand(2, 3, 21, 30)
    with torch.no_grad():
        expected = model(batch).image.clamp(0, 1)
    torch.testing.assert_close(restore(model, batch), expected)
    torch.testing.assert_close(restore(model, batch[0]), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restore(model, batch, tile=30, overlap=4), expected)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, 0), (17, 16), (64, 20)])
def test_tiles_cover_the_picture_once(tile: int, overlap: int) -> None:
    """With a network that gives back its input, blended tiles are the picture itself."""
    sizes = []

    class Same(torch.nn.Linear):
        def forward(self, image):  # type: ignore[no-untyped-def,override]
            sizes.append(tuple(image.shape[-2:]))
            return type("R", (), {"image": image})

    image = torch.rand(2, 3, 75, 50)
    out = restore(Same(1, 1), image, tile=tile, overlap=overlap)  # type: ignore[arg-type]
    torch.testing.assert_close(out, image)
    assert max(max(size) for size in sizes) <= tile  # memory is bounded


def test_tiles_are_near_the_whole(model: MEASNet) -> None:
    image = torch.rand(3, 70, 90)
    whole, tiled = restore(model, image), restore(model, image, tile=48, overlap=16)
    assert (whole - tiled).abs().mean() < 0.25 * (whole - image).abs().mean()


def test_wrong_arguments(model: MEASNet) -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        restore(model, torch.rand(1, 20, 20))
    with pytest.raises(ValueError, match="overlap is 32"):
        restore(model, torch.rand(3, 20, 20), tile=32, overlap=32)


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
