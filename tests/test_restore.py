"""Pictures through the command line: sizes, tiles, folders, wrong files."""

import copy
from pathlib import Path, PurePath

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from distributed.launch import MODEL
from measnet import config as configs
from measnet import decoding
from measnet import restore as module
from measnet.config import replace_dotted
from measnet.network import MEASNet
from measnet.restore import main
from measnet.tiling import restore
from measnet.weights import OF_A_RUN, load_weights


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


def run(source: Path, target: Path, weights: str, *options: str) -> int:
    return main([str(source), str(target), "--weights", weights, *options])


def test_a_file(model: MEASNet, weights: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", 19, 33)
    assert run(source, tmp_path / "out.png", weights) == 0
    expected = (restore(model, decoding.read(source).tensor()) * 255).round()
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (33, 19)
        ours = torch.from_numpy(np.asarray(out).copy()).permute(2, 0, 1)
    assert (ours - expected).abs().max() <= 1
    assert not list(tmp_path.glob(".*"))


def test_a_network_without_residual_gives_back_the_file(model: MEASNet, tmp_path: Path) -> None:
    same = copy.deepcopy(model)
    torch.nn.init.zeros_(same.output.weight)
    same.save_pretrained(tmp_path / "same.safetensors")
    random = np.random.default_rng(0)
    pixels = {}
    for kind in ("uint8", "uint16"):
        for channels in (1, 2, 3, 4):
            picture = random.integers(0, np.iinfo(kind).max, (40, 21, channels), dtype=kind)
            name = f"{kind}-{channels}.png"
            pixels[name] = picture[..., 0] if channels == 1 else picture
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(imagecodecs.png_encode(pixels[name]))
    weights = str(tmp_path / "same.safetensors")
    tiles = ("--tile", "32", "--overlap", "8")
    assert run(tmp_path / "in", tmp_path / "out", weights, *tiles) == 0
    for name, expected in pixels.items():
        written = imagecodecs.png_decode((tmp_path / "out" / name).read_bytes())
        assert written.dtype == expected.dtype
        np.testing.assert_array_equal(written, expected)


def test_a_folder_keeps_its_structure_and_continues_after_failures(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "same.jpg", 20, 24), save(folder / "same.png", 20, 24)
    save(folder / "b" / "gr\u00fcn 1 [x].png", 16, 40, "L")
    save(folder / ".hidden.png", 16, 16)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    (folder / "empty.jpg").touch()
    options = ("--tile", "24", "--overlap", "8")
    assert run(folder, out, weights, *options) == 1
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert written == ["b/gr\u00fcn 1 [x].png", "same.jpg.png", "same.png"]
    with Image.open(out / written[0]) as grey:
        assert grey.mode == "L"
    said = capsys.readouterr()
    assert "2 other files" in said.out and "restored 3 of 5 pictures" in said.out
    assert "gr\u00fcn 1 [x].png 40x16 -> " in said.out
    end = said.err[said.err.index("2 not restored:") :]
    assert "broken.png" in end and "empty.jpg" in end
    save(folder / "broken.png", 16, 16)
    assert run(folder, out, weights, *options, "--skip-existing") == 1
    assert "3 results exist already" in capsys.readouterr().out and (out / "broken.png").exists()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError, OSError])
