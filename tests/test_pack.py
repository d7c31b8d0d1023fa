"""Packing real pictures: what is written, and what is refused."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from shards import manifest
from shards.config import DataConfig
from shards.decode import Box
from shards.pack import main
from shards.packing import pack
from shards.reader import Reader
from shards.stream import open_reader, pictures


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
    made = pack("clean", str(photos), str(out), synthesise=tasks, workers=1)
    assert made.counts == {"denoise": 6, "derain": 6, "dehaze": 6, "deblur": 6, "lowlight": 6}
    assert manifest.read(str(out)).fingerprint == made.fingerprint
    names = sorted(path.name for path in photos.iterdir())
    for task in made.counts:
        urls = [str(out / shard.name) for shard in made.shards_of(task)]
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
        pack("clean", str(photos), str(out), synthesise=["deblur"], workers=workers, shard_mib=0.1)
    files = sorted(path.name for path in one.iterdir() if path.is_file())
    assert len(files) > 6  # several shards
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_tars_are_plain_and_reproducible(photos: Path, tmp_path: Path) -> None:
    made = pack("clean", str(photos), str(tmp_path / "out"), workers=1)
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
    pack("clean", str(photos), out, workers=1)
    made = pack("paired", str(pairs), out, task="derain", workers=1)
    assert made.counts == {"denoise": 6, "derain": 6}
    with pytest.raises(ValueError, match="already has derain"):
        pack("paired", str(pairs), out, task="derain", workers=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_chains_of_degradations_are_packed_as_mixed(photos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made = pack(
        "clean", str(photos), out, synthesise=["dehaze+lowlight+denoise", "derain"], workers=1
    )
    assert made.counts == {"denoise": 6, "derain": 6, "mixed": 6}
    about = reader(tmp_path / "out").about(reader(tmp_path / "out").locate("mixed", 2))
    assert [link["degradation"] for link in about["chain"]] == ["dehaze", "lowlight", "denoise"]
    assert 10 <= about["chain"][2]["sigma"] <= 50
    refused = {
        "dehaze+fog": "'fog' cannot be synthesised",
        "dehase": "did you mean dehaze",
        "denoise": "'denoise', but noise is added while loading",
        "dehaze+derain+deblur+lowlight": "a chain of 4",
    }
    for wish, reason in refused.items():
        with pytest.raises(ValueError, match=f"--synthesise names.*{reason}"):
            pack("clean", str(photos), str(tmp_path / "no"), synthesise=[wish], workers=1)


def test_a_measured_depth_map_makes_the_haze(photos: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in photos.iterdir())[0]
    with Image.open(photos / name) as image:
        width, height = image.size
    depth = np.zeros((height, width)) + 1.0
    depth[:, width // 2 :] = 100.0
    np.save(photos / name.replace(".png", ".depth.npy"), depth)
    pack("clean", str(photos), str(tmp_path / "out"), synthesise=["dehaze"], workers=1)
    packed = reader(tmp_path / "out")
    place = packed.locate("dehaze", 0)
    assert packed.about(place)["chain"][0]["depth"] == "measured"
    assert packed.about(packed.locate("dehaze", 1))["chain"][0]["depth"] == "synthetic"
    contrast = packed.degraded(place).astype(float)
    near, far = contrast[:, : width // 2].std(), contrast[:, width // 2 :].std()
    clean = packed.clean(place).astype(float)
    near_clean, far_clean = clean[:, : width // 2].std(), clean[:, width // 2 :].std()
    assert near / near_clean > 0.9  # nearly no haze before the lens
    assert far / far_clean < 0.6
    np.save(photos / name.replace(".png", ".depth.npy"), depth[:-3])
    with pytest.raises(ValueError, match="remove the map"):
        pack("clean", str(photos), str(tmp_path / "no"), synthesise=["dehaze"], workers=1)


def test_tiles_give_the_same_pixels(photos: Path, tmp_path: Path) -> None:
    whole, tiled = tmp_path / "whole", tmp_path / "tiled"
    for out, tiles in ((whole, 0), (tiled, 32)):
        made = pack("clean", str(photos), str(out), synthesise=["derain"], workers=1, tiles=tiles)
        assert made.tasks["derain"].options["tiles"] == tiles
    one, other = reader(whole), reader(tiled)
    rng = np.random.default_rng(0)
    for number in range(6):
        here, there = one.locate("derain", number), other.locate("derain", number)
        assert other.key(there) == one.key(here) == f"derain_{number:08d}"
        assert other.stored(there, "input").startswith(b"qoif")
        assert np.array_equal(one.clean(here), other.clean(there))
        assert np.array_equal(one.degraded(here), other.degraded(there))
        for _ in range(20):
            height, width = here.size
            tall, wide = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
            top, left = rng.integers(0, [height - tall + 1, width - wide + 1])
            box = Box(int(top), int(left), tall, wide)
            assert np.array_equal(one.degraded(here, box), other.degraded(there, box)), box
            assert np.array_equal(one.clean(here, box), other.clean(there, box)), box


def run_and_kill(arguments: list[str], after: float) -> bool:
    """Starts a packing and kills it and its processes; returns whether it was still running."""
    command = [sys.executable, "-m", "shards.pack", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def test_killed_at_any_moment_packing_resumes_to_the_same_bytes(
    photos: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tasks = ["dehaze", "derain", "deblur"]
    pack("clean", str(photos), str(whole), synthesise=tasks, workers=1, shard_mib=0.05)
    arguments = ["clean", str(photos), str(killed), "--shard-mib", "0.05", "--workers", "1"]
    arguments += ["--synthesise", *tasks]
    cut_short = [run_and_kill(arguments, after) for after in (0.75, 0.95)]
    assert not cut_short[0] or not (killed / "manifest.json").exists() or cut_short[1]
    if (killed / "manifest.json").exists():  # a fast machine
        assert tree(killed) == tree(whole)
        return
    # A file with a shard's final name is complete.
    for path in killed.glob("*.tar"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert main(arguments) == 0
    assert tree(killed) == tree(whole)
    assert not (killed / ".packing").exists()


def test_killed_before_the_first_record_packing_resumes(photos: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pack("clean", str(photos), str(whole), workers=1, shard_mib=0.05)
    (killed / ".packing").mkdir(parents=True)
    (killed / ".packing/running.lock").touch()
    for name in ("denoise-000000.tar", "denoise-000000.idx"):
        (killed / name).write_bytes((whole / name).read_bytes())
    pack("clean", str(photos), str(killed), workers=1, shard_mib=0.05)
    assert tree(killed) == tree(whole)
    assert not (killed / ".packing").exists()


def test_finished_shards_are_not_written_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    last = sorted(photos.iterdir())[-1]
    good = last.read_bytes()
    last.write_bytes(good[: len(good) // 2])
    options = {"workers": 1, "shard_mib": 0.02}
    with pytest.raises(ValueError, match=rf"{last.name} is not a complete picture .* run the same"):
        pack("clean", str(photos), str(out), **options)
    assert not (out / "manifest.json").exists()
    first = out / "denoise-000000.tar"
    before = first.stat().st_mtime_ns
    last.write_bytes(good)
    pack("clean", str(photos), str(out), **options)
    assert first.stat().st_mtime_ns == before
    pack("clean", str(photos), str(tmp_path / "anew"), **options)
    assert tree(out) == tree(tmp_path / "anew")


def test_an_unfinished_packing_with_other_options_leaves_nothing_behind(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = sorted(photos.iterdir())[-1]
    good = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete picture"):
        pack("clean", str(photos), str(out), workers=1, shard_mib=0.02)
    last.write_bytes(good)
    made = pack("clean", str(photos), str(out), workers=1)
    assert sorted(path.name for path in out.glob("*.tar")) == [row.name for row in made.shards]


def test_repair_makes_damaged_shards_anew(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"synthesise": ["derain"], "workers": 1, "shard_mib": 0.05, "seed": 4}
    made = pack("clean", str(photos), str(out), severity={"derain": 0.5}, **options)
    assert made.tasks["derain"].options["severity"] == {"derain": 0.5}
    good = tree(out)
    shards = sorted(out.glob("*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(b"")
    shards[2].with_suffix(".idx").write_bytes(b"rubbish")
    damaged = bytearray(shards[3].read_bytes())
    damaged[700] ^= 1
    shards[3].write_bytes(damaged)
    pack("clean", str(photos), str(out), repair=True, workers=1)
    assert tree(out) == good
    # Other pictures than those that were packed cannot repair it.
    shards[0].unlink()
    for path in photos.iterdir():
        Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(ValueError, match="find the old pictures"):
        pack("clean", str(photos), str(out), repair=True, workers=1)


def limited(arguments: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """The command with files limited to `size` bytes, which fails as a full disk does."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "from shards.pack import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("size", [50_000, 9_000])
def test_a_full_disk_gives_one_line_and_leaves_nothing_half_written(
    photos: Path, tmp_path: Path, size: int
) -> None:
    out = tmp_path / "out"
    ended = limited(["clean", str(photos), str(out), "--workers", "1"], size)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no space left to write" in ended.stderr
    assert "run the same command again" in ended.stderr
    left = [path.name for path in out.rglob("*") if path.is_file()]
    assert [name for name in left if name != "running.lock"] == []


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_wrong_inputs_get_one_clear_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no pictures" in one_line(["clean", str(empty), out], capsys)
    assert "is not a folder" in one_line(["clean", str(tmp_path / "nowhere"), out], capsys)
    assert "'dirty' is not a layout" in one_line(["dirty", str(photos), out], capsys)
    assert "--task is None" in one_line(["paired", str(photos), out], capsys)
    assert "must be 0, or 16" in one_line(["clean", str(photos), out, "--tiles", "3"], capsys)
    assert "is not empty" in one_line(["clean", str(photos), str(photos)], capsys)
    assert "did you mean derain?" in one_line(
        ["paired", str(photos), out, "--task", "drain"], capsys
    )
    assert "pipe:cat" in one_line(["clean", str(photos), "pipe:cat"], capsys)
    blur = ["clean", str(photos), out, "--synthesise", "deblur", "--severity"]
    assert "gives deblur 2.0, but must be above 0" in one_line([*blur, "deblur", "2"], capsys)
    assert "--synthesise names only deblur" in one_line([*blur, "derain", "0.5"], capsys)
    assert "--repair takes the severity" in one_line([*blur, "deblur", "0.5", "--repair"], capsys)
    pairs = tmp_path / "pairs"
    for side, size in (("low", 60), ("high", 64)):
        (pairs / side).mkdir(parents=True)
        Image.new("RGB", (size, 50)).save(pairs / side / "1.png")
    line = one_line(["paired", str(pairs), out, "--task", "lowlight"], capsys)
    assert "1.png is 60x50" in line and "is 64x50" in line and "run the same command" in line
    assert not Path(out).exists() or not list(Path(out).glob("*"))


