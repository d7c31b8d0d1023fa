"""Files in local folders and object stores, by the same functions. All folders of this project use
it.

A place is a local folder or a URI of fsspec (`s3://bucket/folder`, `http://…`, `gs://…`). A write
is atomic: a reader sees the old file or the new one, never half of it. Listings are never cached:
another process may have written since.

A store may fail for a while. Each operation on it is retried for `PATIENCE_S` seconds, and
`shards.patience` says so.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from shards.patience import Patient, http_status, retrying

BLOCK = 1 << 20
"""Bytes that are copied at a time."""
_S3 = {
    "config_kwargs": {
        "connect_timeout": 10,  # seconds, as the next one
        "read_timeout": 30,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    }
}
"""Options of s3fs: short failures are retried silently; `shards.patience` does the long ones."""
_SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory", "file")


def is_remote(uri: str | os.PathLike[str]) -> bool:
    """Whether a place is reached through fsspec rather than the local file system."""
    return "://" in str(uri) and not str(uri).startswith("file://")


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is that of this machine."""
    return "file" in fs.protocol


def local_path(uri: str | os.PathLike[str]) -> str:
    """The path of a place that is not remote: without `file://`, and with `~` replaced."""
    return os.path.expanduser(str(uri).removeprefix("file://"))


def checked(uri: str | os.PathLike[str]) -> str:
    """The place as a string, without a trailing slash.

    Raises:
        ValueError: the scheme is unknown, or could run a command (`pipe:`, `a::b`).
    """
    text = str(uri)
    scheme = text.split(":", 1)[0] if "://" in text or text.startswith("pipe:") else ""
    if "::" in text or (scheme and scheme not in _SCHEMES):
        raise ValueError(
            f"{text!r} is not a folder or a store that can be read; known: a folder, "
            + ", ".join(f"{name}://" for name in _SCHEMES if name != "memory")
        )
    return text.removeprefix("file://").rstrip("/")


def join(uri: str, name: str) -> str:
    """`uri/name`."""
    return f"{uri}/{name}"


def absolute(uri: str) -> str:
    """The same place, named so that processes with another working directory find it."""
    return uri if is_remote(uri) else str(Path(local_path(uri)).resolve())


def open_folder(uri: str, patience_s: float | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a folder or URI; a local path becomes absolute.

    The file system keeps no listings (s3fs would otherwise answer from its memory and miss what
    another process has written). Operations on a store that fails are retried.

    Args:
        uri: folder or URI.
        patience_s: seconds for which an operation is retried; None: `patience.PATIENCE_S`.

    Raises:
        ValueError: no file system is installed for the URI's scheme.
    """
    place = uri if is_remote(uri) else local_path(uri)
    options: dict[str, Any] = _S3 if place.startswith("s3://") else {}
    try:
        fs, path = fsspec.core.url_to_fs(place, use_listings_cache=False, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {uri}: {error}") from error
    return (Patient(fs, patience_s) if is_remote(uri) else fs), path


def exists(uri: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(uri):
        return os.path.exists(local_path(uri))
    fs, path = open_folder(uri)
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Sorted names of the files and folders directly in a folder; [] where there is no folder."""
    if not is_remote(uri):
        folder = local_path(uri)
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    fs, path = open_folder(uri)
    if not fs.exists(path):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, False))


def find(pattern: str) -> dict[str, int]:
    """Places of the files that match a glob pattern, and their sizes in bytes (0: unknown)."""
    fs, path = open_folder(pattern)
    name_of = fs.unstrip_protocol if is_remote(pattern) else str
    found = fs.glob(path, detail=True).items()
    return {
        name_of(match): int(about["size"] or 0)
        for match, about in found
        if about["type"] != "directory"
    }


def read(uri: str) -> bytes:
    """All bytes of a file; FileNotFoundError where there is none."""
    if not is_remote(uri):
        return Path(local_path(uri)).read_bytes()
    fs, path = open_folder(uri)
    return bytes(fs.cat_file(path))


def read_json(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    """Reads one JSON file; FileNotFoundError where there is none."""
    if is_local(fs):
        return json.loads(Path(path).read_bytes())
    return json.loads(fs.cat_file(path))


def write(uri: str, data: bytes) -> None:
    """Writes one file, as `write_whole` does."""
    write_whole(*open_folder(uri), data)


def write_whole(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes one file so that a reader sees the old one or the new one, never half of it.

    A local file is written aside, synchronised to the disk and renamed. Object stores show an
    object only when it is complete.
    """
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(fs: fsspec.AbstractFileSystem, path: str, data: Any) -> None:
    """Writes one JSON file, as `write_whole` does."""
    write_whole(fs, path, (json.dumps(data, indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """The same plain data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """A temporary name beside `path`, to write to.

    It is renamed to `path` when the block ends, and removed when the block raises. Missing folders
    are made.
    """
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
                f"no space left to write {path}; free some space, then run the same command again "
                "to continue",
            ) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def remove_unfinished(folder: str, pattern: str = "*") -> None:
    """Removes the temporary files that killed processes left for file names like `pattern`.

    Only for a process that alone may write these files.
    """
    if not is_remote(folder):
        for left in Path(local_path(folder)).glob(f".{pattern}.part"):
            left.unlink(missing_ok=True)


def upload(local: str, uri: str) -> None:
    """Copies a local file to a store."""
    fs, path = open_folder(uri)
    fs.put_file(local, path)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A file as a path on this machine; one of a store is copied for the time of the block."""
    if not is_remote(uri):
        yield Path(local_path(uri))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / uri.rsplit("/", 1)[-1]
        retrying("reading", uri, lambda: download(uri, str(copy)))
        yield copy


def remove(uri: str) -> None:
    """Removes a file; does nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(uri):
            fs, path = open_folder(uri)
            fs.rm_file(path)
        else:
            os.unlink(local_path(uri))


def size_and_sha256(uri: str) -> tuple[int, str]:
    """Of a file, read once; FileNotFoundError where there is none."""
    return retrying("reading", uri, lambda: _measure(uri, None))


def download(uri: str, local: str) -> tuple[int, str]:
    """Copies a file to a local one and waits for the disk; its size and sha256."""
    with open(local, "wb") as target:
        size_and_digest = _measure(uri, target)
        target.flush()
        os.fsync(target.fileno())
    return size_and_digest


def _measure(uri: str, target: BinaryIO | None) -> tuple[int, str]:
    """Size and sha256 of a file, whose bytes are also written to `target` where there is one."""
    size, digest = 0, hashlib.sha256()
    with open_binary(uri) as source:
        while block := source.read(BLOCK):
            size += len(block)
            digest.update(block)
            if target is not None:
                target.write(block)
    return size, digest.hexdigest()


def open_binary(uri: str) -> AbstractContextManager[BinaryIO]:
    """A file, local or remote, to be read from its beginning to its end."""
    if not is_remote(uri):
        return open(local_path(uri), "rb")
    fs, path = open_folder(uri)
    try:
        opened: AbstractContextManager[BinaryIO] = fs.open(path, "rb", cache_type="readahead")
    except FileNotFoundError as error:
        # fsspec raises it for every answer of an HTTP server but success, and for no answer.
        if error.__cause__ is None or http_status(error) in (404, 410):
            raise
        why = getattr(error.__cause__, "message", "") or error.__cause__
        raise OSError(f"cannot open {uri}: {why}") from error.__cause__
    return opened