def test_a_picture_without_memory_does_not_stop_the_others(
    error: type[Exception],
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The errors of the allocators cannot be had from a small picture: raised where they arise."""
    save(tmp_path / "in" / "large.png", 24, 24), save(tmp_path / "in" / "small.png", 16, 16)
    forward = MEASNet.forward

    def limited(self: MEASNet, image: torch.Tensor, **options: object) -> object:
        if image.shape[-1] > 16:
            raise error("no room\nfor it")
        return forward(self, image, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MEASNet, "forward", limited)
    assert run(tmp_path / "in", tmp_path / "out", weights) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small.png"]
    said = capsys.readouterr().err
    assert "large.png could not be restored: no room" in said
    assert ("--tile" in said) == (error is not OSError)


def test_a_failed_write_leaves_nothing(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = save(tmp_path / "a.png", 16, 16), tmp_path / "out"

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(source, out, weights) == 1
    assert not list(out.iterdir())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (3, 15), (70, 2)])
def test_tiny_and_thin_pictures(height: int, width: int, weights: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", height, width)
    assert run(source, tmp_path / "out", weights, "--tile", "64") == 0
    with Image.open(tmp_path / "out" / "a.png") as out:
        assert out.size == (width, height)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.jpg"], ["a.png"]),
        (["a.tif", "a.PNG", "a.jpg"], ["a.tif", "a.PNG", "a.jpg.png"]),
        (["same.jpg", "same.png"], ["same.jpg.png", "same.png"]),
        (["a.jpg", "a.webp", "b.bmp"], ["a.jpg.png", "a.webp.png", "b.png"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a-2.png", "a.jpg.png", "a.png"]),
        (["A.png", "a.png"], ["A.png", "a-2.png"]),
        (["x/a.jpg", "y/a.png"], ["x/a.png", "y/a.png"]),
    ],
)
def test_names_of_results(files: list[str], expected: list[str]) -> None:
    assert [str(p) for p in module.result_names([PurePath(f) for f in files])] == expected


def test_nothing_is_overwritten_unasked(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save(tmp_path / "in" / "a.png", 16, 16), tmp_path / "out.png"
    out.write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "hard.png").hardlink_to(source)
    before = source.read_bytes()
    for target, expected in (
        (out, "--force"),
        (source, "would overwrite the input"),
        (source.parent, "would overwrite the input"),
        (tmp_path / "link" / "a.png", "would overwrite the input"),
        (tmp_path / "hard.png", "would overwrite the input"),
    ):
        options = [] if target == out else ["--force"]
        assert run(source, target, weights, *options) == 2
        assert expected in capsys.readouterr().err
    for target in (source.parent, source.parent / "new", tmp_path / "link"):
        assert run(source.parent, target, weights, "--force") == 2
        assert "folder outside it" in capsys.readouterr().err
    assert out.read_text() == "old" and source.read_bytes() == before
    assert [p.name for p in source.parent.iterdir()] == ["a.png"]
    assert run(source, out, weights, "--force") == 0 and out.read_bytes()[:4] == b"\x89PNG"


def test_wrong_inputs_are_one_line(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").touch()
    picture = str(save(tmp_path / "picture.png", 16, 16))
    save(tmp_path / "folder" / "a.png", 16, 16)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for source, out, options, expected in (
        ("nowhere", "out", [], "no file or folder"),
        ("empty", "out", [], "no pictures"),
        ("folder", "out.png", [], "must be a folder, not a file"),
        ("folder", "a-file", [], "must be a folder, not a file"),
        (picture, "out.xyz", [], ".xyz; known are .png"),
        (picture, "a-file/out", [], "a-file"),
        (picture, "out", ["--tile", "-1"], "--tile is -1"),
        (picture, "out", ["--memory", "0.1"], "--memory is 0.1 GB"),
        (picture, "out", ["--force", "--skip-existing"], "exclude each other"),
        (picture, "out", ["--precision", "bf16", "--device", "cpu"], "bf16 needs a GPU of"),
        (picture, "out", ["--weights", "nowhere.ckpt"], "no file"),
        (picture, "out", ["--weights", str(tmp_path / "bad.safetensors")], "complete safetensors"),
    ):
        assert run(tmp_path / source, tmp_path / out, weights, *options) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.xyz").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_no_gpu_is_one_line(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.png", 16, 16)
    assert run(source, tmp_path / "out", weights, "--device", "cuda") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--device cpu" in message


def test_a_run_folder_names_its_weights(model: MEASNet, tmp_path: Path) -> None:
    """Folders as distributed.launch and distributed.checkpoint make them."""
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no file or run folder"):
        load_weights(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="no checkpoints"):
        load_weights(folder)
    (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"distributed.checkpoint export .*run model.safetensors"):
        load_weights(folder)
    model.save_pretrained(folder / "model.safetensors")
    loaded = load_weights(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert OF_A_RUN == MODEL


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    for name in ("other.safetensors", "other.pth"):
        path = tmp_path / name
        entries = {"conv.weight": torch.zeros(1)}
        save_file(entries, path) if name.endswith("s") else torch.save(entries, path)
        with pytest.raises(ValueError, match=f"{name} has no weights of this or of the authors"):
            load_weights(path)


def test_real_pictures(weights: str, real_pictures: Path, tmp_path: Path) -> None:
    sources = sorted(p for p in real_pictures.rglob("*") if p.suffix in module.SUFFIXES)
    source = min(sources, key=lambda p: p.stat().st_size)
    assert main([str(source), str(tmp_path), "--weights", weights, "--tile", "256"]) == 0
    with Image.open(tmp_path / f"{source.stem}.png") as out, Image.open(source) as original:
        assert out.size == original.size