def test_two_packings_at_a_time_are_refused(photos: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    (out / ".packing").mkdir(parents=True)
    with FileLock(out / ".packing/running.lock"):
        for _ in range(2):  # the one that was refused leaves the lock of the other alone
            with pytest.raises(ValueError, match="is running"):
                pack("clean", str(photos), str(out), workers=1)
    pack("clean", str(photos), str(out), workers=1)


def interrupted(arguments: list[str], after: float, gap: float) -> tuple[int, float, str]:
    """Runs a packing and sends two SIGINTs, to the process and to its group, as `timeout` does.

    Returns its exit code, the seconds that it took to end, and its stderr.
    """
    command = [sys.executable, "-m", "shards.pack", *arguments]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        time.sleep(after)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(gap)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        return process.returncode, time.monotonic() - start, errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("after", "gap"), [(0.7, 0), (1.3, 0.001), (2.0, 0), (3.0, 0.3)])
def test_two_interrupts_end_it_cleanly(
    many_photos: Path, tmp_path: Path, workers: str, after: float, gap: float
) -> None:
    out = tmp_path / "out"
    arguments = ["clean", str(many_photos), str(out), "--shard-mib", "0.5", "--workers", workers]
    arguments += ["--synthesise", "deblur", "derain"]
    code, seconds, errors = interrupted(arguments, after, gap)
    assert (code, "Traceback" in errors) == (130, False), errors
    assert errors == "stopped; run the same command again to continue\n"
    assert seconds < 60  # a second or two on an idle machine
    # Nothing incomplete is left, and no process.
    assert not list(out.glob(".*.part"))
    assert not (out / "manifest.json").exists()


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that take half a minute to degrade."""
    import skimage.data

    folder = tmp_path_factory.mktemp("many")
    for number in range(60):
        picture = np.roll(skimage.data.astronaut(), 8 * number, axis=number % 2)
        Image.fromarray(picture).save(folder / f"{number:02d}.jpg")
    return folder


def test_ray_without_a_cluster_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have started one
    with pytest.raises(ValueError, match="--ray needs a cluster: set RAY_ADDRESS"):
        pack("clean", str(photos), str(tmp_path / "out"), ray=True)


def test_a_mistyped_option_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["clean", "here", "there", "--alow-missing"])
    assert "--allow-missing" in capsys.readouterr().err


def test_counts_are_in_singular_and_plural(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options, text in (
        ("one", [], " 1 shard,"),
        ("six", ["--shard-mib", "0.01"], " 6 shards,"),
    ):
        assert main(["clean", str(photos), str(tmp_path / name), "--workers", "1", *options]) == 0
        assert text in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_packed_over_ray_it_is_the_same(photos: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"synthesise": ["derain"], "shard_mib": 0.05}
    pack("clean", str(photos), str(one), workers=1, **options)
    pack("clean", str(photos), str(two), ray=True, **options)
    assert tree(one) == tree(two)


def stored_turned(pixels: np.ndarray, orientation: int) -> bytes:
    """A PNG whose tag says how to turn it upright."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=tags.tobytes())
    return file.getvalue()


