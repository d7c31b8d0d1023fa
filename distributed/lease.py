"""One owner of a folder at a time: of a run, a trial or a search.

In a local folder the operating system holds a lock, which a killed process loses at once. In an
object store there are no locks. There the owner keeps an object `owner.json` with its name, and
rewrites it every `BEAT_S` seconds. The store accepts a write only if the object is still the one
that the writer has read (S3: `If-None-Match` and `If-Match`), so of several processes exactly one
becomes the owner. An owner whose object does not change for `DEAD_S` seconds is dead, and the next
process replaces it. Clocks of two machines are never compared.

Some stores accept a conditional write and ignore its condition. Each owner tries that at first. In
such a store the object is written, and read back after `SETTLE_S` seconds; an owner also reads it
before each heartbeat, so of two that started at once one soon ends itself.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psutil
from filelock import FileLock, Timeout

from shards.patience import http_status, reason
from shards.storage import is_local, open_folder, read_json

OWNER = "owner.json"
"""File of a folder: who owns it now."""
NOT_AS_READ, NOT_IMPLEMENTED = 412, 501
"""Answers to a conditional write: the object has changed; the store does not know conditions."""
NO_VERSION = '"00000000000000000000000000000000"'
"""A version (ETag) that no object has."""
LOCK = "running.lock"
"""The lock of a local folder."""
BEAT_S = 10.0
"""Seconds between two heartbeats of an owner in a store."""
DEAD_S = 3.5 * BEAT_S
"""Seconds without a heartbeat after which an owner is dead: three are missing."""
SETTLE_S = 2.0
"""Seconds after which a write to a store without conditional writes is read back."""

log = logging.getLogger(__name__)


class InUseError(ValueError):
    """Another process owns the folder."""


@dataclass(frozen=True)
class Owner:
    """A process that works in a folder."""

    token: str
    """Identity of this ownership; two of one process differ."""
    host: str
    """Name of its machine or container."""
    processes: str
    """The started system and the namespace in which `pid` is unique; empty if not known."""
    pid: int
    """Its process id."""
    started: float
    """When the process started, in seconds since 1970 by its own clock."""
    since: str
    """Date and time since when it owns the folder, by its own clock."""
    beat: int = 0
    """Number of the last heartbeat."""

    def __str__(self) -> str:
        """`process 12 on host a since Fri Nov 27 02:00:00 2026`."""
        return f"process {self.pid} on host {self.host} since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether it ran beside this process and has ended; False if that is not known."""
        if not self.processes or self.processes != _processes():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


UNKNOWN = Owner(token="", host="unknown", processes="", pid=0, started=0.0, since="unknown")
"""Stands for an owner whose file cannot be read."""


def this_process() -> Owner:
    """A new ownership of this process."""
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        processes=_processes(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=time.ctime(),
    )


