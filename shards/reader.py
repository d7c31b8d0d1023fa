"""One sample's bytes out of the shards, by its number: positional reads, each checked against the
index."""

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import numpy as np
from isal import isal_zlib

from shards import manifest, storage
from shards.cache import Cache
from shards.decode import Box, DecodeError, decode
from shards.manifest import Index, Manifest, Shard

OPEN_FILES = 64
"""Shards that a process keeps open at a time."""


class DamagedError(ValueError):
    """A shard or a sample of it is not what was packed."""

    def __init__(self, what: str, mend: str) -> None:
        """`what` is wrong and where; `mend` says what to do about it."""
        super().__init__(what, mend)
        self.what, self.mend = what, mend

    def __str__(self) -> str:
        """Both in one line."""
        return f"{self.what}; {self.mend}"


class Place(NamedTuple):
    """Where a sample is."""

    shard: Shard
    table: Index
    row: np.void
    """Of `manifest.SAMPLE`."""
    number: int
    """Of the sample within its task."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        return int(self.row["height"]), int(self.row["width"])


class Reader:
    """Samples of a folder or store of shards. Cheap to send to another process: it opens its own
    files."""

    def __init__(self, source: Manifest, cache: Cache) -> None:
        """`cache` is used for remote stores only."""
        self.manifest = source
        self.cache = cache
        self.shards = {task: source.of(task) for task in source.tasks}
        self._ends = {
            task: np.cumsum([shard.samples for shard in shards])
            for task, shards in self.shards.items()
        }
        self._open: OrderedDict[str, tuple[int, int, Index]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def check_present(self) -> None:
        """`DamagedError` where a local shard is missing or has not the manifest's size."""
        if storage.is_remote(self.manifest.uri):
            return
        for shard in self.manifest.shards:
            path = storage.join(self.manifest.uri, shard.name)
            if not os.path.exists(path):
                raise self._damaged(shard, _missing(path))
            if os.path.getsize(path) != shard.bytes:
                raise self._damaged(shard, _short(path, os.path.getsize(path), shard))

    def locate(self, task: str, number: int) -> Place:
        """Where the `number`-th sample of a task is."""
        slot = int(np.searchsorted(self._ends[task], number, side="right"))
        shard = self.shards[task][slot]
        row = number - (int(self._ends[task][slot]) - shard.samples)
        _, _, index = self._file(shard)
        return Place(shard, index, index.samples[row], number)

    def shard_of(self, task: str, number: int) -> Shard:
        """The shard of a sample, without opening it."""
        return self.shards[task][int(np.searchsorted(self._ends[task], number, side="right"))]

    def key(self, place: Place) -> str:
        """The sample's name in its tar: `denoise_00000012`; with `.input03` where several share a
        clean one."""
        part = f".input{place.row['part']:02d}" if place.row["flags"] & manifest.SEVERAL else ""
        return f"{place.shard.task}_{place.row['group']:08d}{part}"

    def about(self, place: Place) -> dict[str, Any]:
        """What the packing noted: names of the source files, and what was synthesised."""
        about: dict[str, Any] = json.loads(self._member(place, int(place.row["meta"])))
        return about

    def checksum(self, place: Place) -> int:
        """crc32 of the clean picture's bytes."""
        return int(place.table.members[int(place.row["target"])]["crc32"])

    def clean(self, place: Place, box: Box | None = None) -> np.ndarray:
        """The clean picture (H, W, 3) uint8, or a box of it."""
        height, width = place.size
        box = box or Box(0, 0, height, width)
        top, left = int(place.row["top"]), int(place.row["left"])
        # A degraded picture that shows the centre of a larger clean one lies in the middle of it.
        return self._picture(
            place,
            "target",
            Box(box.top + top, box.left + left, box.height, box.width),
            (height + 2 * top, width + 2 * left),
        )

    def degraded(self, place: Place, box: Box | None = None) -> np.ndarray:
        """The degraded picture (H, W, 3) uint8, or a box of it."""
        return self._picture(place, "input", box or Box(0, 0, *place.size), place.size)

    def stored(self, place: Place, role: Literal["input", "target"]) -> bytes:
        """The member of a picture as it lies in the tar; its first tile where it is in tiles."""
        return self._member(place, int(place.row[role]))

    def both(self, place: Place) -> tuple[np.ndarray | None, np.ndarray]:
        """The degraded picture, None where only a clean one is stored, and the clean one."""
        return (self.degraded(place) if self._has_input(place) else None), self.clean(place)

    def index(self, shard: Shard) -> Index:
        """The index of a shard, checked against the manifest."""
        opened = self._open.get(shard.name)
        return opened[2] if opened else self._index(shard)

    def local_path(self, shard: Shard) -> str:
        """A local file with the shard's bytes; fetched where it is remote."""
        uri = storage.join(self.manifest.uri, shard.name)
        if not storage.is_remote(uri):
            return uri
        return self.cache.fetch(uri, shard.sha256, shard.bytes)

    def _picture(self, place: Place, role: str, box: Box, size: tuple[int, int]) -> np.ndarray:
        first = int(place.row[role])
        flag = manifest.TILED_INPUT if role == "input" else manifest.TILED_TARGET
        tiled = int(place.row["flags"]) & flag
        try:
            if not tiled:
                return decode(self._member(place, first), box)
            return self._from_tiles(place, first, box, size)
        except DecodeError as error:
            raise self._damaged(
                place.shard, f"{self._where(place)}: the {role} cannot be decoded ({error})"
            ) from error

    def _from_tiles(self, place: Place, first: int, box: Box, size: tuple[int, int]) -> np.ndarray:
        """A box put together from the tiles that it meets; `size` of the whole picture."""
        side = place.table.tile
        columns = -(-size[1] // side)
        pixels = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.top // side, (box.top + box.height - 1) // side + 1):
            for column in range(box.left // side, (box.left + box.width - 1) // side + 1):
                tile = decode(self._member(place, first + row * columns + column))
                down, right = row * side - box.top, column * side - box.left
                part = tile[max(-down, 0) : box.height - down, max(-right, 0) : box.width - right]
                top, left = max(down, 0), max(right, 0)
                pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
        return pixels

    def _has_input(self, place: Place) -> bool:
        return int(place.row["input"]) != manifest.NONE

    def _where(self, place: Place) -> str:
        path = storage.join(self.manifest.uri, place.shard.name)
        return f"sample {place.number} of {place.shard.task} in {path}"

    def _member(self, place: Place, number: int) -> bytes:
        entry = place.table.members[number]
        descriptor, _, _ = self._file(place.shard)
        data = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
        if len(data) != entry["size"]:
            raise self._damaged(place.shard, f"{self._where(place)}: the shard ends inside of it")
        if isal_zlib.crc32(data) != entry["crc32"]:
            raise self._damaged(
                place.shard,
                f"{self._where(place)}: its bytes have changed since packing (checksum)",
            )
        return data

    def _file(self, shard: Shard) -> tuple[int, int, Index]:
        """Descriptor, size and index of a shard; opens it where needed, and closes the one least
        recently used."""
        opened = self._open.get(shard.name)
        if opened is not None:
            self._open.move_to_end(shard.name)
            return opened
        index = self._index(shard)
        descriptor = self._descriptor(shard)
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            os.close(descriptor)
            path = storage.join(self.manifest.uri, shard.name)
            raise self._damaged(shard, _short(path, size, shard))
        while len(self._open) >= OPEN_FILES:
            _, (oldest, _, _) = self._open.popitem(last=False)
            os.close(oldest)
        self._open[shard.name] = (descriptor, size, index)
        return self._open[shard.name]

    def _descriptor(self, shard: Shard) -> int:
        while True:
            path = self.local_path(shard)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                if not storage.is_remote(self.manifest.uri):
                    raise self._damaged(shard, _missing(path)) from error
                # Another process evicted the copy between the two lines: fetch it again.

    def _index(self, shard: Shard) -> Index:
        uri = storage.join(self.manifest.uri, shard.index_name)
        try:
            remote = storage.is_remote(uri)
            data = self._remote_index(uri, shard) if remote else storage.read(uri)
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise ValueError("its hash is not the one in the manifest")
            return Index.from_bytes(data)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(shard, f"{uri} is missing or damaged ({error})") from error

    def _remote_index(self, uri: str, shard: Shard) -> bytes:
        path = self.cache.path(shard.index_sha256)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            return file.read()
        data = storage.read(uri)
        if hashlib.sha256(data).hexdigest() == shard.index_sha256:
            storage.write(path, data)
        return data

    def _damaged(self, shard: Shard, what: str) -> DamagedError:
        return DamagedError(what, self.manifest.mend(shard.task))

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            _, (descriptor, _, _) = self._open.popitem()
            os.close(descriptor)


def _missing(path: str) -> str:
    return f"{path} is named in {manifest.NAME}, but is not there"


def _short(path: str, size: int, shard: Shard) -> str:
    return f"{path} has {size} bytes, but {manifest.NAME} says {shard.bytes}"
