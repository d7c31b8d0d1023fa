"""Shards in stores: real HTTP and S3-compatible servers on loopback; and the cache of copies."""

import dataclasses
import functools
import hashlib
import http.server
import multiprocessing
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import inspect, manifest, patience, storage
from shards.cache import Cache
from shards.config import DataConfig
from shards.indexing import index
from shards.packing import pack
from shards.stream import TrainStream, pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import skimage.data

    folder = tmp_path_factory.mktemp("photos")
    for number in range(10):
        cut = skimage.data.coffee()[20 * number : 20 * number + 48, 100:164]
        Image.fromarray(cut).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    pack("clean", str(photos), str(out), synthesise=["lowlight"], workers=1, shard_mib=0.03)
    return out


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A folder over HTTP that can misbehave."""

    daemon_threads = True
    broken: dict[str, int]  # name -> how many answers to spoil
    refused: dict[str, int]  # name -> status of every answer
    asked: list[str]


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked.append(name)
        if name in self.server.refused:
            self.send_error(self.server.refused[name])
            return
        if self.server.broken.get(name, 0) > 0:
            self.server.broken[name] -= 1
            if self.server.broken[name] % 2:
                self.send_error(503)
            else:  # ends in the middle, with a whole answer's headers
                body = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        assert isinstance(self.server, Server)
        name = self.path.rsplit("/", 1)[-1]
        if name in self.server.refused:
            self.send_error(self.server.refused[name])
        else:
            super().do_HEAD()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture()
def server(packed: Path) -> Iterator[Server]:
    handler = functools.partial(Handler, directory=str(packed))
    with Server(("127.0.0.1", 0), handler) as running:
        running.broken, running.refused, running.asked = {}, {}, []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def uri(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def config(place: str, cache: Path, **changes: object) -> DataConfig:
    base = DataConfig(
        train=place,
        repeats={"denoise_25": 2, "lowlight": 1},
        crop=32,
        loader_workers=0,
        cache_dir=str(cache),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def contents(data: DataConfig) -> list[tuple[list[str], bytes]]:
    stream = TrainStream(data, 5)
    sizes = {"global_batch": 6, "micro_batch": 3, "world": 1, "rank": 0}
    return [(b.keys, b.degraded.numpy().tobytes()) for b in stream.batches(0, 30, **sizes)]


@pytest.mark.parametrize(
    ("status", "message"),
    [(503, r"fetching .*tar failed for \d s.*503"), (403, r"cannot open .*tar: Forbidden")],
)
def test_no_sample_is_replaced_because_an_http_server_fails(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    for shard in manifest.read(uri(server)).shards:
        server.refused[shard.name] = status
    stream = TrainStream(config(uri(server), tmp_path, on_corrupt="substitute", prefetch=0), 5)
    with pytest.raises((OSError, ValueError), match=message):
        next(stream.batches(0, 30, global_batch=6, micro_batch=3, world=1, rank=0))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, r"reading .*manifest.json failed for \d s"),
        (403, r"reading .*manifest.json is not allowed .HTTP 403"),
    ],
)
def test_a_failing_server_is_not_a_missing_manifest(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    message: str,
    cached: bool,
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    server.refused[manifest.NAME] = status
    with pytest.raises(OSError, match=message):
        manifest.read(uri(server), str(tmp_path) if cached else "")


@pytest.mark.parametrize("workers", [0, 2])
def test_over_http_the_batches_are_those_of_the_folder(
    server: Server, packed: Path, tmp_path: Path, workers: int
) -> None:
    local = contents(config(str(packed), tmp_path / "unused"))
    assert not (tmp_path / "unused").exists()
    cache = tmp_path / "cache"
    remote = contents(config(uri(server), cache, loader_workers=workers))
    assert remote == local
    # Each shard came once, though prefetching thread and readers all wanted it; named by its
    # content.
    tars = [name for name in server.asked if name.endswith(".tar")]
    shards = manifest.read(str(packed)).shards
    assert sorted(set(tars)) == sorted(shard.name for shard in shards)
    for shard in shards:
        assert hashlib.sha256((cache / shard.sha256).read_bytes()).hexdigest() == shard.sha256
    server.asked.clear()
    assert contents(config(uri(server), cache)) == local
    assert [name for name in server.asked if name != manifest.NAME] == []


def test_a_server_with_transient_errors_is_asked_again(
    server: Server, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    local = contents(config(str(packed), tmp_path / "unused"))
    for shard in manifest.read(str(packed)).shards[:2]:
        server.broken |= {shard.name: 3, shard.index_name: 1}
    server.broken[manifest.NAME] = 2
    assert contents(config(uri(server), tmp_path / "cache")) == local
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_shard_that_is_never_complete_stops_with_its_name(
    server: Server, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 2.0)
    shard = manifest.read(str(packed)).shards[0]
    server.broken[shard.name] = 10**6
    with pytest.raises(ValueError, match=rf"fetching http.*{shard.name} failed for \d s, the last"):
        contents(config(uri(server), tmp_path / "cache", prefetch=0))
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_store_that_holds_another_shard_is_noticed(
    server: Server, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same length, but other bytes; as after a copy that mixed two sets up."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    shard = manifest.read(str(packed)).shards[0]
    path = packed / shard.name
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-2000] + bytes([1]) + good[-1999:])
        with pytest.raises(ValueError, match="but the manifest says"):
            contents(config(uri(server), tmp_path / "cache"))
    finally:
        path.write_bytes(good)


def test_inspect_and_pictures_over_http(server: Server, packed: Path, tmp_path: Path) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    report = inspect.inspect(uri(server), deep=True, workers=1, data=data)
    assert report.ok and report.tasks["denoise"]["samples"] == 10
    here = list(pictures(str(packed), limit=2))
    there = list(pictures(uri(server), limit=2, data=data))
    assert len(here) == 8
    for one, other in zip(here, there, strict=True):
        assert one.name == other.name and one.degradation == other.degradation
        assert np.array_equal(one.degraded.numpy(), other.degraded.numpy())


def test_packed_to_s3_and_streamed_from_it(
    bucket: str, photos: Path, packed: Path, tmp_path: Path
) -> None:
    out = f"{bucket}/sets/one"
    options = {"synthesise": ["lowlight"], "workers": 1, "shard_mib": 0.03}
    made = pack("clean", str(photos), out, **options)
    assert made.fingerprint == manifest.read(str(packed)).fingerprint
    assert storage.list_names(f"{out}/.packing") == []
    assert contents(config(out, tmp_path / "cache")) == contents(
        config(str(packed), tmp_path / "no")
    )
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    assert inspect.inspect(out, workers=1, data=data).ok
    with pytest.raises(ValueError, match="already has denoise"):
        pack("clean", str(photos), out, **options)
    # A shard that vanishes is named, and made anew in its place.
    storage.remove(f"{out}/{made.shards[1].name}")
    report = inspect.inspect(out, workers=1, data=DataConfig(cache_dir=str(tmp_path / "fresh")))
    assert [problem.shard for problem in report.problems] == [made.shards[1].name]
    pack("clean", str(photos), out, repair=True, workers=1)
    assert inspect.inspect(out, workers=1, data=DataConfig(cache_dir=str(tmp_path / "new"))).ok


def test_tars_of_another_program_are_indexed_and_streamed_on_s3(
    bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tars = f"{bucket}/theirs"
    options = {"task": "lowlight", "clean": "target.png", "degraded": "input.png", "workers": 1}
    for shard in manifest.read(str(packed)).shards_of("lowlight"):
        storage.upload(f"{packed}/{shard.name}", f"{tars}/{shard.name[9:]}")  # without the task
    made = index(tars, **options)
    assert made.counts == {"lowlight": 10} and len(made.shards) > 1
    assert storage.list_names(tars)[-1] == manifest.NAME
    data = config(tars, tmp_path / "cache", repeats={"lowlight": 1})
    ours = config(str(packed), tmp_path / "no", repeats={"lowlight": 1})
    theirs, mine = contents(data), contents(ours)
    assert [picture for _, picture in theirs] == [picture for _, picture in mine]
    assert inspect.inspect(tars, deep=True, workers=1, data=data).ok
    # A tar that has changed since is named with the command that indexes it again.
    name = made.shards[0].name
    good = storage.read(f"{tars}/{name}")
    storage.write(f"{tars}/{name}", good.replace(b'"height":48', b'"height":49'))
    changed = dataclasses.replace(data, cache_dir=str(tmp_path / "fresh"), prefetch=0)
    with pytest.raises(ValueError, match=rf"{name} failed: .*`python -m shards.index '?{tars}/"):
        contents(changed)
    again = index(tars, **options)
    assert again.fingerprint != made.fingerprint
    assert contents(changed) == theirs


def test_what_another_process_writes_to_s3_is_seen_at_once(bucket: str) -> None:
    """s3fs keeps listings; a run that lists checkpoints must see those of other nodes."""
    folder = f"{bucket}/listed"
    storage.write(f"{folder}/one.json", b"1")
    fs, path = storage.open_folder(folder)
    assert storage.list_names(folder) == ["one.json"]
    assert [name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)] == ["one.json"]
    assert not fs.exists(f"{path}/two.json")
    code = f"from shards import storage; storage.write({folder + '/two.json'!r}, b'2')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert storage.exists(f"{folder}/two.json")
    assert fs.exists(f"{path}/two.json")
    assert storage.list_names(folder) == ["one.json", "two.json"]
    assert len(fs.ls(path, detail=False)) == 2
    assert storage.read_json(fs, f"{path}/two.json") == 2


def test_an_unfinished_packing_to_s3_goes_on(bucket: str, photos: Path, tmp_path: Path) -> None:
    out = f"{bucket}/sets/two"
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in photos.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    good = (copies / "9.png").read_bytes()
    (copies / "9.png").write_bytes(good[:100])
    with pytest.raises(ValueError, match=r"9\.png is not a complete picture"):
        pack("clean", str(copies), out, workers=1, shard_mib=0.01)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        manifest.read(out)
    rows = [name for name in storage.list_names(f"{out}/.packing") if name.endswith(".json")]
    assert rows  # finished shards are kept
    (copies / "9.png").write_bytes(good)
    made = pack("clean", str(copies), out, workers=1, shard_mib=0.01)
    assert made.counts == {"denoise": 10}


def blob(folder: Path, name: str, size: int) -> tuple[str, str, int]:
    data = np.random.default_rng(size).bytes(size)
    (folder / name).write_bytes(data)
    return str(folder / name), hashlib.sha256(data).hexdigest(), size


def test_the_cache_keeps_its_limit_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path / "cache"), limit=3_500)
    files = [blob(tmp_path, f"{n}", 1000 + n) for n in range(4)]
    now = 1_700_000_000
    for number, file in enumerate(files[:3]):
        os.utime(cache.fetch(*file), (now + number, now + number))
    cache.fetch(*files[0])  # used again: now file 1 is the oldest
    cache.fetch(*files[3])
    kept = {name for name in os.listdir(cache.folder) if name != "locks"}
    assert kept == {files[0][1], files[2][1], files[3][1]}
    small = Cache(folder=str(tmp_path / "small"), limit=10)
    assert os.path.getsize(small.fetch(*files[0])) == 1000  # one shard always has room


def test_the_cache_makes_room_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        cache = Cache(folder=str(disk / "cache"), limit=10**9)
        for number in range(6):
            file = blob(tmp_path, f"{number}", 300_000 + number)
            assert os.path.getsize(cache.fetch(*file)) == file[2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_cache_of_a_node_is_in_the_home_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/on-this-node")
    cache = Cache(folder=DataConfig().cache_dir, limit=1)
    assert cache.path("ab") == "/home/on-this-node/.cache/measnet/shards/ab"


def test_the_cache_never_removes_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("thesis.zip", "0" * 63, "notes.json"):
        (tmp_path / "cache" / name).write_bytes(bytes(5_000))
    cache = Cache(folder=str(tmp_path / "cache"), limit=1_500)
    one, other = blob(tmp_path, "a", 1000), blob(tmp_path, "b", 1001)
    cache.fetch(*one)
    table = tmp_path / "cache" / f"{'a' * 64}.1.npy"
    table.write_bytes(bytes(400))
    os.utime(table, (1, 1))  # unused for long
    cache.fetch(*other)
    assert not os.path.exists(cache.path(one[1])) and not table.exists()
    assert {"thesis.zip", "0" * 63, "notes.json"} < set(os.listdir(tmp_path / "cache"))


def test_an_open_copy_survives_its_eviction(tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path / "cache"), limit=1_500)
    one, other = blob(tmp_path, "a", 1000), blob(tmp_path, "b", 1001)
    with open(cache.fetch(*one), "rb") as file:
        cache.fetch(*other)
        assert not os.path.exists(cache.path(one[1]))
        assert hashlib.sha256(file.read()).hexdigest() == one[1]


def fetch_from(folder: str, address: str, sha256: str, size: int) -> None:
    cache = Cache(folder=folder, limit=10**9)
    path = cache.fetch(address, sha256, size)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256


def fetch_and_die(folder: str, address: str, sha256: str, size: int) -> None:
    """Dies while it holds the lock and has written half of the file."""

    def download(uri: str, local: str) -> tuple[int, str]:
        Path(local).write_bytes(b"half")
        os._exit(9)

    storage.download = download
    fetch_from(folder, address, sha256, size)


def test_processes_that_want_one_shard_fetch_it_once_and_may_die(
    server: Server, packed: Path, tmp_path: Path
) -> None:
    shard = manifest.read(str(packed)).shards[0]
    arguments = (str(tmp_path / "cache"), f"{uri(server)}/{shard.name}", shard.sha256, shard.bytes)
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=fetch_and_die, args=arguments)
    victim.start()
    victim.join(20)
    assert victim.exitcode == 9
    assert list((tmp_path / "cache").glob(f".{shard.sha256}.*.part"))
    several = [context.Process(target=fetch_from, args=arguments) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(30)
    assert [process.exitcode for process in several] == [0] * 4
    assert server.asked.count(shard.name) == 1
    assert not list((tmp_path / "cache").glob(".*.part"))
