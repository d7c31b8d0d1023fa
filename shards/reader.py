"""Reads one sample by its number: positional reads from the tars, each checked against the
index."""

import contextlib
import enum
import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from isal import isal_zlib

from shards import manifest, storage
from shards.cache import Cache, ContentError
from shards.decode import Box, DecodeError, decode
from shards.manifest import Index, Manifest
from shards.table import Shard

OPEN_FILES = 64
"""Shards that a process keeps open at a time."""
SIZES = 10_000
"""Shards of a task whose sizes are compared before training."""


class Damage(enum.Enum):
    """What kind of damage was found."""

    MISSING_SHARD = enum.auto()
    SHARD_SIZE = enum.auto()
    INDEX = enum.auto()
    TRUNCATED = enum.auto()
    HEADER = enum.auto()
    CHECKSUM = enum.auto()
    UNDECODABLE = enum.auto()
    OTHER = enum.auto()

    @property
    def of_whole_shard(self) -> bool:
        """Every sample of the shard is affected."""
        return self in (Damage.MISSING_SHARD, Damage.SHARD_SIZE, Damage.INDEX)


class DamagedError(ValueError):
    """A shard, or a sample in it, is not what was packed."""

    def __init__(self, problem: str, remedy: str, kind: Damage = Damage.OTHER) -> None:
        """Takes what is wrong and where, what to do about it, and the kind of damage."""
        super().__init__(problem, remedy, kind)
        self.problem, self.remedy, self.kind = problem, remedy, kind

    def __str__(self) -> str:
        """Problem and remedy in one line."""
        return f"{self.problem}; {self.remedy}"


class Location(NamedTuple):
    """Where a sample is."""

    shard: Shard
    table: Index
    row: np.void
    """Its row, of `manifest.SAMPLE`."""
    number: int
    """Of the sample within its task."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures, in pixels."""
        return int(self.row["height"]), int(self.row["width"])


class _OpenShard(NamedTuple):
    descriptor: int
    table: Index