def test_pictures_are_packed_upright(tmp_path: Path) -> None:
    """Stored upside down with a tag, and exported upright: the same picture."""
    upright = np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)
    for side in ("input", "target"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
    (tmp_path / "pairs" / "input" / "a.png").write_bytes(stored_turned(upright[::-1, ::-1], 3))
    Image.fromarray(upright).save(tmp_path / "pairs" / "target" / "a.png")
    pack("paired", str(tmp_path / "pairs"), str(tmp_path / "out"), task="derain", workers=1)
    (picture,) = pictures(str(tmp_path / "out"))
    assert torch.equal(picture.degraded, picture.clean)


def test_deep_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    deep = np.zeros((32, 32, 3), np.uint16)
    (tmp_path / "photos" / "a.png").write_bytes(imagecodecs.png_encode(deep))
    with pytest.raises(ValueError, match="16 bits per channel"):
        pack("clean", str(tmp_path / "photos"), str(tmp_path / "out"), workers=1)


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(stored_turned(np.zeros((32, 32, 3), np.uint8), 1))
    with pytest.raises(ValueError, match="the name is not UTF-8; rename the file"):
        pack("clean", str(tmp_path), str(tmp_path / "out"), workers=1)


def test_repair_keeps_a_tar_that_is_intact(photos: Path, tmp_path: Path) -> None:
    made = pack("clean", str(photos), str(tmp_path / "out"), workers=1)
    shard = made.shards[0]
    tar = tmp_path / "out" / shard.name
    before = tar.read_bytes()
    (tmp_path / "out" / shard.index_name).unlink()
    changed = next(photos.rglob("*.png"))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(changed)
    with pytest.raises(ValueError, match=r"is not what .* was packed from"):
        pack("clean", str(photos), str(tmp_path / "out"), repair=True, workers=1)
    assert tar.read_bytes() == before
