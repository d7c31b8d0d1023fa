"""What a folder of shards holds: `manifest.json`, and beside each tar its index.

The tars are plain WebDataset: any reader opens them. What WebDataset does not know (how many
samples there should be, where each one starts, whether its bytes are still the ones that were
packed) stands here.

`manifest.json`: `schema`, `fingerprint`, `tasks` (per task: layout, samples, options, what was
missing) and `shards` (name, task, samples, bytes, sha256, index_sha256), in the order in which
samples are numbered.

`<shard>.idx`, little endian: 4 bytes `MSIX`, then five uint32 (version, members, samples, side of
the tiles or 0, 0), then `MEMBER` rows, then `SAMPLE` rows.
"""

import dataclasses
import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards import storage
from shards.tasks import TASKS

SCHEMA = 1
NAME = "manifest.json"
NONE = 0xFFFFFFFF
"""In a `SAMPLE` row: there is no such member."""
TILED_INPUT, TILED_TARGET, SEVERAL = 1, 2, 4
"""Flags of a `SAMPLE` row: a picture is in tiles; its clean picture has several degraded ones."""

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
"""One member of the tar: where its data starts, how long it is, and its checksum."""
SAMPLE = np.dtype(
    [
        (
            "input",
            "<u4",
        ),  # member of the degraded picture, or of its first tile; NONE: only a clean one
        ("target", "<u4"),  # member of the clean picture, or of its first tile
        ("meta", "<u4"),  # member that describes it, as JSON
        ("group", "<u4"),  # number in the key: samples of one group share their clean picture
        ("part", "<u4"),  # which of the inputs that share this target
        ("height", "<u4"),
        ("width", "<u4"),
        ("top", "<u2"),  # where the degraded picture lies in a larger target
        ("left", "<u2"),
        ("flags", "u1"),  # sum of `TILED_INPUT`, `TILED_TARGET`, `SEVERAL`
        ("signature", "V16"),  # of the clean picture, to find the same one in another set
    ]
)
_HEADER = struct.Struct("<4s5I")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")


class Shard(NamedTuple):
    """One tar and its index."""

    name: str
    task: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """`denoise-000000.idx` for `denoise-000000.tar`."""
        return self.name.removesuffix(".tar") + ".idx"


