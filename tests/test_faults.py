"""A store that fails: errors, slow answers, cut connections, lost answers, listings that come late.

The store is a real S3-compatible server on loopback, behind a proxy that fails (`tests.faults`).
"""

import dataclasses
import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from s3fs import S3FileSystem

from distributed import lease, run_log
from distributed.checkpoint import listed, newest_complete, prune
from distributed.goodput import Attempt, Launch, Launches
from distributed.guard import log_line
from distributed.lease import InUseError, exclusive, owns
from distributed.run_log import CONSUMED, EVENTS, RunLog, join_parts, read, records
from shards import manifest, patience, storage
from shards.config import DataConfig
from shards.packing import pack
from shards.patience import StoreError, is_final
from shards.stream import TrainStream, pictures
from tests.faults import Fault, Proxy
from tests.test_stores import write as write_checkpoint

Faulty = tuple[str, Proxy]
ERRORS = [Fault("status", 500, count=3), Fault("status", 503, count=3)]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with shorter times, and without the silent retries of the store's library."""
    settings = storage._S3["config_kwargs"]
    monkeypatch.setitem(settings, "retries", {"mode": "standard", "total_max_attempts": 1})
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(patience, "PAUSE_S", 0.05)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.3)
    monkeypatch.setattr(patience, "SAY_AFTER_S", 0.0)
    monkeypatch.setattr(patience, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr(patience, "PATIENCE_S", 60.0)


@pytest.fixture
def told() -> "list[str]":
    lines: list[str] = []
    patience.listen(lines.append)
    yield lines
    patience.listen(None)


def of_botocore(status: int) -> OSError:
    error = OSError(errno.EINVAL, "as s3fs translates it")
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "x"}}
    error.__cause__ = ClientError(answer, "PutObject")  # type: ignore[arg-type]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), True),
        (PermissionError("x"), True),
        (NoCredentialsError(), True),
        (KeyError("a bug"), True),
        (OSError(errno.ENOSPC, "the disk of this node is full"), True),
        (of_botocore(412), True),
        (of_botocore(501), True),
        (of_botocore(400), False),  # IncompleteBody, after a cut upload
        (of_botocore(409), False),
        (of_botocore(500), False),
        (of_botocore(503), False),
        (TimeoutError(), False),
        (ConnectionResetError(), False),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), False),
    ],
)
def test_what_a_retry_cannot_change_is_not_retried(error: Exception, expected: bool) -> None:
    assert is_final(error) == expected


def all_operations(place: str, folder: Path) -> list[tuple[str, Callable[[], object], object]]:
    """What the log says, the operation, and its result; in an order that works."""
    (folder / "local").write_bytes(b"local")
    return [
        ("writing", lambda: storage.write(f"{place}/a", b"x" * 1000), None),
        ("writing", lambda: storage.upload(str(folder / "local"), f"{place}/b"), None),
        ("reading", lambda: storage.read(f"{place}/a"), b"x" * 1000),
        ("reading", lambda: storage.size_and_sha256(f"{place}/b")[0], 5),
        ("looking for", lambda: storage.exists(f"{place}/a"), True),
        ("", lambda: storage.list_names(place), ["a", "b"]),
        ("listing", lambda: list(storage.find(f"{place}/*").values()), [1000, 5]),
        ("removing", lambda: storage.remove(f"{place}/a"), None),
    ]


@pytest.mark.parametrize("fault", ERRORS, ids=lambda fault: str(fault.status))
def test_operations_wait_and_say_so(
    faulty: Faulty, tmp_path: Path, told: list[str], fault: Fault
) -> None:
    place, proxy = faulty
    for doing, operation, expected in all_operations(place, tmp_path):
        told.clear()
        with proxy.failing(dataclasses.replace(fault)):
            assert operation() == expected
        first, last = told[0], told[-1]
        assert f"{doing} {place}" in first and f"HTTP {fault.status}" in first
        assert "retrying for up to" in first and "works again after" in last
    assert storage.list_names(place) == ["b"]


@pytest.mark.parametrize("kind", ["cut upload", "lost answer", "cut answer"])
def test_a_cut_connection_leaves_whole_objects(faulty: Faulty, tmp_path: Path, kind: str) -> None:
    place, proxy = faulty
    methods = ("GET",) if kind == "cut answer" else ("PUT", "POST", "DELETE")
    for _, operation, expected in all_operations(place, tmp_path):
        with proxy.failing(Fault(kind, count=5, methods=methods)):  # type: ignore[arg-type]
            assert operation() == expected
    assert storage.list_names(place) == ["b"] and storage.read(f"{place}/b") == b"local"


def test_a_large_upload_that_is_cut_is_written_once_and_whole(faulty: Faulty) -> None:
    place, proxy = faulty
    data = torch.arange(13 * 2**20, dtype=torch.int64).numpy().tobytes()  # in parts of 50 MiB
    with proxy.failing(Fault("cut upload", methods=("PUT",), name="partNumber=2", count=3)):
        storage.write(f"{place}/large", data)
    assert storage.read(f"{place}/large") == data


