"""Lines of a run: in a local folder, and in a real S3-compatible server on loopback."""

import json
from pathlib import Path

import pytest

from distributed.guard import log_line
from distributed.run_log import (
    CONSUMED,
    EVENTS,
    METRICS,
    Part,
    RunLog,
    assemble,
    is_complete,
    join_parts,
    read,
    records,
)
from shards.storage import list_names


def step(samples: int, attempt: str = "") -> bytes:
    return log_line(samples, attempt, [samples], 0.0)


def point(log: RunLog, samples: int, value: float) -> None:
    with (log.folder / METRICS).open("a") as file:
        record = {"time": 1, "step": samples, "metrics": {"train/loss": value}}
        file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], b""),
        ([(1, 0, b"a\nb\n"), (1, 4, b"c\n")], b"a\nb\nc\n"),
        ([(1, 4, b"c\n"), (1, 0, b"a\nb\n")], b"a\nb\nc\n"),
        # The second attempt starts behind the first line, in the middle of a part.
        ([(1, 0, b"a\nb\n"), (1, 4, b"c\n"), (2, 2, b"B\nC\n")], b"a\nB\nC\n"),
        # A process of the first attempt that is still alive writes late.
        ([(1, 0, b"a\n"), (2, 2, b"B\n"), (1, 2, b"b\nc\nd\n")], b"a\nB\n"),
        # It was written twice, because the answer to the first write was lost.
        ([(1, 0, b"a\n"), (1, 2, b"b\n"), (1, 2, b"b\nc\n"), (1, 6, b"d\n")], b"a\nb\nc\nd\n"),
        # The third goes back behind all that the second one wrote.
        ([(1, 0, b"a\n"), (2, 2, b"B\n"), (3, 0, b"1\n"), (3, 2, b"2\n")], b"1\n2\n"),
    ],
)
def test_a_later_attempt_replaces_what_it_makes_again(
    parts: list[tuple[int, int, bytes]], expected: bytes
) -> None:
    named = [Part(n, start, start + len(content), "") for n, start, content in parts]
    assert assemble(named, [content for *_, content in parts]) == expected


def test_lines_survive_the_node_and_none_is_doubled(place: str) -> None:
    run = place
    first = RunLog(run, 0)
    first.resume(0)
    for samples in (8, 16):
        first.consumed(step(samples, "first"))
        point(first, samples, samples / 100)
    first.keep()  # with the checkpoint at 16
    first.consumed(step(24, "first"))
    point(first, 24, 0.24)
    first.keep()
    first.consumed(step(32, "lost"))  # the node is lost with these
    if not first.in_store:
        return  # a shared folder keeps all lines, as the test below says
    second = RunLog(run, 0)
    assert second.folder != first.folder
    second.resume(16)
    kept = (second.folder / METRICS).read_bytes()
    assert [r["step"] for r in records(kept)] == [8, 16, 24]  # MLflow may have the third already
    for samples in (24, 32):
        second.consumed(step(samples, "second"))
    point(second, 32, 0.32)
    second.close()
    lines = records(read(run, CONSUMED))
    assert [(r["samples"], r["consumed"]) for r in lines] == [
        (8, "first"),
        (16, "first"),
        (24, "second"),
        (32, "second"),
    ]
    assert [r["step"] for r in records(read(run, METRICS))] == [8, 16, 24, 32]
    assert not second.folder.exists()


def test_a_folder_has_plain_files_with_all_lines_of_all_attempts(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        log = RunLog(str(tmp_path), 0)
        log.resume(0)
        log.consumed(step(8, attempt))
        log.event(f"{attempt} happened")
        log.close()
    assert [r["consumed"] for r in records((tmp_path / CONSUMED).read_bytes())] == [
        "first",
        "second",
    ]
    assert len((tmp_path / EVENTS).read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONSUMED, EVENTS]


def test_events_of_all_ranks_are_kept_at_once(place: str) -> None:
    logs = [RunLog(place, rank) for rank in (0, 1)]
    for number in range(3):
        for rank, log in enumerate(logs):
            log.event(f"rank {rank}: event {number}")
    for log in logs:
        log.close()
    told = [line.split(" ", 2)[2] for line in read(place, EVENTS).decode().splitlines()]
    assert sorted(told) == sorted(f"rank {r}: event {n}" for r in (0, 1) for n in range(3))
    own = [line for line in told if line.startswith("rank 0")]
    assert own == sorted(own)


@pytest.mark.parametrize(
    ("names", "last", "expected"),
    [
        ([], "", True),
        ([], "1-0-4", False),
        ([(1, 0, 4)], "1-0-4", True),
        ([(1, 0, 4)], "1-4-8", False),  # the newest is not listed yet
        ([(1, 0, 4), (1, 8, 9)], "1-8-9", False),  # one between them is not
        ([(1, 0, 4), (1, 4, 8)], "", True),
        ([(1, 0, 4), (1, 0, 8), (1, 8, 9)], "1-8-9", True),  # written twice, the answer was lost
        ([(1, 0, 8), (2, 4, 6), (2, 6, 7)], "2-6-7", True),
        ([(1, 0, 8), (2, 4, 6), (2, 7, 9)], "2-7-9", False),
    ],
)
def test_a_part_that_is_not_listed_is_noticed(
    names: list[tuple[int, int, int]], last: str, expected: bool
) -> None:
    parts = [Part(*numbers, "-".join(map(str, numbers))) for numbers in names]
    assert is_complete(parts, last) == expected


def test_half_a_line_is_kept_when_it_is_whole(bucket: str) -> None:
    run = f"{bucket}/logs/half"
    log = RunLog(run, 0)
    log.resume(0)
    whole = step(8)
    log.consumed(whole + step(16)[:10])
    log.keep()
    assert read(run, CONSUMED) == whole
    log.consumed(step(16)[10:])
    log.close()
    assert read(run, CONSUMED) == whole + step(16)


def test_files_beside_the_lines_and_the_joined_files(bucket: str) -> None:
    run = f"{bucket}/logs/files"
    log = RunLog(run, 0)
    log.resume(0)
    (log.folder / "validation" / "8").mkdir(parents=True)
    (log.folder / "validation" / "8" / "report.json").write_text("{}")
    log.consumed(step(8))
    log.keep()
    log.event("one")
    log.close()
    assert list_names(f"{run}/validation/8") == ["report.json"]
    join_parts(run)
    assert list_names(run) == [CONSUMED, EVENTS, "log", "validation"]
    assert read(run, CONSUMED) == step(8)
