"""The lines that a run writes while it trains, kept in its storage: a lost node loses none of them.

    metrics.jsonl    a line per point of the curves
    consumed.jsonl   a line per step: what was trained on
    events.log       a line per thing that went wrong, and what was done about it

In a local or mounted folder these are files of the run, to which each line is appended. An object
store cannot append. There each is a folder `RUN/log/NAME` of parts. A part is an object of some
whole lines; its name says which attempt wrote it and which bytes of the file it holds:

    ATTEMPT-START-END

`RUN/log/NAME.last` names the last part. Some stores list new objects late; whoever reads the parts
waits until the list is complete.

An attempt is one start of the workers. The first part of an attempt replaces all bytes from its
START on that earlier attempts wrote, so no step is in the log twice. An event is a part of its own,
because any rank may write one, and because it is often the last thing that a process does.

A run in a store that has ended has the three files too, joined from the parts.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from shards.patience import PAUSE_S, say
from shards.storage import is_local, is_remote, open_folder, write_whole

METRICS, CONSUMED, EVENTS = "metrics.jsonl", "consumed.jsonl", "events.log"
LOG = "log"
"""Folder of a run in a store, for the parts of these files."""
LAST = ".last"
END_S = 30.0
"""Seconds that the last events may take to reach the store."""
LISTED_S = 60.0
"""Seconds after which a part that is not listed counts as lost."""

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part of a file, from its name."""

    attempt: int
    start: int
    """Its first byte in the file."""
    end: int
    """The byte behind its last one."""
    name: str


class RunLog:
    """What one worker writes. The lines of metrics and steps are rank 0's, events are of all."""

    def __init__(self, run: str, rank: int) -> None:
        """Open the log of the run in the folder or URI `run`."""
        self._run, (self._fs, self._root) = run, open_folder(run)
        self._rank, self._attempt = rank, 0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.folder = Path(self._root)
        """Where the files are on this machine: the run's own folder, or a temporary one."""
        if self.in_store:
            self._scratch = tempfile.TemporaryDirectory(
                prefix="measnet-run-", ignore_cleanup_errors=True
            )
            self.folder = Path(self._scratch.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kept: dict[str, int] = {}
        self._files: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="events")
        self._events: list[Future[None]] = []

    @property
    def in_store(self) -> bool:
        """Whether the run is in an object store."""
        return "file" not in self._fs.protocol

    def resume(self, samples: int) -> None:
        """On rank 0, continue the log of earlier attempts, which may have run on other nodes.

        Steps after `samples`, where this attempt starts, are made again, so their lines are
        replaced. Points of the curves are kept, because MLflow may have them already; the tracker
        does not record them again.
        """
        if not self.in_store:
            return
        for name in (METRICS, CONSUMED):
            attempts = [part.attempt for part in _parts(self._fs, self._root, name)]
            self._attempt = max([self._attempt, *attempts])
            data = read(self._run, name)
            if name == CONSUMED:
                data = until(data, samples)
            (self.folder / name).write_bytes(data)
            self._kept[name] = len(data)
        self._attempt += 1

    def consumed(self, line: bytes) -> None:
        """Add the line of a step."""
        with (self.folder / CONSUMED).open("ab") as file:
            file.write(line)

    def event(self, line: str) -> None:
        """Add an event, with the time; does not wait for a store."""
        stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
        if not self.in_store:
            with (self.folder / EVENTS).open("a") as file:
                file.write(stamped)
            return
        name = f"{time.time_ns() // 1000:018d}-{self._rank:05d}-{len(self._events):06d}"
        path = f"{self._root}/{LOG}/{EVENTS}/{name}"
        self._events.append(self._sender.submit(write_whole, self._fs, path, stamped.encode()))

    def keep(self) -> None:
        """Copy to the store what is new: lines of all files, and files of folders beside them.

        Raises:
            OSError: the store failed.
        """
        if not self.in_store:
            return
        for name in (METRICS, CONSUMED):
            self.keep_lines(name)
        with self._lock:
            for path in self.folder.glob("*/**/*"):
                version = (path.stat().st_size, path.stat().st_mtime_ns)
                if path.is_file() and self._files.get(path) != version:
                    there = f"{self._root}/{path.relative_to(self.folder)}"
                    write_whole(self._fs, there, path.read_bytes())
                    self._files[path] = version

    def keep_lines(self, name: str) -> int:
        """Copy new lines of one file to the store; the position up to which all lines are kept.

        Raises:
            OSError: the store failed.
        """
        path = self.folder / name
        if not self.in_store:
            return path.stat().st_size if path.exists() else 0
        with self._lock:
            start = self._kept.get(name, 0)
            if path.exists():
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read()
                data = data[: data.rfind(b"\n") + 1]
                if data:
                    end = start + len(data)
                    part = f"{self._attempt:05d}-{start:013d}-{end:013d}"
                    write_whole(self._fs, f"{self._root}/{LOG}/{name}/{part}", data)
                    self._kept[name] = end
                    write_whole(self._fs, f"{self._root}/{LOG}/{name}{LAST}", part.encode())
            return self._kept.get(name, 0)

    def close(self) -> None:
        """Copy the rest; the temporary folder goes.

        Raises:
            OSError: the store failed.
        """
        self.keep()
        done, late = wait(self._events, timeout=END_S)
        lost = len(late) + sum(one.exception() is not None for one in done)
        if lost:
            log.warning("%d events could not be written to %s", lost, self._root)
        self._sender.shutdown(wait=False)
        if self._scratch is not None:
            self._scratch.cleanup()


