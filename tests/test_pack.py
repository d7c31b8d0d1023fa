"""Packing real pictures: what is written, and what is refused."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import manifest, pack
from shards.config import DataConfig
from shards.reader import Reader
from shards.stream import open_reader


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    """Five small photographs cut from pictures that scikit-image ships."""
    import skimage.data

    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(
        [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    ):
        for part in range(2):
            cut = picture[40 : 40 + 96 + 8 * number, 60 + 90 * part : 60 + 90 * part + 120]
            Image.fromarray(cut).save(folder / f"p{number}.{part}_0.8.png")
    return folder


def reader(folder: Path) -> Reader:
    return open_reader(str(folder), DataConfig())


def test_a_clean_folder_becomes_five_tasks_that_webdataset_opens(
    photos: Path, tmp_path: Path
) -> None:
    import webdataset

    out = tmp_path / "out"
    tasks = ["dehaze", "derain", "deblur", "lowlight"]
    made = pack.pack("clean", str(photos), str(out), synthesise=tasks, workers=1)
    assert made.counts == {"denoise": 6, "derain": 6, "dehaze": 6, "deblur": 6, "lowlight": 6}
    assert manifest.read(str(out)).fingerprint == made.fingerprint
    names = sorted(path.name for path in photos.iterdir())
    for task in made.counts:
        urls = [str(out / shard.name) for shard in made.of(task)]
        seen = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [sample["__key__"] for sample in seen] == [f"{task}_{n:08d}" for n in range(6)]
        for name, sample in zip(names, seen, strict=True):
            assert sample["target.png"] == (photos / name).read_bytes()  # the original bytes
            assert ("input.png" in sample) == (task != "denoise")
    with_reader = reader(out)
    place = with_reader.locate("derain", 3)
    assert with_reader.key(place) == "derain_00000003"
    assert with_reader.about(place)["target"] == names[3]
    assert with_reader.about(place)["chain"][0]["degradation"] == "derain"
    assert with_reader.degraded(place).shape == with_reader.clean(place).shape
    assert np.abs(with_reader.degraded(place).astype(int) - with_reader.clean(place)).mean() > 1


def test_the_same_folder_gives_the_same_bytes_with_any_number_of_processes(
    photos: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, 1), (two, 2)):
        pack.pack(
            "clean", str(photos), str(out), synthesise=["deblur"], workers=workers, shard_mib=0.1
        )
    files = sorted(path.name for path in one.iterdir() if path.is_file())
    assert len(files) > 6  # several shards
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_tars_are_plain_and_reproducible(photos: Path, tmp_path: Path) -> None:
    made = pack.pack("clean", str(photos), str(tmp_path / "out"), workers=1)
    with tarfile.open(tmp_path / "out" / made.shards[0].name) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {0}
    assert all(member.name.count(".") <= 2 and "/" not in member.name for member in members)


def test_tasks_are_added_one_after_the_other_and_not_twice(photos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    pairs = tmp_path / "pairs"
    for side in ("input", "target"):
        (pairs / side).mkdir(parents=True)
        for path in photos.iterdir():
            (pairs / side / path.name).write_bytes(path.read_bytes())
    pack.pack("clean", str(photos), out, workers=1)
    made = pack.pack("paired", str(pairs), out, task="derain", workers=1)
    assert made.counts == {"denoise": 6, "derain": 6}
    with pytest.raises(ValueError, match="already holds derain"):
        pack.pack("paired", str(pairs), out, task="derain", workers=1)
