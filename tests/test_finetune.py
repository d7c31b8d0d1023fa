"""Weights to start from, and fine-tuning on a folder of photographs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage import data

from distributed import finetune
from distributed.demo import Split
from distributed.finetune import Arguments, configuration, main, pack_photos, split
from distributed.initial import check_architecture, start_from
from distributed.launch import resolve
from distributed.presets import demo
from measnet.config import replace_dotted, tiny
from measnet.network import MEASNet
from shards import packing
from shards.manifest import Manifest


def photos(folder: Path, count: int) -> Path:
    (folder / "sub").mkdir(parents=True)
    for at in range(count):
        part = data.coffee()[40 * at % 200 :, 30 * at % 300 :][:120, :150]
        Image.fromarray(part).save(folder / ("sub" if at % 2 else "") / f"p{at:02d}.png")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(5)
    path = tmp_path / "model.safetensors"
    MEASNet(tiny()).save_pretrained(path)
    return str(path)


def test_a_new_network_gets_the_weights(weights: str) -> None:
    model = MEASNet(tiny())
    start_from(weights, model)
    expected = MEASNet.from_pretrained(weights).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_another_architecture_is_refused_by_field(weights: str) -> None:
    with pytest.raises(ValueError, match=r"model\.pixel_experts differ"):
        check_architecture(weights, replace_dotted(tiny(), {"pixel_experts": 6}))
    check_architecture(weights, replace_dotted(tiny(), {"expert_path": "dense"}))


def test_the_shipped_weights_keep_their_name_and_others_get_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(dataclasses.replace(demo(), init="small")).init == "small"
    assert resolve(dataclasses.replace(demo(), init="")).init == ""
    assert resolve(dataclasses.replace(demo(), init="a.pth")).init == str(tmp_path / "a.pth")
    check_architecture("small", tiny())
    (tmp_path / "small").mkdir()  # a run of that name
    assert resolve(dataclasses.replace(demo(), init="small")).init == str(tmp_path / "small")


@pytest.mark.parametrize("count", [5, 6, 11, 40])
def test_each_photo_has_one_purpose(count: int, tmp_path: Path) -> None:
    names = split(photos(tmp_path / "photos", count))
    everything = names.train + names.validation + names.test
    assert len(everything) == len(set(everything)) == count
    assert names.train and names.validation and names.test
    assert len(names.test) <= max(3, count // 2)


def test_photos_are_packed_once_and_other_photos_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "SYNTHESISED", ("derain", "lowlight+denoise"))
    folder = photos(tmp_path / "photos", 5)
    given = Arguments(photos=folder, init="unused")
    names = split(folder)
    shards = pack_photos(given, names, Console(quiet=True))
    manifest = json.loads((shards / "train" / "manifest.json").read_text())
    assert set(manifest["tasks"]) == {"denoise", "derain", "mixed"}
    written = (shards / "train" / "manifest.json").stat().st_mtime_ns
    assert pack_photos(given, names, Console(quiet=True)) == shards
    assert (shards / "train" / "manifest.json").stat().st_mtime_ns == written
    Image.fromarray(data.chelsea()[:100, :100]).save(folder / names.test[0])
    with pytest.raises(ValueError, match="other photographs"):
        pack_photos(given, names, Console(quiet=True))


def test_an_interrupted_packing_is_continued_and_its_parts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "SYNTHESISED", ("derain",))
    folder = photos(tmp_path / "photos", 5)
    (folder / "a").mkdir()
    for name in ("a/x.png", "a_x.png"):  # two pictures, whose links need two names
        Image.fromarray(data.chelsea()[50:150, :100]).save(folder / name)
    given = Arguments(photos=folder, init="unused")

    real = packing.pack

    def interrupted(layout: str, root: str, out: str, **options: Any) -> Manifest:
        if out.endswith("validation"):
            raise KeyboardInterrupt
        return real(layout, root, out, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "pack", interrupted)
        pack_photos(given, split(folder), Console(quiet=True))
    shards = pack_photos(given, split(folder), Console(quiet=True))
    counts = [
        json.loads((shards / part / "manifest.json").read_text())["tasks"]["denoise"]["samples"]
        for part in Split._fields
    ]
    assert sum(counts) == 7
    Image.fromarray(data.chelsea()[:100, :100]).save(folder / "more.png")
    (shards / "test" / "manifest.json").unlink()  # as if it had been interrupted there
    with pytest.raises(ValueError, match="other photographs"):
        pack_photos(given, split(folder), Console(quiet=True))


def test_the_configuration_starts_from_the_weights(tmp_path: Path) -> None:
    given = Arguments(photos=tmp_path, init="w.safetensors", name="mine", samples=400)
    config = configuration(given, tiny())
    assert (config.init, config.name, config.model) == ("w.safetensors", "mine", tiny())
    assert config.data.train == "data/mine/train" and config.recipe.samples == 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--init", "W"], "is not a folder"),
        (["FEW", "--init", "W"], "holds 3 pictures"),
        (["PHOTOS", "--init", "no.safetensors"], "there is no file no.safetensors"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "W": weights,
        "PHOTOS": str(photos(tmp_path / "photos", 5)),
        "FEW": str(photos(tmp_path / "few", 3)),
    }
    assert main([places.get(one, one) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_whole_command(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = photos(tmp_path / "photos", 6)
    options = ["--init", weights, "--samples", "64", "--crop", "32"]
    assert main([str(folder), *options]) == 0
    said = capsys.readouterr().out
    assert "paired difference from before" in said
    found = json.loads((tmp_path / "runs/finetuned/evaluation/compare.json").read_text())
    assert set(found["methods"]) == {"before", "after"}
    assert found["methods"]["after"]["mean"] > found["methods"]["before"]["mean"]
