"""Every kind of damage is found, named, and kept away from training."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import inspect, manifest
from shards.config import DataConfig
from shards.packing import pack
from shards.reader import DamagedError
from shards.stream import TrainStream, pictures


@pytest.fixture()
def packed(tmp_path: Path) -> Path:
    """Twelve pairs in three shards."""
    import skimage.data

    for side in ("input", "target"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
    for number in range(12):
        cut = skimage.data.astronaut()[30 * number : 30 * number + 40, 100:148]
        Image.fromarray(cut).save(tmp_path / f"pairs/target/{number:02d}.png")
        Image.fromarray(cut // 2).save(tmp_path / f"pairs/input/{number:02d}.jpg", quality=90)
    out = tmp_path / "out"
    made = pack(
        "paired", str(tmp_path / "pairs"), str(out), task="derain", shard_mib=0.024, workers=1
    )
    assert len(made.shards) == 3
    return out


def edit(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(at: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[at] ^= 4
        return data

    return change


def header_of(path: Path, sample: int) -> int:
    """Where the header of a sample's first member starts."""
    with tarfile.open(path) as tar:
        return [m.offset for m in tar.getmembers() if ".input" in m.name][sample]


def payload_of(path: Path, sample: int, side: str) -> int:
    with tarfile.open(path) as tar:
        return [m.offset_data + m.size // 2 for m in tar.getmembers() if side in m.name][sample]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "header bit flipped": lambda p: edit(p, flip(header_of(p, 2) + 3)),
    "header zeroed": lambda p: edit(
        p, lambda d: d[: header_of(p, 2)] + bytes(512) + d[header_of(p, 2) + 512 :]
    ),
    "size field wrong": lambda p: edit(p, flip(header_of(p, 2) + 124 + 9)),
    "cut inside of a header": lambda p: edit(p, lambda d: d[: header_of(p, 2) + 100]),
    "cut between members": lambda p: edit(p, lambda d: d[: header_of(p, 2)]),
    "cut inside of a member": lambda p: edit(p, lambda d: d[: payload_of(p, 2, ".input")]),
    "PNG payload bit flipped": lambda p: edit(p, flip(payload_of(p, 2, ".target"))),
    "JPEG payload bit flipped": lambda p: edit(p, flip(payload_of(p, 2, ".input"))),
    "end blocks missing": lambda p: edit(p, lambda d: d[: -tarfile.RECORDSIZE]),
    "empty": lambda p: p.write_bytes(b"") and None,
    "a web page": lambda p: p.write_bytes(b"<html>not found</html>") and None,
    "missing": lambda p: p.unlink(),
    "index missing": lambda p: p.with_suffix(".idx").unlink(),
    "index flipped": lambda p: edit(p.with_suffix(".idx"), flip(60)),
    "index cut": lambda p: edit(p.with_suffix(".idx"), lambda d: d[:50]),
}


HARMLESS = ("header bit flipped", "header zeroed", "size field wrong")
"""For training: the index knows where the bytes are, so nothing is lost."""


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_the_command_that_repairs_it(packed: Path, kind: str) -> None:
    DAMAGE[kind](packed / "derain-000001.tar")
    report = inspect.inspect(str(packed), workers=1)
    assert not report.ok
    names = {problem.shard for problem in report.problems}
    assert names == {"derain-000001" + (".idx" if "index" in kind else ".tar")}
    for problem in report.problems:
        assert f"shards.pack paired ROOT {packed} --task derain --repair" in problem.remedy
    if "payload" in kind:  # the very sample is named
        assert any("sample 2 of derain" in problem.problem for problem in report.problems)
    # And its command does mend it.
    pack("paired", str(packed.parent / "pairs"), str(packed), task="derain", repair=True, workers=1)
    assert inspect.inspect(str(packed), deep=True, workers=1).ok


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind not in HARMLESS])
def test_damage_stops_training_or_is_replaced(packed: Path, kind: str) -> None:
    data = DataConfig(train=str(packed), repeats={"derain": 1}, crop=16, loader_workers=0)
    sizes = {"global_batch": 12, "micro_batch": 4, "rank": 0}

    def keys(world: int) -> tuple[list[str], list[str]]:
        found, damage = [], []
        for rank in range(world):
            stream = TrainStream(config, 1)
            batches = stream.batches(0, 24, **sizes | {"world": world, "rank": rank})
            for batch in batches:
                found += zip(batch.position.tolist(), batch.keys, strict=True)
                damage += batch.damage
        return [key for _, key in sorted(found)], damage

    config = data
    whole, nothing = keys(1)
    assert nothing == []
    DAMAGE[kind](packed / "derain-000001.tar")
    with pytest.raises((DamagedError, ValueError), match="--repair") as stopped:
        keys(1)
    assert "\n" not in str(stopped.value)
    if kind == "end blocks missing":
        return  # only its length is wrong; checked before a run starts

    import dataclasses

    config = dataclasses.replace(data, on_corrupt="substitute")
    replaced, damage = keys(1)
    assert damage and all("derain-000001" in line for line in damage)
    again, _ = keys(3)
    assert replaced == again  # the same for every world
    changed = [(a, b) for a, b in zip(whole, replaced, strict=True) if a != b]
    assert 0 < len(changed) <= len(damage)
    assert len(replaced) == 24
    config = dataclasses.replace(config, corrupt_budget=1)
    with pytest.raises(DamagedError, match=r"more than data\.corrupt_budget = 1"):
        keys(1)


