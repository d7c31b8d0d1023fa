"""Retries operations on a store that fails, and says so.

Stores answer 500 or 503 for a while, are slow, or cut connections. Their libraries retry for some
seconds without a word. Here an operation is retried for `PATIENCE_S` seconds, and a line says which
operation fails at which store, why, and how long it is still retried.
"""

import errno
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

PATIENCE_S = 300.0
"""Seconds for which an operation is retried."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Seconds between two tries: at first, and at most; doubled each time."""
SAY_AFTER_S = 3.0
"""A shorter failure is not worth a line."""
SLOW_S = 10.0
"""Seconds without an answer after which a line says so."""
SLOW_BYTES = 5e6
"""Bytes a second at which a write is slow."""
SAY_EVERY_S = 30.0
"""Seconds between two lines about one store."""
T = TypeVar("T")

log = logging.getLogger(__name__)


class StoreError(OSError):
    """A store failed for longer than `PATIENCE_S`."""


class Patient:
    """A file system of fsspec whose operations are retried while its store fails.

    Streams (`open`) are not retried: their user has to start again.
    """

    OPERATIONS: ClassVar = {
        "cat": "reading",
        "cat_file": "reading",
        "checksum": "reading",
        "exists": "looking for",
        "glob": "listing",
        "info": "looking for",
        "ls": "listing",
        "makedirs": "preparing",
        "pipe_file": "writing",
        "put_file": "writing",
        "rm": "removing",
        "rm_file": "removing",
        "size": "looking for",
    }

    def __init__(self, fs: Any, patience_s: float | None = None) -> None:
        """Retry operations of `fs` for `patience_s` seconds; None: `PATIENCE_S`."""
        self._fs, self._patience_s = fs, patience_s

    def __getattr__(self, name: str) -> Any:
        """An attribute of the file system; its operations are retried."""
        if name.startswith("_"):  # of this object itself, while it is copied
            raise AttributeError(name)
        found, doing = getattr(self._fs, name), self.OPERATIONS.get(name)
        if doing is None:
            return found

        @functools.wraps(found)
        def patiently(path: str | list[str], *args: Any, **kwargs: Any) -> Any:
            one = path if isinstance(path, str) else (path or [""])[0]
            place = self._fs.unstrip_protocol(args[0] if name == "put_file" else one)
            slow_s = SLOW_S + (len(args[0]) / SLOW_BYTES if name == "pipe_file" else 0.0)
            return retrying(
                doing, place, lambda: found(path, *args, **kwargs), self._patience_s, slow_s
            )

        return patiently


def retrying(
    doing: str,
    place: str,
    action: Callable[[], T],
    patience_s: float | None = None,
    slow_s: float | None = None,
) -> T:
    """The result of an action on a store; retried with growing pauses while the store fails.

    Args:
        doing: the action in one word, such as `reading`.
        place: URI of what it is done to.
        action: what to do.
        patience_s: seconds for which it is retried; None: `PATIENCE_S`.
        slow_s: seconds after which a line says that there is no answer yet; None: never.

    Raises:
        StoreError: it still failed after `patience_s`.
        Exception: one that a retry cannot change, see `is_final`.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    started, pause, told = time.monotonic(), PAUSE_S, False
    while True:
        try:
            with _watched(doing, place, slow_s):
                result = action()
            break
        except Exception as error:  # each store's library has exceptions of its own
            if is_final(error):
                if http_status(error) in (401, 403) and not isinstance(error, OSError):
                    raise PermissionError(
                        f"{doing} {place} is not allowed ({reason(error)}); check its credentials"
                    ) from error
                raise
            passed = time.monotonic() - started
            left, why = patience_s - passed, reason(error)
            if left <= 0:
                raise StoreError(
                    f"{doing} {place} failed for {passed:.0f} s, the last time with {why}; check "
                    "that the store can be reached, then run the same command again"
                ) from error
            if passed >= SAY_AFTER_S:
                line = f"{doing} {place} has failed for {passed:.0f} s ({why})"
                told |= say(place, f"{line}; retrying for up to {left:.0f} s")
            time.sleep(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE_S)
    if told:
        passed = time.monotonic() - started
        say(place, f"{doing} {place} works again after {passed:.0f} s", always=True)
    return result


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Inside the block, for a command that somebody waits for, retry for so many seconds."""
    global PATIENCE_S
    before, PATIENCE_S = PATIENCE_S, seconds
    try:
        yield
    finally:
        PATIENCE_S = before


def is_final(error: BaseException) -> bool:
    """Whether a retry cannot change this: no such file, no permission, a wrong request, a full
    disk, a bug."""
    if isinstance(error, _FINAL) or http_status(error) in _FINAL_STATUS:
        return True
    return isinstance(error, OSError) and error.errno in _FULL


_FINAL_STATUS = {401, 403, 404, 405, 411, 412, 416, 501}
"""Answers of a store that are the same at the next try. Not 400: a cut upload may get it."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_FINAL: tuple[type[Exception], ...] = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
try:
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    _FINAL += (NoCredentialsError, PartialCredentialsError)
except ImportError:  # the extra `s3` is not installed
    pass


def http_status(error: BaseException) -> int | None:
    """The status of a store's answer that made a library raise this; None if it had none."""
    cause = error.__cause__ or error
    answer = getattr(cause, "response", None)  # of botocore
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(cause, "status", None) or getattr(cause, "code", None)
    return status if isinstance(status, int) else None


def reason(error: BaseException) -> str:
    """An error of a store in one line."""
    status = http_status(error)
    said = getattr(error, "strerror", None) or str(error)
    text = " ".join(said.split()) or type(error).__name__
    return f"HTTP {status}, {text}" if status else f"{type(error).__name__}: {text}"


# ---- what is said --------------------------------------------------------------------------------

_lock = threading.Lock()
_said: dict[str, float] = {}
_listener: tuple[int, Callable[[str], object]] | None = None


def listen(listener: Callable[[str], object] | None) -> None:
    """Give the lines of this process to `listener`; None: to Python's logging, as at first."""
    global _listener
    _listener = None if listener is None else (os.getpid(), listener)


def say(place: str, line: str, *, always: bool = False) -> bool:
    """Say a line, unless there was one about this store a moment ago.

    Returns:
        Whether it was said.
    """
    store, now = "/".join(place.split("/")[:3]), time.monotonic()
    with _lock:
        if not always and now - _said.get(store, -SAY_EVERY_S) < SAY_EVERY_S:
            return False
        _said[store] = now
    if _listener is not None and _listener[0] == os.getpid():  # not in a process forked since
        _listener[1](line)
    else:
        log.warning("%s", line)
    return True


@contextmanager
def _watched(doing: str, place: str, slow_s: float | None) -> Iterator[None]:
    """Say so if the block takes long."""
    if slow_s is None:
        yield
        return
    line = f"{doing} {place}: no answer for {slow_s:.0f} s; waiting"
    timer = threading.Timer(slow_s, say, (place, line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
