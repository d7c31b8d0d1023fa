"""Whether this process can use a run's storage, its data and its tracking server.

Each check does the smallest thing that shows it, and raises an OSError that says what to do.
"""

import os
import secrets
import socket
import sqlite3
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from shards import manifest
from shards.storage import exists, is_local, join, open_binary, open_folder

T = TypeVar("T")
ANSWER_S = 10.0
"""Seconds that a tracking server may take to answer."""
HELP = "see 'Access to the storage' in docs/cluster.md"


def check_storage(uri: str) -> None:
    """Write, read and remove one small object; each node does so before it trains.

    Args:
        uri: folder or URI of the runs; a local folder is made where it is missing.

    Raises:
        OSError: this node cannot use it.
    """
    told = secrets.token_bytes(16)

    def use() -> None:
        fs, root = open_folder(uri)
        path = f"{root}/.access-{socket.gethostname()}-{os.getpid()}-{told[:4].hex()}"
        if is_local(fs):
            fs.makedirs(root, exist_ok=True)
        fs.pipe_file(path, told)
        try:
            if (read := fs.cat_file(path)) != told:
                raise OSError(f"{path} has other bytes than were written ({len(read)} bytes)")
        finally:
            fs.rm_file(path)

    _explained(f"use the storage {uri}", use, HELP)


def check_shared(uri: str, name: str) -> None:
    """Find an object that another node has written.

    Raises:
        OSError: it is not there, because the folder is another one on each node.
    """
    if not exists(join(uri, name)):
        raise OSError(
            f"{socket.gethostname()} does not see in {uri} what another node has written; use a "
            "folder that all nodes share, or an object store (s3://, gs://)"
        )


def check_data(uri: str) -> int:
    """Read the manifest and the first byte of a shard; returns the number of samples.

    Raises:
        OSError: this node cannot read them.
    """

    def use() -> int:
        source = manifest.read(uri)
        with open_binary(source.location(source.shards[0])) as shard:
            shard.read(1)
        return sum(source.counts.values())

    return _explained(f"read the data {uri}", use, HELP)


def check_tracking(uri: str) -> None:
    """Ask an MLflow server whether it is well, or open a SQLite database.

    Raises:
        OSError: it does not answer, or the database cannot be opened.
    """

    def use() -> None:
        if uri.startswith("sqlite:///"):
            path = uri.removeprefix("sqlite:///")
            if os.path.exists(path):
                sqlite3.connect(path, timeout=ANSWER_S).execute("PRAGMA schema_version")
            elif not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise PermissionError(f"no permission to write to {os.path.dirname(path)}")
        elif uri.startswith(("http://", "https://")):
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S) as answer:
                answer.read()

    _explained(
        f"reach MLflow at {uri}", use, "check --tracking.uri, and that the server listens there"
    )


def _explained(what: str, action: Callable[[], T], then: str) -> T:
    try:
        return action()
    except Exception as error:  # each store's library has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{socket.gethostname()} cannot {what}: {reason}; {then}") from error