def read(run: str, name: str) -> bytes:
    """All lines of a run's file, local or joined from its parts; empty if there is none.

    Args:
        run: folder or URI of the run.
        name: `METRICS`, `CONSUMED` or `EVENTS`.
    """
    fs, root = open_folder(run)
    parts = _parts(fs, root, name)
    if not parts:
        path = f"{root}/{name}"
        return bytes(fs.cat_file(path)) if fs.exists(path) else b""
    paths = [f"{root}/{LOG}/{name}/{part.name}" for part in parts]
    found = fs.cat(paths)
    contents = [found[path] for path in paths]
    return b"".join(contents) if name == EVENTS else assemble(parts, contents)


def assemble(parts: list[Part], contents: list[bytes]) -> bytes:
    """The file of which these are the parts, in any order.

    A part that is written again after a failure starts at the same byte and may have more lines.
    """
    data = bytearray()
    for part, content in sorted(zip(parts, contents, strict=True)):
        del data[part.start :]
        data += content
    return bytes(data)


def is_complete(parts: Sequence[Part], last: str) -> bool:
    """Whether no part is missing in a list.

    Args:
        parts: of one file, sorted.
        last: name of the part that was written last; empty if that is not known.
    """
    reached = 0
    for part in parts:
        if part.start > reached:
            return False
        reached = part.end
    return not last or last in {part.name for part in parts}


def records(lines: bytes) -> list[dict[str, Any]]:
    """The records of JSON lines; an incomplete last line is left out."""
    found = []
    for line in lines[: lines.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError):  # a full disk has cut a line
            found.append(json.loads(line))
    return found


def complete_lines(path: Path, start: int, end: int | None = None) -> tuple[bytes, int]:
    """Complete lines from byte `start` to `end`, and the position after the last of them."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(-1 if end is None else end - start)
    except FileNotFoundError:
        return b"", start
    complete = data[: data.rfind(b"\n") + 1]
    return complete, start + len(complete)


def until(lines: bytes, samples: int) -> bytes:
    """The log of consumed samples up to the step that ends with `samples` samples."""
    kept = lines.splitlines(keepends=True)
    while kept and json.loads(kept[-1])["samples"] > samples:
        kept.pop()
    return b"".join(kept)


def join_parts(run: str) -> None:
    """Write the files of a run in a store that has ended beside its other results."""
    if is_remote(run):
        fs, root = open_folder(run)
        for name in (METRICS, CONSUMED, EVENTS):
            if data := read(run, name):
                write_whole(fs, f"{root}/{name}", data)


def _parts(fs: fsspec.AbstractFileSystem, root: str, name: str) -> list[Part]:
    """Parts of a file in the order of their names; none in a local folder."""
    if is_local(fs):
        return []
    folder, started = f"{root}/{LOG}/{name}", time.monotonic()
    last = fs.cat_file(f"{folder}{LAST}").decode() if fs.exists(f"{folder}{LAST}") else ""
    while True:
        paths = fs.ls(folder, detail=False) if last or fs.exists(folder) else []
        found = [re.fullmatch(r"(\d+)-(\d+)-(\d+)", os.path.basename(path)) for path in paths]
        parts = sorted(Part(int(p[1]), int(p[2]), int(p[3]), p[0]) for p in found if p)
        if name == EVENTS or is_complete(parts, last):
            return parts
        passed = time.monotonic() - started
        if passed > LISTED_S:
            log.warning("%s lacks a part after %.0f s; some lines are lost", folder, passed)
            return parts
        say(folder, f"{folder}: the store does not list all parts yet; listing them again")
        time.sleep(PAUSE_S)
