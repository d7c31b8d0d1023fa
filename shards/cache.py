"""A node's local copies of remote shards, shared by all of its processes.

A copy is named by the sha256 of its content. It is checked while it is fetched and renamed when it
is complete, so a file under such a name is correct. Locks are held by the operating system: it
frees the locks of a process that dies.
"""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass

from filelock import FileLock

from shards import storage
from shards.patience import retrying

TRIES = 3
"""Times that a file with other content is fetched again: only its transfer may be wrong."""


OWN = re.compile(r"[0-9a-f]{64}(\.\d+\.(npy|json))?")
"""Names of the files that a cache makes: copies, and the shared tables of `shards.manifest`. Other
files in its folder are never removed."""


class ContentError(ValueError):
    """A store holds another file under this name than the one that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where copies are kept, and how much of them."""

    folder: str
    """Local folder; made where it is missing. `~` is the home on the node that uses it."""
    limit: int
    """Most bytes to keep. The least recently used copies are removed first; the one just fetched
    always stays."""
    patience_s: float | None = None
    """Seconds for which a fetch is retried; None: as `shards.patience` says."""

    def __post_init__(self) -> None:
        """Find the home folder."""
        object.__setattr__(self, "folder", os.path.expanduser(self.folder))

    def path(self, sha256: str) -> str:
        """Where the copy with this content is, or would be."""
        return os.path.join(self.folder, sha256)

    def fetch(self, uri: str, sha256: str, size: int) -> str:
        """The path of a copy with the right content.

        Another process may evict the copy at any time: open it at once, and fetch again if it is
        gone. An open file stays readable.

        Raises:
            StoreError: the store failed for too long.
            ContentError: it holds another file under this name.
        """
        path = self.path(sha256)
        if self._mark_used(path, size):
            return path
        os.makedirs(os.path.join(self.folder, "locks"), exist_ok=True)
        with FileLock(os.path.join(self.folder, "locks", sha256)):
            if not self._mark_used(path, size):
                # We hold the lock, so a temporary file for this content is from a dead process.
                storage.remove_unfinished(self.folder, f"{sha256}.*")
                self._evict(path, room=size)
                self._download(uri, path, sha256, size)
                self._evict(path)
        return path

    def _mark_used(self, path: str, size: int) -> bool:
        """Sets the time of last use; False where there is no copy of this size."""
        try:
            if os.path.getsize(path) != size:
                return False
            os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _download(self, uri: str, path: str, sha256: str, size: int) -> None:
        def copy() -> None:
            with storage.atomic_path(path) as temporary:
                received = storage.download(uri, temporary)
                if received != (size, sha256):
                    raise ContentError(
                        f"fetching {uri} failed: received {received[0]} bytes with sha256 "
                        f"{received[1][:12]}…, but the manifest says {size} and {sha256[:12]}…"
                    )

        for _ in range(TRIES - 1):
            with contextlib.suppress(ContentError):
                return retrying("fetching", uri, copy, self.patience_s)
        retrying("fetching", uri, copy, self.patience_s)

    def _evict(self, keep: str, room: int = 0) -> None:
        """Remove copies until the limit holds, and until `room` bytes are free on the disk."""
        with FileLock(os.path.join(self.folder, "locks", "evict")):
            copies = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if OWN.fullmatch(entry.name) and entry.is_file():
                        status = entry.stat()
                        copies.append((status.st_mtime_ns, status.st_size, entry.path))
            free = shutil.disk_usage(self.folder).free
            excess = max(sum(size for _, size, _ in copies) - self.limit, room - free)
            for _, size, path in sorted(copies):
                if excess <= 0:
                    return
                if path != keep:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    excess -= size
