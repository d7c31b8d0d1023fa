"""Tars that another program wrote: indexed in place and streamed exactly."""

import dataclasses
import functools
import http.server
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import webdataset
from PIL import Image

from distributed.config import from_yaml
from distributed.presets import parse
from shards import inspect, interrupt, manifest
from shards.config import DataConfig
from shards.index import main
from shards.indexing import index
from shards.packing import pack
from shards.stream import TrainStream, open_reader, pictures
from shards.tasks import DEGRADATIONS
from tests.webdataset_tars import RAIN, pair, photo, write


def config(folder: Path | str, **changes: object) -> DataConfig:
    base = DataConfig(
        train=str(folder), repeats={"derain": 2}, crop=32, augment="none", loader_workers=0
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def stream(data: DataConfig, start: int, stop: int) -> list[tuple[list[str], bytes, bytes]]:
    sizes = {"global_batch": 4, "micro_batch": 2, "world": 1, "rank": 0}
    batches = TrainStream(data, 3).batches(start, stop, **sizes)
    return [(b.keys, b.degraded.numpy().tobytes(), b.clean.numpy().tobytes()) for b in batches]


def test_tars_of_webdataset_are_read_in_place(pairs: Path) -> None:
    before = {path.name: path.read_bytes() for path in pairs.iterdir()}
    made = index(str(pairs), **RAIN)
    assert made.counts == {"derain": 12} and len(made.shards) == 2
    assert manifest.read(str(pairs)).fingerprint == made.fingerprint
    added = {path.name for path in pairs.iterdir()} - before.keys()
    assert added == {"manifest.json", "000000.derain.idx", "000001.derain.idx"}
    assert all((pairs / name).read_bytes() == data for name, data in before.items())
    reader = open_reader(str(pairs), DataConfig())
    urls = [str(pairs / name) for name in sorted(before)]
    for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        place = reader.locate("derain", number)
        assert reader.key(place) == sample["__key__"]
        assert reader.stored(place, "target") == sample["gt.png"] == photo(number)
        assert reader.stored(place, "input") == sample["lq.jpg"]
        about = {"target": f"{sample['__key__']}.gt.png", "inputs": [f"{sample['__key__']}.lq.jpg"]}
        assert reader.about(place) == about
        for role, pixels in (("gt.png", reader.clean(place)), ("lq.jpg", reader.degraded(place))):
            assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(sample[role]))))
    assert number == 11
    assert inspect.inspect(str(pairs), deep=True, workers=1).ok
    assert [picture.name.rsplit("/", 1)[-1] for picture in pictures(str(pairs), limit=2)] == [
        "0000.lq.jpg",
        "0001.lq.jpg",
    ]


def test_the_stream_is_that_of_the_same_pictures_packed_and_resumes(
    pairs: Path, tmp_path: Path
) -> None:
    index(str(pairs), **RAIN)
    for number in range(12):
        for side, suffix, field in (("input", "jpg", "lq.jpg"), ("target", "png", "gt.png")):
            path = tmp_path / "pictures" / side / f"{number:04d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pair(number)[field])
    pack("paired", str(tmp_path / "pictures"), str(tmp_path / "ours"), task="derain", workers=1)
    whole = stream(config(pairs), 0, 48)
    ours = stream(config(tmp_path / "ours"), 0, 48)
    assert [pixels for _, *pixels in whole] == [pixels for _, *pixels in ours]
    assert stream(config(pairs), 0, 20) + stream(config(pairs), 20, 48) == whole
    assert stream(config(pairs, loader_workers=1), 0, 48) == whole
    number = int(whole[0][0][0][-4:])  # derain/a/b/0007
    clean = np.asarray(Image.open(io.BytesIO(photo(number))))
    crop = (np.frombuffer(whole[0][2], np.float32).reshape(2, 3, 32, 32)[0] * 255).round()
    crop = crop.transpose(1, 2, 0).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(clean, (32, 32, 3))
    assert (windows == crop).all(axis=(-1, -2, -3)).any()


def test_denoise_has_clean_pictures_of_several_formats(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"a": {"JPG": photo(1, "JPEG")}, "b": {"png": photo(2)}})
    made = index(str(tmp_path), task="denoise", clean="jpg;png", workers=1)
    assert made.counts == {"denoise": 2}
    keys = stream(config(tmp_path, repeats={"denoise_25": 1}), 0, 4)[0][0]
    assert set(keys) <= {"denoise_25/a", "denoise_25/b"}


