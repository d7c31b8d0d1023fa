"""A node's local copies of remote shards, shared by all of its processes.

A copy is named by the hash of its content, checked while it is fetched and renamed when whole, so a
name that is there is right. Locks are held by the operating system: a process that dies frees them.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass

from filelock import FileLock

from shards import storage


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where copies are kept, and how much of them."""

    folder: str
    """Local folder; made where it is missing."""
    limit: int
    """Bytes at most; the copies least recently used go first. The one just fetched always stays."""
    attempts: int = 5
    """How often a fetch is tried before it counts as failed."""
    delay: float = 0.5
    """Seconds before the second try; doubled for each one after it."""

    def path(self, sha256: str) -> str:
        """Where the copy of this content is, or would be."""
        return os.path.join(self.folder, sha256)

    def fetch(self, uri: str, sha256: str, size: int) -> str:
        """The path of a copy whose content is right; OSError after the last try.

        It may be evicted at any time afterwards: open it at once, and fetch again where it has
        gone. An open file stays readable.
        """
        path = self.path(sha256)
        if self._touch(path, size):
            return path
        os.makedirs(os.path.join(self.folder, "locks"), exist_ok=True)
        with FileLock(os.path.join(self.folder, "locks", sha256)):
            if not self._touch(path, size):
                self._download(uri, path, sha256, size)
                self._evict(path)
        return path

    def _touch(self, path: str, size: int) -> bool:
        try:
            if os.path.getsize(path) != size:
                return False
            os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _download(self, uri: str, path: str, sha256: str, size: int) -> None:
        part = path + ".part"  # what a dead process left under this name is overwritten

        def copy() -> None:
            digest, count = _copy(uri, part)
            if (digest, count) != (sha256, size):
                raise OSError(
                    f"{count} bytes with sha256 {digest[:12]}… came, but the manifest says {size} "
                    "and "
                    f"{sha256[:12]}…"
                )
            os.replace(part, path)

        try:
            storage.retrying(f"fetching {uri}", copy, self.attempts, self.delay)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)

    def _evict(self, keep: str) -> None:
        with FileLock(os.path.join(self.folder, "locks", "evict")):
            copies = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.endswith(".part"):
                        status = entry.stat()
                        copies.append((status.st_mtime_ns, status.st_size, entry.path))
            excess = sum(size for _, size, _ in copies) - self.limit
            for _, size, path in sorted(copies):
                if excess <= 0:
                    return
                if path != keep:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    excess -= size


def _copy(uri: str, path: str) -> tuple[str, int]:
    """Copies a remote file; its sha256 and its length."""
    digest, count = hashlib.sha256(), 0
    with storage.reading(uri) as source, open(path, "wb") as target:
        while block := source.read(storage.BLOCK):
            target.write(block)
            digest.update(block)
            count += len(block)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest(), count
