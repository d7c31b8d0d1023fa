"""One process at a time in a folder: of a search, or of a trial.

The operating system holds the lock, so a process that is killed loses it at once.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from shards.storage import open_folder


@contextlib.contextmanager
def exclusive(folder: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Work in `folder` alone.

    Raises:
        ValueError: another process still works there after `wait_s` seconds.
    """
    path = _lock_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(".json")  # not in the lock's own file, which waiting empties
    try:
        with FileLock(path, timeout=wait_s):
            holder.write_text(json.dumps({"pid": os.getpid(), "since": time.ctime()}))
            yield
    except Timeout as error:
        try:
            known = json.loads(holder.read_text())
            who = f"process {known['pid']} since {known['since']}"
        except (OSError, ValueError):  # it has the lock, and has not written its name yet
            who = "another process"
        raise ValueError(f"{folder} is in use by {who}; wait until it ends, or end it") from error


def in_use(folder: str) -> bool:
    """Whether a process works in `folder` now."""
    path = _lock_file(folder)
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _lock_file(folder: str) -> Path:
    """In the folder; for a URI on this machine, where all processes of a search run."""
    fs, root = open_folder(folder)
    if "file" in fs.protocol:
        return Path(root) / "running.lock"
    key = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "measnet" / "locks" / f"{key}.lock"