class Reader:
    """The samples of a folder or store of shards.

    It can be sent to another process, which opens the files again.
    """

    def __init__(self, source: Manifest, cache: Cache) -> None:
        """Takes the manifest, and the cache for shards of a remote store."""
        self.manifest = source
        self.cache = cache
        self.shards = {task: source.shards_of(task) for task in source.tasks}
        self._ends = {
            task: np.cumsum(shards.column("samples"), dtype=np.int64)
            for task, shards in self.shards.items()
        }
        self._open: OrderedDict[Shard, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def check_present(self) -> None:
        """`DamagedError` where a local shard is missing or has another size than in the manifest.

        Each folder is listed once. Of many shards, the sizes of `SIZES` are looked up here; every
        shard's size is compared again when it is opened.
        """
        for task, shards in self.shards.items():
            if storage.is_remote(self.manifest.folder(task)):
                continue
            listed: dict[str, set[str]] = {}
            every = -(-len(shards) // SIZES)
            for number, shard in enumerate(shards):
                path = self.manifest.location(shard)
                folder, name = os.path.split(path)
                if folder not in listed:
                    listed[folder] = set(storage.list_names(folder))
                if name not in listed[folder]:
                    raise self._missing(shard)
                if number % every == 0 and os.path.getsize(path) != shard.bytes:
                    raise self._wrong_size(shard, os.path.getsize(path))

    def locate(self, task: str, number: int) -> Location:
        """Where sample `number` of a task is; opens its shard."""
        slot = int(self._ends[task].searchsorted(number, "right"))
        shard = self.shards[task][slot]
        row = number - (int(self._ends[task][slot]) - shard.samples)
        table = self._opened(shard).table
        return Location(shard, table, table.samples[row], number)

    def shard_of(self, task: str, number: int) -> Shard:
        """The shard of a sample, without opening it."""
        return self.shards[task][int(self._ends[task].searchsorted(number, "right"))]

    def key(self, location: Location) -> str:
        """The sample's name in its tar.

        `denoise_00000012`, or `dehaze_00000012.input03` where several inputs share a target. In
        tars that another program wrote it is their own key.
        """
        row = location.row
        if int(row["meta"]) == manifest.NONE:
            return split_member_name(self._member_name(location, int(row["target"])))[0]
        part = f".input{row['part']:02d}" if row["flags"] & manifest.SEVERAL else ""
        return f"{location.shard.task}_{row['group']:08d}{part}"

    def about(self, location: Location) -> dict[str, Any]:
        """What packing noted: `target` and `inputs`, the source files, and what was synthesised."""
        row = location.row
        if int(row["meta"]) == manifest.NONE:
            about: dict[str, Any] = {"target": self._member_name(location, int(row["target"]))}
            if self._has_input(location):
                about["inputs"] = [self._member_name(location, int(row["input"]))]
            return about
        noted: dict[str, Any] = json.loads(self._member(location, int(row["meta"])))
        return noted

    def checksum(self, location: Location) -> int:
        """crc32 of the clean picture's bytes."""
        return int(location.table.members[int(location.row["target"])]["crc32"])

    def clean(self, location: Location, box: Box | None = None) -> np.ndarray:
        """The clean picture (H, W, 3) uint8, or the part of it inside `box`."""
        height, width = location.size
        box = box or Box(0, 0, height, width)
        # The degraded picture may show only the centre of a larger clean one.
        top, left = int(location.row["top"]), int(location.row["left"])
        return self._picture(
            location,
            "target",
            Box(box.top + top, box.left + left, box.height, box.width),
            (height + 2 * top, width + 2 * left),
        )

    def degraded(self, location: Location, box: Box | None = None) -> np.ndarray:
        """The degraded picture (H, W, 3) uint8, or the part of it inside `box`."""
        return self._picture(location, "input", box or Box(0, 0, *location.size), location.size)

    def stored(self, location: Location, role: Literal["input", "target"]) -> bytes:
        """The bytes of a picture as they are in the tar; of its first tile where it is in tiles."""
        return self._member(location, int(location.row[role]))

    def both(self, location: Location) -> tuple[np.ndarray | None, np.ndarray]:
        """The degraded and the clean picture; the first is None where only the clean is stored."""
        degraded = self.degraded(location) if self._has_input(location) else None
        return degraded, self.clean(location)

    def index(self, shard: Shard) -> Index:
        """The index of a shard, checked against the manifest."""
        opened = self._open.get(shard)
        return opened.table if opened else self._index(shard)

    def local_path(self, shard: Shard) -> str:
        """A local file with the shard's bytes; fetched where the shard is remote."""
        uri = self.manifest.location(shard)
        if not storage.is_remote(uri):
            return uri
        try:
            return self.cache.fetch(uri, shard.sha256, shard.bytes)
        except ContentError as error:
            raise self._damaged(shard, str(error), Damage.SHARD_SIZE) from error

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            _, opened = self._open.popitem()
            os.close(opened.descriptor)

    def _picture(
        self, location: Location, role: str, box: Box, size: tuple[int, int]
    ) -> np.ndarray:
        first = int(location.row[role])
        flag = manifest.TILED_INPUT if role == "input" else manifest.TILED_TARGET
        tiled = int(location.row["flags"]) & flag
        try:
            if not tiled:
                return decode(self._member(location, first), box)
            return self._from_tiles(location, first, box, size)
        except DecodeError as error:
            raise self._damaged_sample(
                location, f"the {role} cannot be decoded ({error})", Damage.UNDECODABLE
            ) from error

    def _from_tiles(
        self, location: Location, first: int, box: Box, size: tuple[int, int]
    ) -> np.ndarray:
        """A box assembled from the tiles that it meets; `size` is that of the whole picture."""
        side = location.table.tile
        columns = -(-size[1] // side)
        pixels = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.top // side, (box.top + box.height - 1) // side + 1):
            for column in range(box.left // side, (box.left + box.width - 1) // side + 1):
                tile = decode(self._member(location, first + row * columns + column))
                down, right = row * side - box.top, column * side - box.left
                part = tile[max(-down, 0) : box.height - down, max(-right, 0) : box.width - right]
                top, left = max(down, 0), max(right, 0)
                pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
        return pixels

    def _has_input(self, location: Location) -> bool:
        return int(location.row["input"]) != manifest.NONE

    def _member(self, location: Location, number: int) -> bytes:
        entry = location.table.members[number]
        descriptor = self._opened(location.shard).descriptor
        data = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
        if len(data) != entry["size"]:
            raise self._damaged_sample(location, "the shard ends inside it", Damage.TRUNCATED)
        if isal_zlib.crc32(data) != entry["crc32"]:
            raise self._damaged_sample(
                location, "its bytes have changed (checksum)", Damage.CHECKSUM
            )
        return data

    def _member_name(self, location: Location, number: int) -> str:
        """Read from the headers before the data: one, or several where the name is long."""
        members = location.table.members
        end = int(members[number]["offset"])
        before = members[number - 1] if number else np.zeros((), manifest.MEMBER)
        padding = -int(before["size"]) % tarfile.BLOCKSIZE
        start = int(before["offset"]) + int(before["size"]) + padding
        headers = os.pread(self._opened(location.shard).descriptor, end - start, start)
        try:
            if end - start == tarfile.BLOCKSIZE:  # the usual case, read in half the time
                return tarfile.TarInfo.frombuf(headers, "utf-8", "replace").name
            file = BytesIO(headers)
            with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="replace") as tar:
                return next(info.name for info in tar if start + info.offset_data == end)
        except (tarfile.TarError, StopIteration) as error:
            raise self._damaged_sample(
                location, f"its header is damaged ({error})", Damage.HEADER
            ) from error

    def _opened(self, shard: Shard) -> _OpenShard:
        """A shard's file and index; closes the least recently used shard where too many are
        open."""
        opened = self._open.get(shard)
        if opened is not None:
            self._open.move_to_end(shard)
            return opened
        index = self._index(shard)
        descriptor = self._descriptor(shard)
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            os.close(descriptor)
            raise self._wrong_size(shard, size)
        while len(self._open) >= OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.descriptor)
        self._open[shard] = _OpenShard(descriptor, index)
        return self._open[shard]

    def _descriptor(self, shard: Shard) -> int:
        while True:
            path = self.local_path(shard)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                if not storage.is_remote(self.manifest.location(shard)):
                    raise self._missing(shard) from error
                # Another process evicted the copy since it was fetched: fetch it again.

    def _index(self, shard: Shard) -> Index:
        uri = storage.join(self.manifest.uri, shard.index_name)
        try:
            remote = storage.is_remote(uri)
            data = self._remote_index(uri, shard) if remote else storage.read(uri)
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise ValueError("its hash is not the one in the manifest")
            return Index.from_bytes(data)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(
                shard, f"{uri} is missing or damaged ({error})", Damage.INDEX
            ) from error

    def _remote_index(self, uri: str, shard: Shard) -> bytes:
        path = self.cache.path(shard.index_sha256)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            return file.read()
        data = storage.read(uri)
        if hashlib.sha256(data).hexdigest() == shard.index_sha256:
            storage.write(path, data)
        return data

    def _missing(self, shard: Shard) -> DamagedError:
        path = self.manifest.location(shard)
        problem = f"{path} is named in {manifest.NAME}, but does not exist"
        return self._damaged(shard, problem, Damage.MISSING_SHARD)

    def _wrong_size(self, shard: Shard, size: int) -> DamagedError:
        path = self.manifest.location(shard)
        problem = f"{path} has {size} bytes, but {manifest.NAME} says {shard.bytes}"
        return self._damaged(shard, problem, Damage.SHARD_SIZE)

    def _damaged_sample(self, location: Location, problem: str, kind: Damage) -> DamagedError:
        path = self.manifest.location(location.shard)
        where = f"sample {location.number} of {location.shard.task} in {path}"
        return self._damaged(location.shard, f"{where}: {problem}", kind)

    def _damaged(self, shard: Shard, problem: str, kind: Damage) -> DamagedError:
        return DamagedError(problem, self.manifest.remedy(shard.task), kind)


def split_member_name(name: str) -> tuple[str, str]:
    """Key and field of a tar member, by WebDataset's rule: the first dot of the file name.

    `a/0001.input.png` is field `input.png` of the sample `a/0001`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, field.lower()