def _processes() -> str:
    """See `Owner.processes`. Two containers may have the same host name, and reuse process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return ""


@contextlib.contextmanager
def exclusive(
    folder: str, *, wait_s: float = 0.0, say: Callable[[str], object] = log.info
) -> Iterator["Lease"]:
    """Work in `folder`, a local one or a URI, alone.

    Args:
        folder: need not exist.
        wait_s: seconds to wait for another owner to end. In a store it takes up to `DEAD_S`
            seconds more to find out whether the other owner is dead.
        say: gets a line about such a wait.

    Raises:
        InUseError: another process still works there; says which, since when, and what to do.
    """
    fs, root = open_folder(folder)
    lock = _locked if is_local(fs) else _leased
    with lock(fs, root, Lease(folder, this_process()), wait_s, say) as lease:
        yield lease


@dataclass
class Lease:
    """The ownership that `exclusive` gives."""

    folder: str
    owner: Owner
    lost: str = ""
    """Why this process no longer owns the folder, in words; empty while it owns it."""


def in_use(folder: str) -> bool:
    """Whether a process works in `folder` now; in a store, whether one did a moment ago."""
    fs, root = open_folder(folder)
    if not is_local(fs):
        there = _read(fs, f"{root}/{OWNER}")
        return there is not None and not there[0].is_gone
    if not (Path(root) / LOCK).exists():
        return False
    try:
        with FileLock(Path(root) / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def owns(folder: str, token: str) -> bool:
    """Whether the ownership `token` is still the one of `folder`; a worker asks for its driver."""
    fs, root = open_folder(folder)
    there = _read(fs, f"{root}/{OWNER}")
    return there is not None and there[0].token == token


def refusal(folder: str, owner: Owner | None) -> InUseError:
    """The error for a second process."""
    who = str(owner) if owner else "another process"
    return InUseError(
        f"{folder} is in use by {who}; wait until it ends, or end it. If it is dead already, the "
        f"same command works after {DEAD_S:.0f} s; use another --name for another run"
    )


# ---- local folders -------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(
    fs: fsspec.AbstractFileSystem,
    root: str,
    lease: Lease,
    wait_s: float,
    _say: Callable[[str], object],
) -> Iterator[Lease]:
    path, holder = Path(root) / LOCK, Path(root) / OWNER
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=wait_s):
            # In another file than the lock, because a process that waits empties the lock's file.
            holder.write_text(json.dumps(dataclasses.asdict(lease.owner)))
            try:
                yield lease
            finally:
                holder.unlink(missing_ok=True)
    except Timeout as error:
        there = _read(fs, str(holder))  # None: it has the lock, and has not written its name yet
        raise refusal(lease.folder, there[0] if there else None) from error


# ---- object stores -------------------------------------------------------------------------------


@contextlib.contextmanager
def _leased(
    fs: fsspec.AbstractFileSystem,
    root: str,
    lease: Lease,
    wait_s: float,
    say: Callable[[str], object],
) -> Iterator[Lease]:
    path = f"{root}/{OWNER}"
    claim = _Claim(fs, path, lease.folder, say)
    version = _acquire(claim, lease, wait_s, say)
    # A renewal is retried for `BEAT_S` only: a later one would be useless.
    claim.fs = open_folder(lease.folder, patience_s=BEAT_S)[0]
    stop = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(claim, lease, version, stop, say), name="lease", daemon=True
    )
    beating.start()
    try:
        yield lease
    finally:
        stop.set()
        beating.join()
        claim.release(lease.owner)


def _acquire(claim: "_Claim", lease: Lease, wait_s: float, say: Callable[[str], object]) -> str:
    """Become the owner; the version of the object that says so."""
    deadline = time.monotonic() + wait_s
    seen, seen_at = "", time.monotonic()
    while True:
        asked = time.monotonic()
        there = claim.read()
        if time.monotonic() - asked > DEAD_S / 2:
            seen_at = time.monotonic()  # the store failed, so the owner could not write either
        if there is None:
            if version := claim.write(lease.owner, replaces=None):
                return version
            continue
        owner, version = there
        if version != seen:
            # The first read does not show that the owner is alive: it may have died since.
            if seen and time.monotonic() >= deadline:
                raise refusal(lease.folder, owner)
            if not seen and not owner.is_gone:
                say(
                    f"{lease.folder} was in use by {owner}; waiting up to {DEAD_S:.0f} s to see "
                    "whether that process is alive"
                )
            seen, seen_at = version, time.monotonic()
        if owner.is_gone or time.monotonic() - seen_at >= DEAD_S:
            say(f"{lease.folder}: {owner} is dead; this process takes its place")
            if mine := claim.write(lease.owner, replaces=version):
                return mine
            continue
        time.sleep(min(1.0, BEAT_S / 4))


def _beat(
    claim: "_Claim",
    lease: Lease,
    version: str,
    stop: threading.Event,
    say: Callable[[str], object],
) -> None:
    """Rewrite the object until the end; note it if another process has taken it."""
    beat = 0
    while not stop.wait(BEAT_S):
        beat += 1
        try:
            mine = claim.write(dataclasses.replace(lease.owner, beat=beat), replaces=version)
            there = None if mine else claim.read()
        except OSError as error:  # the store fails; the next beat tries again
            say(
                f"the ownership of {lease.folder} could not be renewed "
                f"({reason(error.__cause__ or error)}); retrying. After {DEAD_S:.0f} s without a "
                "renewal another command may take the run"
            )
            continue
        if mine:
            version = mine
        elif there and there[0].token == lease.owner.token:
            version = there[1]  # the answer to an earlier write was lost
        else:
            lease.lost = f"{there[0]} owns the run now" if there else f"{OWNER} was removed"
            return


class _Claim:
    """The object `owner.json` of a folder in a store."""

    def __init__(
        self, fs: fsspec.AbstractFileSystem, path: str, folder: str, say: Callable[[str], object]
    ) -> None:
        """Of `folder`, at `path`; `say` gets a line if the store ignores conditions."""
        self.fs, self._path, self._folder, self._say = fs, path, folder, say
        self._conditional: bool | None = None if "s3" in fs.protocol else False

    def read(self) -> tuple[Owner, str] | None:
        """The owner, and the version of the object that names it; None where there is none."""
        return _read(self.fs, self._path)

    def write(self, owner: Owner, *, replaces: str | None) -> str:
        """Write the owner if the object is still as it was read.

        Args:
            owner: to write.
            replaces: the version that was read; None if there was no object.

        Returns:
            Its new version; empty if the object is not as it was read.

        Raises:
            OSError: the store failed.
        """
        data = json.dumps(dataclasses.asdict(owner)).encode()
        if self._conditional is not False:
            # The answer to a successful write may be lost; then the next try is refused.
            written = self._put(data, replaces) or self._holds(owner)
            if written and self._conditional is None:
                self._check_conditions(data)
            if self._conditional is not False:
                return written
        elif self._version() == (replaces or ""):
            self.fs.pipe_file(self._path, data)
        else:
            return ""
        if replaces is None or owner.beat == 0:  # another process may do the same now
            time.sleep(SETTLE_S)
        return self._holds(owner)

    def release(self, owner: Owner) -> None:
        """Remove the object if it is still this owner's."""
        with contextlib.suppress(OSError):  # then the next owner waits until this one is dead
            there = self.read()
            if there and there[0].token == owner.token:
                self.fs.rm_file(self._path)

    def _put(self, data: bytes, replaces: str | None) -> str:
        """A conditional write; the new version, or empty if the store refused it."""
        condition = {"mode": "create"} if replaces is None else {"IfMatch": replaces}
        try:
            return str(self.fs.pipe_file(self._path, data, **condition)["ETag"])
        except (FileExistsError, FileNotFoundError):
            return ""
        except OSError as error:
            if http_status(error) == NOT_IMPLEMENTED:
                self._conditional = False
                self._warn()
            elif http_status(error) != NOT_AS_READ:
                raise
            return ""

    def _check_conditions(self, data: bytes) -> None:
        """Find out whether the store refuses writes whose condition is not met."""
        self._conditional = not self._put(data, None) and not self._put(data, NO_VERSION)
        if not self._conditional:
            self._warn()

    def _warn(self) -> None:
        self._say(
            f"the store of {self._folder} ignores the conditions of writes (If-None-Match, "
            "If-Match). If two commands start this run in the same moment, both may train for up "
            f"to {BEAT_S + SETTLE_S:.0f} s; then one ends itself. Use a store with conditional "
            "writes, or start one command at a time"
        )

    def _holds(self, owner: Owner) -> str:
        """The version of the object if it names this owner at this beat; else empty."""
        there = self.read()
        return there[1] if there and there[0] == owner else ""

    def _version(self) -> str:
        there = self.read()
        return there[1] if there else ""


def _read(fs: fsspec.AbstractFileSystem, path: str) -> tuple[Owner, str] | None:
    """The owner, and the version of the object that names it; None where there is none."""
    try:
        version = "" if is_local(fs) else _version(fs, path)
    except FileNotFoundError:
        return None
    try:
        return Owner(**read_json(fs, path)), version
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # half-written by a full disk, or by another version
        return UNKNOWN, version


def _version(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """What changes whenever the object is written."""
    about: dict[str, Any] = fs.info(path)
    tag = about.get("ETag") or about.get("etag") or about.get("generation")
    return str(tag if tag is not None else fs.checksum(path))