def test_several_folders_and_tasks_in_one_place(pairs: Path, tmp_path: Path) -> None:
    """The same names of tars in two folders, and one tar for two tasks."""
    haze = tmp_path / "haze"
    write(haze / "000000.tar", {f"{n}": pair(n + 20) for n in range(4)})
    write(haze / "more/000000.tar", {f"m{n}": pair(n + 30) for n in range(4)})
    out = str(tmp_path / "out")
    index(str(pairs), out=out, **RAIN)
    index(str(haze), str(haze / "more"), out=out, **{**RAIN, "task": "dehaze"})
    made = index(str(pairs / "*.tar"), out=out, task="denoise", clean="gt.png", workers=2)
    assert made.counts == {"denoise": 12, "derain": 12, "dehaze": 8}
    assert [row.name for row in made.shards_of("dehaze")] == ["000000.tar", "more/000000.tar"]
    assert {path.suffix for path in pairs.iterdir()} == {".tar"}
    assert inspect.inspect(out, deep=True, workers=1).ok
    repeats = {"denoise_15": 1, "derain": 1, "dehaze": 1}
    seen = [key for keys, *_ in stream(config(out, repeats=repeats), 0, 32) for key in keys]
    assert len(set(seen)) == 32
    # Tars of a task that are not named again would be lost silently.
    message = (
        r"already has derain from .*pairs/000000\.tar, which this command leaves out; name all"
    )
    for place in (haze, pairs / "000001.tar"):
        with pytest.raises(ValueError, match=message):
            index(str(place), out=out, **RAIN)
    assert index(str(pairs), str(haze / "more"), out=out, **RAIN).counts["derain"] == 16
    with pytest.raises(ValueError, match=r"in several folders; say where .* by --out"):
        index(str(haze), str(haze / "more"), **RAIN)


def test_patterns_name_tars(pairs: Path, tmp_path: Path) -> None:
    write(pairs / "000007.tar", {"z": pair(20)})
    for patterns, tars in {
        ("{000000..000001}.tar",): 2,
        ("00000?.tar",): 3,
        ("000000.tar", "000007.tar"): 2,
        ("../**/00000[17].tar",): 2,
    }.items():
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        made = index(*(str(pairs / one) for one in patterns), out=str(out), **RAIN)
        assert len(made.shards) == tars, patterns
        assert made.tasks["derain"].source
    (pairs / "folder.tar").mkdir()
    (pairs / "link.tar").symlink_to(write(tmp_path / "elsewhere/0.tar", {"y": pair(21)}))
    for place in (str(pairs), os.path.relpath(pairs)):
        made = index(place, **RAIN)
        assert len(made.shards) == 4 and made.tasks["derain"].source == ""
    with pytest.raises(ValueError, match=r"nothing/\*\.tar matches no file; give a folder"):
        index(str(tmp_path / "nothing"), **RAIN)


def test_indexing_again_changes_nothing_and_other_fields_replace(pairs: Path) -> None:
    index(str(pairs), **RAIN)
    first = {path.name: path.read_bytes() for path in pairs.iterdir()}
    index(str(pairs), **{**RAIN, "workers": 2})
    assert {path.name: path.read_bytes() for path in pairs.iterdir()} == first
    (pairs / "000001.tar").unlink()
    made = index(str(pairs), **{**RAIN, "clean": "lq.jpg", "degraded": "gt.png"})
    assert made.counts == {"derain": 6}
    assert sorted(path.name for path in pairs.glob("*.idx")) == ["000000.derain.idx"]


def test_tars_that_change_are_noticed_with_the_command_that_helps(pairs: Path) -> None:
    index(str(pairs), **RAIN)
    command = rf"python -m shards\.index '?{pairs}/\*\.tar'? --task derain --clean gt\.png"
    command += r" --degraded lq\.jpg`"
    path = pairs / "000001.tar"
    good = path.read_bytes()
    write(path, {"new": pair(1)})
    with pytest.raises(ValueError, match=rf"has \d+ bytes, but manifest.json says .*{command}"):
        TrainStream(config(pairs), 0)
    path.write_bytes(good.replace(photo(8)[100:120], bytes(20)))  # the same size
    with pytest.raises(ValueError, match=rf"changed \(checksum\).*{command}"):
        stream(config(pairs), 0, 48)
    report = inspect.inspect(str(pairs), workers=1)
    assert [problem.shard for problem in report.problems][:1] == ["000001.tar"]
    assert "python -m shards.index" in report.problems[0].remedy
    path.unlink()
    with pytest.raises(ValueError, match=rf"does not exist; .*{command}"):
        TrainStream(config(pairs), 0)


def test_a_folder_of_tars_without_index_names_the_command(pairs: Path) -> None:
    with pytest.raises(ValueError, match=rf"index them by `python -m shards.index {pairs} --task"):
        TrainStream(config(pairs), 0)


