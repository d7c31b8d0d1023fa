"""Finds WebDataset tars and reads them strictly, from the beginning to the end.

Python's `tarfile` ends an archive silently at a damaged header, and WebDataset with it. Here every
damage is an error that names the file and the byte.
"""

import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand

from shards import storage
from shards.manifest import SHARD_NAME

LIMIT = 2**32 - 1
"""Most bytes of a member: the index stores sizes in 32 bits."""
_WILDCARDS = r"[*?\[{]"
_PACKERS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of a file -> the program that compressed it."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WHY_NOT_COMPRESSED = (
    "is compressed, so a single picture cannot be read from it; uncompress it (pictures are "
    "compressed already), then run the same command again"
)


class Tars(NamedTuple):
    """The tars of a set."""

    folder: str
    """Absolute path or URI of the folder that all of them are in."""
    patterns: list[str]
    """What was asked for, relative to the folder."""
    sizes: dict[str, int]
    """Name, relative to the folder -> bytes; sorted by name."""


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    offset: int
    """First byte of its data in the tar."""
    data: bytes


def find(places: Sequence[str]) -> Tars:
    """The tars of folders, tars and patterns, local or remote.

    Args:
        places: folders (the tars directly in them), tars, or patterns with `*`, `?`, `[…]` and
            WebDataset's `{000..009}`.

    Raises:
        ValueError: a place has no tar, has compressed ones, or is in another store than the rest.
    """
    patterns = [_pattern(absolute(place)) for place in places]
    folder = _common_folder([fixed_part(pattern) for pattern in patterns])
    sizes: dict[str, int] = {}
    for pattern in patterns:
        matches = [item for one in braceexpand(pattern) for item in storage.find(one).items()]
        if not matches:
            raise ValueError(
                f"{pattern} matches no file; give a folder that holds .tar files, the tars, or "
                f"a pattern such as '{fixed_part(pattern)}/**/*.tar'"
            )
        sizes |= {match.removeprefix(f"{folder}/"): size for match, size in matches}
    for name in sizes:
        if name.endswith(_COMPRESSED):
            raise ValueError(f"{folder}/{name} {_WHY_NOT_COMPRESSED}")
        if not SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{folder}/{name} is not a name for a tar: it must end with .tar and have only "
                "letters, digits, space and _ . + = , @ -; rename it or leave it out"
            )
    relative = [pattern.removeprefix(f"{folder}/") for pattern in patterns]
    return Tars(folder, relative, dict(sorted(sizes.items())))


def absolute(place: str) -> str:
    """The same place with an absolute path; links stay links, because names matter."""
    place = storage.checked(place)
    return place if storage.is_remote(place) else os.path.abspath(storage.local_path(place))


def _pattern(place: str) -> str:
    """The pattern of a place: of a folder, that of all tars in it."""
    if re.search(_WILDCARDS, place):
        if os.path.isdir(place):
            raise ValueError(f"{place} has one of * ? [ {{ in its name; rename the folder")
        return place
    if place.endswith((".tar", *_COMPRESSED)):
        return place
    compressed = [name for name in storage.list_names(place) if name.endswith(_COMPRESSED)]
    if compressed:
        raise ValueError(
            f"{place}/{compressed[0]} {_WHY_NOT_COMPRESSED} (or name the other tars by "
            f"'{place}/*.tar')"
        )
    return f"{place}/*.tar"


def fixed_part(pattern: str) -> str:
    """The folder of a pattern, down to its first wildcard."""
    return re.split(_WILDCARDS, pattern, maxsplit=1)[0].rpartition("/")[0]


def _common_folder(folders: list[str]) -> str:
    levels = zip(*(folder.split("/") for folder in folders), strict=False)
    parts = [one[0] for one in itertools.takewhile(lambda one: len(set(one)) == 1, levels)]
    common = "/".join(parts)
    if not parts or (storage.is_remote(folders[0]) and len(parts) < 3):
        raise ValueError(
            f"{folders[0]} and {folders[-1]} have no folder in common; index them one after the "
            "other with different tasks, or copy the tars into one store"
        )
    return common


