"""Folders and object stores alike: small files read and written, shards brought in and out.

A place is a local folder or a URI of fsspec (`s3://bucket/folder`, `http://…`, `gs://…`). Local
writes are made aside and renamed, so a reader never sees half a file; object stores do the same by
themselves.
"""

import contextlib
import errno
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec

BLOCK = 1 << 20
"""Bytes that are copied at a time."""
T = TypeVar("T")
_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory", "file")


def is_remote(uri: str | os.PathLike[str]) -> bool:
    """Whether a place is reached through fsspec rather than the file system."""
    return "://" in str(uri) and not str(uri).startswith("file://")


def checked(uri: str | os.PathLike[str]) -> str:
    """The place as a string; ValueError for schemes that could run a command or are unknown."""
    text = str(uri)
    scheme = text.split(":", 1)[0] if "://" in text or text.startswith("pipe:") else ""
    if "::" in text or (scheme and scheme not in _SCHEMES):
        raise ValueError(
            f"{text!r} is not a folder or a store that is read here; known: a folder, "
            + ", ".join(f"{name}://" for name in _SCHEMES if name != "memory")
        )
    return text.removeprefix("file://").rstrip("/")


def join(uri: str, name: str) -> str:
    """`uri/name`."""
    return f"{uri}/{name}"


def _remote(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise ValueError(f"{uri} needs another package: {error}") from error


def retrying(what: str, action: Callable[[], T], attempts: int = 5, delay: float = 0.5) -> T:
    """The result of an action on a store; tried again, with growing pauses, where it fails.

    What is not there or not allowed is not tried again. OSError after the last try.
    """
    for attempt in range(attempts):
        try:
            return action()
        except (FileNotFoundError, PermissionError, ValueError):
            raise
        except Exception as error:  # each store's library has its own kinds
            if attempt + 1 >= attempts:
                raise OSError(
                    f"{what} failed {attempts} times, the last time with {type(error).__name__}: "
                    f"{error}; see that the store is up and whole, then run the same command again"
                ) from error
            time.sleep(delay * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError(f"attempts is {attempts}")


def exists(uri: str) -> bool:
    """Whether a file is there."""
    if not is_remote(uri):
        return os.path.exists(uri)
    filesystem, path = _remote(uri)
    # Listings kept from earlier would hide what another process wrote.
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


def names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; empty where there is no folder."""
    if not is_remote(uri):
        return sorted(entry.name for entry in os.scandir(uri)) if os.path.isdir(uri) else []
    filesystem, path = _remote(uri)
    filesystem.invalidate_cache()
    if not filesystem.exists(path):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, False))


def read(uri: str) -> bytes:
    """All bytes of a file."""
    if not is_remote(uri):
        return Path(uri).read_bytes()
    filesystem, path = _remote(uri)
    data: bytes = retrying(f"reading {uri}", lambda: filesystem.cat_file(path))
    return data


def write(uri: str, data: bytes) -> None:
    """A whole file or none: local files are written aside, synchronised and renamed."""
    if is_remote(uri):
        filesystem, path = _remote(uri)
        retrying(f"writing {uri}", lambda: filesystem.pipe_file(path, data))
        return
    with replacing(uri) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A name to write to; it takes the place of `path` when the block ends well and vanishes
    otherwise."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left to write {path}; free some, then run the same command again: "
                "it goes on where it stopped",
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def remove_unfinished(folder: str) -> None:
    """Removes what killed processes have half written; for whoever alone may write to a folder."""
    if not is_remote(folder):
        for left in Path(folder).glob(".*.part"):
            left.unlink(missing_ok=True)


def put(local: str, uri: str) -> None:
    """Moves a whole local file to its place."""
    if is_remote(uri):
        filesystem, path = _remote(uri)
        retrying(f"writing {uri}", lambda: filesystem.put_file(local, path))
        os.unlink(local)
        return
    os.replace(local, uri)


def remove(uri: str) -> None:
    """Removes a file; nothing happens where there is none."""
    if is_remote(uri):
        filesystem, path = _remote(uri)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(uri)


def size_and_sha256(uri: str) -> tuple[int, str]:
    """Of a file, read once; FileNotFoundError where there is none."""

    def run() -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        with reading(uri) as file:
            while block := file.read(BLOCK):
                size += len(block)
                digest.update(block)
        return size, digest.hexdigest()

    return retrying(f"reading {uri}", run)


def reading(uri: str) -> AbstractContextManager[BinaryIO]:
    """A file, local or remote, to be read from its beginning to its end."""
    if not is_remote(uri):
        return open(uri, "rb")
    filesystem, path = _remote(uri)
    opened: AbstractContextManager[BinaryIO] = filesystem.open(path, "rb", cache_type="readahead")
    return opened
