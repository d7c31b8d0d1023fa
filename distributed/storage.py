"""Folders and URIs alike: the file system behind a run's storage."""

import json
import math
from pathlib import Path
from typing import Any

import fsspec


def open_folder(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a folder or URI; a local path becomes absolute.

    Raises:
        ValueError: no file system is installed for the URI's scheme.
    """
    try:
        fs, path = fsspec.core.url_to_fs(str(Path(uri).expanduser()) if "://" not in uri else uri)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open storage {uri}: {error}") from error
    return fs, path


def absolute(uri: str) -> str:
    """The same folder named so that other processes, which run in other folders, find it."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def read_json(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    """Read one JSON file."""
    with fs.open(path, "r") as file:
        return json.load(file)


def write_whole(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write one file, so that a reader sees the old one or the new one, never half of it."""
    if "file" in fs.protocol:
        aside = Path(path).with_name(f".{Path(path).name}.part")
        aside.write_bytes(data)
        aside.replace(path)
    else:  # object stores show an object only when it is whole
        with fs.open(path, "wb") as file:
            file.write(data)


def finite(value: Any) -> Any:
    """The same plain data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(fs: fsspec.AbstractFileSystem, path: str, data: Any) -> None:
    """Write one JSON file; see `write_whole`."""
    write_whole(fs, path, (json.dumps(data, indent=2) + "\n").encode())