@pytest.mark.parametrize("kind", HARMLESS)
def test_headers_that_cost_webdataset_the_rest_of_a_shard_cost_nothing(
    packed: Path, kind: str
) -> None:
    DAMAGE[kind](packed / "derain-000001.tar")
    names = [picture.name for picture in pictures(str(packed))]
    assert names == [f"input/{number:02d}.jpg" for number in range(12)]


def test_a_whole_set_is_described(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(packed), "--json", "--deep"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["deep"] and report["problems"] == []
    assert report["fingerprint"] == manifest.read(str(packed)).fingerprint
    assert report["tasks"]["derain"]["samples"] == 12
    assert report["tasks"]["derain"]["shards"] == 3
    assert report["sizes"] == {"derain": {"48x40": 12}}
    sheet = np.asarray(Image.open(packed / "contact_sheet.png"))
    assert sheet.std() > 40  # something is drawn
    assert inspect.main([str(packed)]) == 0
    text = capsys.readouterr().out
    assert "every hash is right" in text and "48x40 (12)" in text


def test_problems_go_to_stderr_with_exit_code_2(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packed / "derain-000002.tar").unlink()
    assert inspect.main([str(packed), "--json"]) == 2
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["ok"]
    assert captured.err.startswith(
        "error: derain-000002.tar: is named in the manifest, but does not"
    )
    assert captured.err.count("\n") == 1
    (packed / "manifest.json").write_text("{")
    assert inspect.main([str(packed)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert inspect.main([str(packed / "nowhere")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_a_stray_shard_is_named(packed: Path) -> None:
    (packed / "derain-000009.tar").write_bytes(b"")
    report = inspect.inspect(str(packed), workers=1)
    assert [problem.shard for problem in report.problems] == ["derain-000009.tar"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 99', "has version 99"),
        ("derain-000001.tar", "../derain-000001.tar", "is not a shard in its folder"),
        ("derain-000001.tar", "a/../../derain-000001.tar", "is not a shard in its folder"),
        ("derain-000001.tar", "/derain-000001.tar", "is not a shard in its folder"),
        ('"source": ""', '"source": "pipe:cat x"', "is not a folder or a store"),
        ('"samples": 12', '"samples": 13', "do not add up"),
        ('"task": "derain"', '"task": "dream"', "unknown task"),
        ('"sha256": "', '"sha256": "0', "its fingerprint does not match"),
    ],
)
def test_a_damaged_manifest_is_refused(packed: Path, old: str, new: str, message: str) -> None:
    path = packed / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        manifest.read(str(packed))


@pytest.mark.parametrize("uri", ["pipe:cat x", "s3://a::file://b", "ftp://x/y", "file+x://y"])
def test_uris_that_could_run_commands_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="is not a folder or a store that can be read"):
        manifest.read(uri)


def test_pictures_that_two_sets_share_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import skimage.data

    astronaut, coffee = (
        Image.fromarray(p) for p in (skimage.data.astronaut(), skimage.data.coffee())
    )
    for name, pictures_of_it in {
        "train": {"a.png": astronaut, "b.png": coffee, "c.png": astronaut.rotate(90)},
        "test": {
            "copy_a.jpg": astronaut.resize((300, 300)),
            "copy_b.jpg": coffee.crop((0, 0, coffee.width - 1, coffee.height - 1)),
            "d.jpg": coffee.rotate(90),
        },
    }.items():
        (tmp_path / name).mkdir()
        for file, picture in pictures_of_it.items():
            picture.save(tmp_path / name / file)
        pack("clean", str(tmp_path / name), str(tmp_path / f"{name}_packed"), workers=1)
    train, test = str(tmp_path / "train_packed"), str(tmp_path / "test_packed")
    report = inspect.inspect(train, workers=1, against=test)
    assert report.shared == [
        "denoise a.png is denoise copy_a.jpg",
        "denoise b.png is denoise copy_b.jpg",
    ]
    assert inspect.main([train, "--against", test]) == 2
    captured = capsys.readouterr()
    assert "in both: denoise a.png is denoise copy_a.jpg" in captured.out
    assert captured.err.startswith(f"error: 2 pictures are in both {train} and {test}")
    (tmp_path / "other").mkdir()
    astronaut.rotate(180).save(tmp_path / "other/e.png")
    pack("clean", str(tmp_path / "other"), str(tmp_path / "other_packed"), workers=1)
    assert inspect.main([train, "--against", str(tmp_path / "other_packed")]) == 0
    assert "in both: none" in capsys.readouterr().out