@pytest.mark.parametrize(
    "tasks", [["denoise"], ["deblur"], ["denoise", "derain"], ["mixed"], ["derain", "mixed"]]
)
def test_the_command_that_it_prints_trains_on_all_tasks(
    pairs: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for task in tasks:
        degraded = [] if task == "denoise" else ["--degraded", "lq.jpg"]
        main([str(pairs), "--task", task, "--clean", "gt.png", *degraded, "--workers", "1"])
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("train by: ")
    if "FILE.yaml" in last:
        config = from_yaml(last.split("`")[1])
    else:
        words = shlex.split(last)
        assert words[:3] == ["python", "-m", "distributed.train"]
        config = parse(words[3:])
    assert config.data.train == str(pairs)
    trained = {DEGRADATIONS[name].task for name, uses in config.data.repeats.items() if uses}
    assert trained == set(tasks)
    TrainStream(config.data, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["derain", "--clean", "gt.png"], "--task derain needs pairs; name the field"),
        (["denoise", "--clean", "a", "--degraded", "b"], "denoise has clean pictures only"),
        (["drain", "--clean", "a"], "--task is 'drain', but must be one of denoise, derain"),
        (
            ["derain", "--clean", "png", "--degraded", "lq.jpg"],
            "--clean is 'png', but no member has this field; the tars have gt.png (12), json (12)",
        ),
        (["denoise", "--clean", "gt.png", "--out", "ftp://x"], "is not a folder or a store"),
        (["denoise", "--clean", "gt.png", "--out", "/proc/x"], "cannot be written to"),
    ],
)
def test_wrong_options_get_one_clear_line(
    pairs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(pairs), "--workers", "1", "--task", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_packed_tasks_are_not_replaced(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(photo(1))
    out = str(tmp_path / "out")
    pack("clean", str(tmp_path / "photos"), out, workers=1)
    with pytest.raises(ValueError, match="already has denoise, packed from clean"):
        index(str(pairs), task="denoise", clean="gt.png", out=out, workers=1)
    assert index(str(pairs), out=out, **RAIN).counts == {"denoise": 1, "derain": 12}


def test_an_interrupt_that_another_thread_takes_is_blocked_too() -> None:
    thread = threading.Thread(target=time.sleep, args=(1,))
    thread.start()
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupt.blocked():
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, signal.SIGINT)
        time.sleep(0.8)  # until the other thread has run, on a busy machine too
        reached.append("the end of the block")
    assert reached
    thread.join()


def test_an_interrupt_that_a_destructor_drops_still_stops_the_work() -> None:
    code = """
import signal, sys
from shards import execution, interrupt
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def work(item, advance):
    Late()
    print("goes on", flush=True)
    advance(1)
    print("to the end")
def main():
    execution.run(work, [1], 1, print)
    return 0
sys.exit(interrupt.run_command(main))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (interrupt.EXIT_CODE, "goes on\n")


@pytest.mark.parametrize(("workers", "after"), [("1", 0.0), ("2", 0.0), ("2", 1.5)])
def test_an_interrupt_leaves_no_manifest(tmp_path: Path, workers: str, after: float) -> None:
    buffer = io.BytesIO()  # large enough that reading all takes some seconds
    Image.fromarray(skimage.data.coffee()).resize((1800, 1200)).save(buffer, "JPEG", quality=30)
    for tar in range(4):
        numbers = range(1000 * tar, 1000 * tar + 100)
        write(tmp_path / f"{tar}.tar", {f"{n}": {"jpg": buffer.getvalue()} for n in numbers})
    command = [sys.executable, "-m", "shards.index", str(tmp_path), "--task", "denoise"]
    process = subprocess.Popen(
        [*command, "--clean", "jpg", "--workers", workers], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / ".packing").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "stopped; run the same command again\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.tar" for n in range(4)]


# --- Stores ---


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture()
def address(pairs: Path) -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(pairs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_tars_of_a_store_that_cannot_be_written_to(
    address: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot be written to; name a folder .* by --out"):
        index(address, **RAIN)
    out = tmp_path / "out"
    made = index(address, out=str(out), **RAIN)
    assert json.loads((out / "manifest.json").read_text())["tasks"]["derain"]["source"] == address
    data = config(out, cache_dir=str(tmp_path / "cache"))
    remote = stream(data, 0, 24)
    index(str(pairs), **RAIN)
    assert remote == stream(config(pairs), 0, 24)
    assert {row.sha256 for row in made.shards} <= set(os.listdir(tmp_path / "cache"))


# --- The examples of docs/data.md ---


def example(title: str) -> str:
    """The first Python block of a section."""
    text = (Path(__file__).resolve().parent.parent / "docs/data.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for side in ("input", "target"):
        (tmp_path / "pictures" / side).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "pictures" / side / f"{number}.png").write_bytes(photo(number))
    exec(example("Your own WebDataset"), {})
    arguments = ["--task", "derain", "--clean", "gt.png", "--degraded", "lq.png"]
    assert main(["rain", *arguments]) == 0
    assert manifest.read("rain").counts == {"derain": 3}
    pack("paired", "pictures", "data/shards/train", task="derain", workers=1)
    seen: dict[str, dict[str, np.ndarray]] = {}
    exec(example("Our shards in the webdataset library"), seen)
    last = (skimage.data.coffee()[16 : 16 + 48, 100:166] / 255).astype(np.float32)
    assert np.allclose(seen["sample"]["target.png"], last)