def test_a_slow_store_is_waited_for_and_named(
    faulty: Faulty, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SLOW_S", 1.0)
    place, proxy = faulty
    with proxy.failing(Fault("slow", seconds=2.0, count=1)):
        storage.write(f"{place}/a", b"x")
    assert told == [f"writing {place}/a: no answer for 1 s; waiting"]


def test_a_store_that_stays_away_ends_it_with_what_to_do(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    place, proxy = faulty
    with (
        proxy.failing(Fault("status", 500)),
        pytest.raises(StoreError, match=r"a failed for \d s.*HTTP 500.*run the same command again"),
    ):
        storage.read(f"{place}/a")
    before = len(proxy.requests)
    with pytest.raises(FileNotFoundError):
        storage.read(f"{place}/a")
    assert len(proxy.requests) <= before + 2


# ---- a run ---------------------------------------------------------------------------------------

RUN_FAULTS = [
    *ERRORS,
    Fault("cut upload", count=2, methods=("PUT",)),
    Fault("lost answer", count=2, methods=("PUT", "DELETE")),
    Fault("slow", seconds=0.3, count=2),
]


def kinds(fault: Fault) -> str:
    return f"{fault.kind} {fault.status}".replace(" ", "-")


@pytest.mark.parametrize("fault", RUN_FAULTS, ids=kinds)
def test_checkpoints_are_neither_lost_nor_doubled(faulty: Faulty, fault: Fault) -> None:
    run, proxy = faulty
    for samples in (8, 16, 24):
        with proxy.failing(dataclasses.replace(fault)):
            write_checkpoint(run, samples)
    with proxy.failing(dataclasses.replace(fault)):
        assert [c.samples for c in listed(run)] == [8, 16, 24]
    with proxy.failing(dataclasses.replace(fault)):
        assert len(prune(run, 1)) == 2
    with proxy.failing(dataclasses.replace(fault)):
        newest = newest_complete(run)
    assert newest is not None and newest.tensors("ema")["a"].tolist() == [24, 24]
    with proxy.failing(dataclasses.replace(fault, methods=("GET",), name="safetensors")):
        assert newest.problem() is None
    assert len(storage.list_names(f"{run}/checkpoints")) == 2  # it, and the file that names it


@pytest.mark.parametrize("fault", RUN_FAULTS, ids=kinds)
def test_lines_are_neither_lost_nor_doubled(faulty: Faulty, fault: Fault) -> None:
    run, proxy = faulty
    for first in (0, 32):
        with proxy.failing(dataclasses.replace(fault)):
            log = RunLog(run, 0)
            log.resume(first)
            for samples in range(first + 8, first + 33, 8):
                log.consumed(log_line(samples, "", [samples], 0.0))
                log.event(f"at {samples}")
                log.keep()
            log.close()
    with proxy.failing(dataclasses.replace(fault)):
        join_parts(run)
    steps = [*range(8, 65, 8)]
    assert [line["samples"] for line in records(storage.read(f"{run}/{CONSUMED}"))] == steps
    events = storage.read(f"{run}/{EVENTS}").decode().splitlines()
    assert [line.split(" at ")[1] for line in events] == [str(step) for step in steps]


def test_a_part_whose_answer_was_lost_is_not_doubled(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has it, and the worker, which does not know that, sends it again with more."""
    run, proxy = faulty
    log = RunLog(run, 0)
    log.resume(0)
    log.consumed(log_line(8, "", [8], 0.0))
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    with proxy.failing(Fault("lost answer", methods=("PUT",))), pytest.raises(StoreError):
        log.keep()
    log.consumed(log_line(16, "", [16], 0.0))
    log.close()
    assert len(storage.list_names(f"{run}/log/{CONSUMED}")) == 2
    assert [line["samples"] for line in records(read(run, CONSUMED))] == [8, 16]


def test_listings_that_come_late_hide_nothing(
    faulty: Faulty, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, proxy = faulty
    old = Launch(1.0, [Attempt(0, 8)])

    def work(first: int) -> None:
        log = RunLog(run, 0)
        log.resume(first)
        log.consumed(log_line(first + 8, "", [first], 0.0))
        log.keep()
        log.close()
        write_checkpoint(run, first + 8)

    work(0)
    Launches(run).keep(old)
    assert len(listed(run)) == 1 and read(run, CONSUMED)  # listings of now are kept by the proxy
    work(8)
    with proxy.failing(Fault("stale listing", seconds=10**6)):
        newest = newest_complete(run)
        assert newest is not None and newest.samples == 16
        Launches(run).keep(old)
    late = Fault("stale listing", seconds=10**6, until=time.monotonic() + 3.0, name=CONSUMED)
    with proxy.failing(late):
        started = time.monotonic()
        work(16)
        assert time.monotonic() - started >= 1.0 and late.hits
    assert any("does not list all parts yet" in line for line in told)
    assert [line["samples"] for line in records(read(run, CONSUMED))] == [8, 16, 24]
    with proxy.failing(Fault("stale listing", seconds=10**6)):
        prune(run, 1)  # of what is not listed it removes nothing
    assert [c.samples for c in listed(run)][-1] == 24
    assert storage.list_names(f"{run}/log/launches") == ["00000.json", "00001.json"]
    monkeypatch.setattr(run_log, "LISTED_S", 0.5)  # a part that was deleted
    fs, root = storage.open_folder(f"{run}/log/{CONSUMED}")
    fs.rm_file(f"{root}/{storage.list_names(f'{run}/log/{CONSUMED}')[-1]}")
    assert [line["samples"] for line in records(read(run, CONSUMED))] == [8, 16]


def test_a_removed_checkpoint_that_is_still_listed_is_no_checkpoint(faulty: Faulty) -> None:
    run, proxy = faulty
    for samples in (8, 16):
        write_checkpoint(run, samples)
    assert len(listed(run)) == 2
    prune(run, 1)
    with proxy.failing(Fault("stale listing", seconds=10**6)):
        assert [c.samples for c in listed(run)] == [16]
        prune(run, 1)
        newest = newest_complete(run)
    assert newest is not None and newest.samples == 16


# ---- the owner of a run --------------------------------------------------------------------------


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    monkeypatch.setattr(lease, "DEAD_S", 3.0)


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("fault", RUN_FAULTS, ids=kinds)
def test_the_owner_stays_the_owner(faulty: Faulty, fault: Fault) -> None:
    run, proxy = faulty
    told: list[str] = []
    with proxy.failing(dataclasses.replace(fault)), exclusive(run, say=told.append) as own:
        pass
    with exclusive(run, say=told.append) as own:
        with proxy.failing(dataclasses.replace(fault)):
            time.sleep(1.5)
        time.sleep(0.5)
        assert owns(run, own.owner.token) and not own.lost
    assert storage.list_names(run) == []


@pytest.mark.usefixtures("short_lease")
def test_an_owner_does_not_count_as_dead_while_the_store_fails(faulty: Faulty) -> None:
    run, proxy = faulty
    refused: list[Exception] = []
    waiting = threading.Event()

    def second() -> None:
        try:
            with exclusive(run, say=lambda line: waiting.set()):
                pass
        except InUseError as error:
            refused.append(error)

    with exclusive(run, say=lambda line: None) as own:
        path = storage.open_folder(run)[1] + f"/{lease.OWNER}"
        thread = threading.Thread(target=second)
        # The second one reads the owner, and nobody is answered from then on.
        with proxy.failing(Fault("status", 500, methods=("PUT",))):
            thread.start()
            assert waiting.wait(10)
            with proxy.failing(Fault("status", 500, until=time.monotonic() + lease.DEAD_S + 1)):
                time.sleep(lease.DEAD_S + 1)
        thread.join(30)
        assert len(refused) == 1 and not own.lost, path


# ---- data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        cut = skimage.data.coffee()[20 * number : 20 * number + 48, 100:164]
        Image.fromarray(cut).save(folder / f"{number}.png")
    return folder


DATA = DataConfig(repeats={"denoise_25": 2}, crop=32, loader_workers=0, prefetch=0)


def batches(place: str, cache: Path) -> list[tuple[list[str], bytes]]:
    stream = TrainStream(dataclasses.replace(DATA, train=place, cache_dir=str(cache)), 5)
    sizes = {"global_batch": 4, "micro_batch": 4, "world": 1, "rank": 0}
    return [(b.keys, b.degraded.numpy().tobytes()) for b in stream.batches(0, 12, **sizes)]


@pytest.mark.parametrize("fault", RUN_FAULTS, ids=kinds)
def test_packing_training_and_evaluation_read_and_write_the_same(
    faulty: Faulty, photos: Path, tmp_path: Path, fault: Fault
) -> None:
    place, proxy = faulty
    expected = pack("clean", str(photos), str(tmp_path / "set"), workers=1, shard_mib=0.02)
    with proxy.failing(dataclasses.replace(fault)):
        made = pack("clean", str(photos), place, workers=1, shard_mib=0.02)
    assert made.fingerprint == manifest.read(place).fingerprint == expected.fingerprint
    with proxy.failing(dataclasses.replace(fault)):
        found = batches(place, tmp_path / "cache")
    assert found == batches(str(tmp_path / "set"), tmp_path / "none")
    data = dataclasses.replace(DATA, cache_dir=str(tmp_path / "other"))
    with proxy.failing(dataclasses.replace(fault)):
        shown = [picture.name for picture in pictures(place, limit=2, data=data)]
    assert shown == [p.name for p in pictures(str(tmp_path / "set"), limit=2)]


def test_no_sample_is_replaced_because_its_store_fails(
    faulty: Faulty, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = faulty
    pack("clean", str(photos), place, workers=1, shard_mib=0.02)
    stream = TrainStream(
        dataclasses.replace(
            DATA, train=place, cache_dir=str(tmp_path / "cache"), on_corrupt="substitute"
        ),
        5,
    )
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    sizes = {"global_batch": 4, "micro_batch": 4, "world": 1, "rank": 0}
    with (
        proxy.failing(Fault("status", 500, name=".tar")),
        pytest.raises((StoreError, ValueError), match=r"fetching .*tar failed for \d s"),
    ):
        next(stream.batches(0, 12, **sizes))
