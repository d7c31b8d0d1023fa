import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from distributed import demo
from distributed.demo import (
    describe_device,
    main,
    own_pictures,
    packaged_pictures,
    scaling_for,
    split,
)
from distributed.train import ui_command
from tests.machines import MACHINES


def save(folder: Path, count: int, size: tuple[int, int] = (160, 120)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(count):
        left = 20 * at
        part = Image.fromarray(data.coffee()[:300, left : left + 300])
        part.resize(size).save(folder / f"p{at:02d}.png")


@pytest.mark.parametrize(
    ("machine", "workers", "device", "described"),
    [
        ("no GPU", "2", "cpu", "trains on the CPU with 2 workers"),
        ("old driver", "2", "cpu", "(the GPU driver is 535.104.05"),
        ("8 GB", "1", "gpu", "trains on 1 GPU: NVIDIA GeForce RTX 3050"),
        ("T4", "1", "gpu", "trains on 1 GPU: Tesla T4"),
        ("8 H100", "2", "gpu", "trains on 2 GPUs: NVIDIA H100 80GB HBM3"),
    ],
)
def test_the_demo_takes_what_the_machine_has(
    machine: str, workers: str, device: str, described: str
) -> None:
    scaling = scaling_for(MACHINES[machine])
    assert (scaling.workers, scaling.device) == (workers, device)
    assert described in describe_device(MACHINES[machine])


def test_photographs_come_with_the_packages() -> None:
    found = packaged_pictures()
    assert {name: p["picture"].shape for name, p in found.items()} == {
        "astronaut": (512, 512, 3),
        "chelsea": (300, 451, 3),
        "coffee": (400, 600, 3),
        "rocket": (427, 640, 3),
        "china": (427, 640, 3),
        "flower": (427, 640, 3),
        "hopper": (600, 512, 3),
        "motorcycle": (500, 741, 3),
    }
    assert all(p["picture"].dtype == np.uint8 for p in found.values())
    assert found["motorcycle"]["disparity"].shape == (500, 741)


def test_held_out_pictures_are_packaged_ones_and_never_trained_on() -> None:
    names = split(sorted(packaged_pictures()))
    assert set(names.test) == {"astronaut", "motorcycle"} and names.validation == ["hopper"]
    assert len(names.train) == 5 and not {"astronaut", "motorcycle", "hopper"} & set(names.train)


@pytest.mark.parametrize("count", [3, 4, 7, 8, 24])
def test_split_of_other_pictures(count: int) -> None:
    names = [f"p{at:02d}" for at in range(count)]
    train, validation, test = split(names)
    assert sorted(train + validation + test) == names
    assert 1 <= len(test) <= demo.MOST_TEST and train and len(validation) == 1


def test_own_pictures_are_brought_to_size(tmp_path: Path) -> None:
    save(tmp_path, 1, (2000, 1000))
    Image.fromarray(data.camera()).save(tmp_path / "grey.png")
    Image.fromarray(data.chelsea()).convert("RGBA").save(tmp_path / "deep.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(data.rocket()).save(tmp_path / "sub" / "photo.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = own_pictures(tmp_path)
    shapes = sorted(p["picture"].shape for p in found.values())
    assert shapes == [(300, 451, 3), (384, 768, 3), (427, 640, 3), (512, 512, 3)]


def test_many_pictures_are_thinned_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for at in range(50):
        picture = rng.integers(0, 256, (100, 100, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"p{at:02d}.png")
    found = own_pictures(tmp_path)
    assert len(found) == demo.MOST_PICTURES
    assert next(iter(found)) == "000_p00" and list(found)[-1] == "023_p49"


def wrong(tmp_path: Path, kind: str) -> Path:
    folder = tmp_path / "photographs"
    save(folder, 3)
    match kind:
        case "no folder":
            return tmp_path / "nowhere"
        case "empty":
            (tmp_path / "empty").mkdir()
            return tmp_path / "empty"
        case "two":
            save(tmp_path / "two", 2)
            return tmp_path / "two"
        case "truncated":
            whole = (folder / "p01.png").read_bytes()
            (folder / "p01.png").write_bytes(whole[: len(whole) // 2])
        case "no picture":
            (folder / "p01.png").write_text("no picture")
        case "small":
            save(folder, 3, (60, 200))
        case "twice":
            (folder / "z.png").write_bytes((folder / "p00.png").read_bytes())
        case "own":
            own = tmp_path / "data" / "demo" / "pictures"
            save(own, 3)
            return own
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "is not a folder"),
        ("empty", "holds 0 pictures"),
        ("two", "holds 2 pictures"),
        ("truncated", "p01.png cannot be read"),
        ("no picture", "p01.png cannot be read"),
        ("small", "p00.png is 60x200 pixels"),
        ("twice", "are the same picture"),
        ("own", "which the demo removes"),
    ],
)
def test_wrong_pictures_are_one_line_and_exit_code_2(
    kind: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/earlier").touch()
    folder = wrong(tmp_path, kind)
    assert main(["--pictures", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert (tmp_path / "data/demo/earlier").exists()  # nothing was removed before the check


def test_packing_keeps_the_sides_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from shards import manifest
    from shards.stream import pictures

    monkeypatch.chdir(tmp_path)
    found = packaged_pictures()
    small = {
        name: {kind: array[:128, :160] for kind, array in found[name].items()}
        for name in ("rocket", "coffee", "hopper", "motorcycle")
    }
    names = demo.Split(["coffee", "rocket"], ["hopper"], ["motorcycle"])
    demo._start_from_nothing()
    demo._write_pictures(small, names)
    demo._pack(Console(quiet=True), names)
    counts = manifest.read("data/demo/shards/train").counts
    assert counts == dict.fromkeys(("denoise", *demo.SYNTHESISED), 2 * len(demo.SCALES))
    test = list(pictures("data/demo/shards/test"))
    assert {p.task for p in test} == {"denoise", *demo.SYNTHESISED} and len(test) == 14
    for side in (128, 96):  # the third copy would be too small
        copies = [
            (p.clean * 255).round().byte().permute(1, 2, 0).numpy()
            for p in test
            if p.clean.shape[1] == side
        ]
        assert len(copies) == 7
        if side == 128:  # held out as it is, to the pixel
            for copy in copies:
                assert np.array_equal(copy, small["motorcycle"]["picture"])
    assert manifest.read("data/demo/shards/validation").counts["derain"] == 1


def test_ui_command() -> None:
    command = ui_command("sqlite:////here/mlflow.db")
    assert "--host 127.0.0.1" in command
    assert command.endswith("--backend-store-uri sqlite:////here/mlflow.db")
    assert ui_command("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert ui_command("sqlite:////my files/mlflow.db").endswith(" 'sqlite:////my files/mlflow.db'")


def test_a_deep_grey_picture_keeps_its_brightness(tmp_path: Path) -> None:
    grey = np.full((300, 320), 257 * 100, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (demo._read(tmp_path / "a.png") == 100).all()


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` on the packaged photographs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([]) == 0
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    tasks = summary["tasks"]
    assert set(tasks) == {"denoise", "derain", "dehaze", "deblur", "lowlight"}
    gains = {task: row["restored_psnr"] - row["input_psnr"] for task, row in tasks.items()}
    assert np.mean(list(gains.values())) >= 3 and gains["denoise"] >= 4
    assert min(gains.values()) >= 0
    assert summary["mlflow_run_id"] and summary["seconds"]["train"] > 0
    assert (tmp_path / "mlflow.db").exists()
    assert "astronaut" in (tmp_path / "runs/demo/report.html").read_text()
    for name in ("grids/derain.png", "experts.png", "curves.png", "pictures.csv"):
        assert (tmp_path / "runs/demo/evaluation" / name).exists()