class Stream(io.RawIOBase):
    """A file that is read once and only forward, with the sha256 of all that was read."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        """Takes the file, and a function to call with the count of bytes after each read."""
        super().__init__()
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.head = b""
        """The first bytes, to recognise what is no tar."""
        self._file, self._advance = file, advance

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        parts = []
        while size > 0 and (part := self._file.read(min(size, storage.BLOCK))):
            self.head = self.head or part[:8]
            self.sha256.update(part)
            self.size += len(part)
            self._advance(len(part))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def tell(self) -> int:
        """Count of bytes read so far."""
        return self.size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Reads on to a later place; whatever is between is hashed too."""
        assert whence == io.SEEK_SET and offset >= self.size
        self.read(offset - self.size)
        return self.size


class _StrictInfo(tarfile.TarInfo):
    """A header whose damage is an error, where `tarfile` would end the archive silently."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictInfo":
        assert isinstance(tar.fileobj, Stream)
        at = tar.fileobj.tell()
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed lacks it
            raise  # a block of zeros: the regular end
        except (  # typeshed lacks both
            tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
            tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
        ) as error:
            raise tarfile.ReadError(
                f"it ends at byte {tar.fileobj.tell()} without the end-of-archive block, so it was "
                "cut off"
            ) from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the header at byte {at} is damaged ({error})") from error


def members(stream: Stream, uri: str) -> Iterator[Member]:
    """The regular files of a tar, in order; long names (pax, GNU) are whole. Directories are left
    out.

    Args:
        stream: the tar; read to its end when the iterator ends.
        uri: its name, for error messages.

    Raises:
        ValueError: the tar is damaged or compressed, or has a link or a special file. The message
            names the member and the byte.
    """
    try:
        with tarfile.TarFile(
            fileobj=stream, tarinfo=_StrictInfo, encoding="utf-8", errors="replace"
        ) as tar:
            while (info := tar.next()) is not None:
                if not info.isdir():
                    yield _read(stream, uri, info)
                # Else the archive keeps all headers in memory.
                tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it
    except tarfile.TarError as error:
        if stream.head.startswith(tuple(_PACKERS)):
            raise ValueError(f"{uri} {_WHY_NOT_COMPRESSED}") from error
        raise _damaged(uri, str(error)) from error
    while block := stream.read(storage.BLOCK):
        if block.count(0) != len(block):
            raise _damaged(
                uri,
                f"there are bytes other than zero after the end of the archive, between byte "
                f"{stream.size - len(block)} and {stream.size} (were several tars joined by `cat`? "
                "`tar -A` joins them)",
            )


def _read(stream: Stream, uri: str, info: tarfile.TarInfo) -> Member:
    """A member's data; ValueError where it is not a plain file of a size that can be indexed."""
    offset = info.offset_data
    where = f"{uri}: {info.name} at byte {offset}"
    if info.issym() or info.islnk():
        kind = "symbolic" if info.issym() else "hard"
        raise ValueError(
            f"{where} is a {kind} link to {info.linkname}, and a link has no data of its own; "
            "write the tar again with `tar --dereference --hard-dereference`, then run the same "
            "command again"
        )
    if not info.isreg() or info.issparse():
        raise ValueError(
            f"{where} is not a plain file (type {info.type!r}); write the tar again without it, "
            "then run the same command again"
        )
    if info.size > LIMIT:
        raise ValueError(
            f"{where} has {info.size} bytes, but a member may have at most {LIMIT}; write the tar "
            "again without it, then run the same command again"
        )
    data = stream.read(info.size)
    if len(data) < info.size:
        raise _damaged(
            uri,
            f"{info.name} at byte {offset} has {info.size} bytes, but the file ends after "
            f"{len(data)} of them",
        )
    return Member(info.name, offset, data)


def _damaged(uri: str, problem: str) -> ValueError:
    return ValueError(
        f"{uri} is damaged: {problem}; copy it again or write it again, then run the same command "
        "again"
    )