class Index(NamedTuple):
    """The sidecar of a shard: members of the tar, and the samples made of them."""

    members: np.ndarray
    """(m,) of `MEMBER`."""
    samples: np.ndarray
    """(n,) of `SAMPLE`."""
    tile: int
    """Side of the square tiles that pictures are cut into, 0 where they are whole."""

    def to_bytes(self) -> bytes:
        """The sidecar file."""
        header = _HEADER.pack(b"MSIX", 1, len(self.members), len(self.samples), self.tile, 0)
        return header + self.members.tobytes() + self.samples.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """Reads a sidecar; ValueError where it is damaged."""
        if len(data) < _HEADER.size:
            raise ValueError(f"the index has {len(data)} bytes only")
        magic, version, members, samples, tile, _ = _HEADER.unpack_from(data)
        if magic != b"MSIX" or version != 1:
            raise ValueError("the index does not start as one of version 1")
        if len(data) != _HEADER.size + members * MEMBER.itemsize + samples * SAMPLE.itemsize:
            raise ValueError(f"the index has {len(data)} bytes, not as many as its header says")
        start = _HEADER.size
        table = np.frombuffer(data, MEMBER, members, start)
        return cls(table, np.frombuffer(data, SAMPLE, samples, start + table.nbytes), tile)


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """How the shards of one task were made."""

    samples: int
    """Count of samples: pairs, or clean pictures for denoise."""
    layout: str
    """The layout of the source folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the packing that change the bytes."""
    expected: int = 0
    """Samples of the whole benchmark; 0 where any count is right."""
    missing: list[str] = field(default_factory=list)
    """Files that the benchmark has and the source folder had not."""
    leaks: list[str] = field(default_factory=list)
    """Pictures that are known to stand in a test set too."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a folder of shards but the pictures."""

    schema: int = SCHEMA
    """Version of this file's form."""
    tasks: dict[str, TaskEntry]
    """Task -> how it was packed, in the order of `TASKS`."""
    shards: tuple[Shard, ...]
    """The shards, tasks in the order of `TASKS`, each task's in the order of its samples."""
    uri: str = ""
    """Where it was read from; not written."""

    @property
    def fingerprint(self) -> str:
        """sha256 over names, counts and hashes of all shards: the same for the same pictures
        anywhere."""
        return hashlib.sha256(_canonical([list(shard) for shard in self.shards])).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Task -> samples."""
        return {task: entry.samples for task, entry in self.tasks.items()}

    def mend(self, task: str) -> str:
        """What to do about a damaged shard of a task, as the end of a sentence."""
        entry = self.tasks[task]
        named = f" --task {task}" if entry.layout == "paired" else ""
        return (
            "copy it again, or make it anew from the pictures by "
            f"`python -m shards.pack {entry.layout} ROOT {self.uri}{named} --repair`"
        )

    def of(self, task: str) -> list[Shard]:
        """The shards of one task."""
        return [shard for shard in self.shards if shard.task == task]

    def to_bytes(self) -> bytes:
        """`manifest.json`; one line per shard, so that changes can be read."""
        head = {
            "schema": self.schema,
            "fingerprint": self.fingerprint,
            "tasks": {task: dataclasses.asdict(entry) for task, entry in self.tasks.items()},
        }
        rows = ",\n".join("  " + json.dumps(shard._asdict()) for shard in self.shards)
        text = json.dumps(head, indent=1, ensure_ascii=False)
        return (text[:-2] + ',\n "shards": [\n' + rows + "\n ]\n}\n").encode()

    def with_task(self, task: str, entry: TaskEntry, shards: list[Shard]) -> "Manifest":
        """Adds a task, or puts new shards in the place of its old ones."""
        tasks = {**self.tasks, task: entry}
        everything = [shard for shard in self.shards if shard.task != task] + shards
        return Manifest(
            tasks={name: tasks[name] for name in TASKS if name in tasks},
            shards=tuple(sorted(everything, key=lambda row: (TASKS.index(row.task), row.name))),
            uri=self.uri,
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def read(uri: str) -> Manifest:
    """Reads `manifest.json` of a packed folder or store.

    ValueError, with the command that mends it, where there is none, where it is damaged, where it
    is of another version, or where it names a file outside of its folder.
    """
    uri = storage.checked(uri)
    where = storage.join(uri, NAME)
    try:
        data = storage.read(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{uri} has no {NAME}, so it is not a (finished) folder of packed shards; "
            f"make it by `python -m shards.pack LAYOUT ROOT {uri}`"
        ) from error
    try:
        return _parse(json.loads(data), uri)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where} is damaged ({type(error).__name__}: {error}); copy it again, or pack again"
        ) from error


def _parse(raw: dict[str, Any], uri: str) -> Manifest:
    where = storage.join(uri, NAME)
    if raw["schema"] != SCHEMA:
        raise ValueError(
            f"{where} is of version {raw['schema']}, this program reads {SCHEMA}; pack again"
        )
    manifest = Manifest(
        tasks={task: TaskEntry(**entry) for task, entry in raw["tasks"].items()},
        shards=tuple(Shard(**row) for row in raw["shards"]),
        uri=uri,
    )
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{where} names {shard.name!r}, which is not a shard of its folder")
        if shard.task not in manifest.tasks or shard.task not in TASKS:
            raise ValueError(f"{where}: {shard.name} is of an unknown task {shard.task!r}")
    for task, entry in manifest.tasks.items():
        if sum(shard.samples for shard in manifest.of(task)) != entry.samples:
            raise ValueError(f"{where} is damaged: the shards of {task} do not add up; pack again")
    if raw["fingerprint"] != manifest.fingerprint:
        raise ValueError(
            f"{where} is damaged: its fingerprint does not fit its shards; copy it again, or pack "
            "again"
        )
    return manifest


def write(manifest: Manifest, uri: str) -> None:
    """Writes `manifest.json`, whole or not at all."""
    storage.write(storage.join(uri, NAME), manifest.to_bytes())
