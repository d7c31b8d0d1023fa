"""What a folder of shards holds: `manifest.json`, and an index beside each tar.

The tars are plain WebDataset: any reader opens them. `shards.pack` writes them, or another program
wrote them and `shards.index` indexed them. WebDataset does not know how many samples
there should be, where each one starts, or whether its bytes have changed since then. That is
stored here.

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
import shlex
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards import storage
from shards.tasks import TASKS

SCHEMA = 1
NAME = "manifest.json"
WEBDATASET = "webdataset"
"""Layout of tars that another program wrote and `shards.index` indexed."""
NONE = 0xFFFFFFFF
"""In a `SAMPLE` row: there is no such member."""
TILED_INPUT, TILED_TARGET, SEVERAL = 1, 2, 4
"""Flags of a `SAMPLE` row: the input is in tiles; the target is in tiles; the target has several
inputs."""

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
"""One member of the tar: where its data starts, its length in bytes, and its checksum."""
SAMPLE = np.dtype(
    [
        ("input", "<u4"),
        ("target", "<u4"),
        ("meta", "<u4"),
        ("group", "<u4"),
        ("part", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("top", "<u2"),
        ("left", "<u2"),
        ("flags", "u1"),
        ("signature", "V16"),
    ]
)
"""One sample.

`input`: member of the degraded picture, or of its first tile; NONE where only the clean picture is
stored. `target`: the same for the clean picture. `meta`: member that describes the sample as JSON;
NONE in tars that another program wrote. `group`: number in the key (in tars of another program:
within the tar); samples of one group share their clean picture. `part`: which input of its group
this is. `height`, `width`: of the degraded picture.
`top`, `left`: where it lies in a larger clean picture. `flags`: sum of `TILED_INPUT`,
`TILED_TARGET` and `SEVERAL`. `signature`: of the clean picture, to find the same picture in another
dataset.
"""
_HEADER = struct.Struct("<4s5I")
SHARD_NAME = re.compile(r"(?:[\w+=,@-][\w.+=,@ -]*/)*[\w+=,@-][\w.+=,@ -]*\.tar")
"""Names that a manifest may hold, relative to the folder of the tars: none leads out of it."""
_ANEW = "copy it again, or remove it and pack or index again"


class Shard(NamedTuple):
    """One tar and its index: a row of the manifest."""

    name: str
    task: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """`denoise-000000.idx` for `denoise-000000.tar`, `0.denoise.idx` for `0.tar`.

        So a tar that another program wrote can serve several tasks, and two folders of such tars
        can have the same names.
        """
        stem = self.name.removesuffix(".tar")
        packed = stem.startswith(f"{self.task}-")
        return f"{stem}.idx" if packed else f"{stem}.{self.task}.idx"


class Index(NamedTuple):
    """The index of a shard: the members of the tar, and the samples that they make up."""

    members: np.ndarray
    """(m,) of `MEMBER`."""
    samples: np.ndarray
    """(n,) of `SAMPLE`."""
    tile: int
    """Side of the square tiles that pictures are cut into, in pixels; 0 where they are whole."""

    def to_bytes(self) -> bytes:
        """The index file."""
        header = _HEADER.pack(b"MSIX", 1, len(self.members), len(self.samples), self.tile, 0)
        return header + self.members.tobytes() + self.samples.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """Reads an index file; ValueError where it is damaged."""
        if len(data) < _HEADER.size:
            raise ValueError(f"the index has only {len(data)} bytes")
        magic, version, members, samples, tile, _ = _HEADER.unpack_from(data)
        if magic != b"MSIX" or version != 1:
            raise ValueError("the file is not an index of version 1")
        if len(data) != _HEADER.size + members * MEMBER.itemsize + samples * SAMPLE.itemsize:
            raise ValueError(f"the index has {len(data)} bytes, but its header says otherwise")
        start = _HEADER.size
        table = np.frombuffer(data, MEMBER, members, start)
        return cls(table, np.frombuffer(data, SAMPLE, samples, start + table.nbytes), tile)


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """How the shards of one task were made."""

    samples: int
    """Count of samples: pairs, or clean pictures for denoise."""
    layout: str
    """The layout of the source folder; `WEBDATASET` for tars of another program."""
    options: dict[str, Any] = field(default_factory=dict)
    """The options of packing that change the bytes, or the options of indexing."""
    source: str = ""
    """Folder or URI of the tars; empty where they are beside the manifest."""
    expected: int = 0
    """Samples of the complete benchmark; 0 where any count is right."""
    missing: list[str] = field(default_factory=list)
    """Files of the benchmark that the source folder did not have, as far as their names are known;
    or samples that indexing left out, with the reasons."""
    leaks: list[str] = field(default_factory=list)
    """Pictures that are known to be part of a test set too."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a folder of shards except the pictures."""

    schema: int = SCHEMA
    """Version of the file format."""
    tasks: dict[str, TaskEntry]
    """Task -> how it was packed, in the order of `TASKS`."""
    shards: tuple[Shard, ...]
    """The shards, tasks in the order of `TASKS`, each task's in the order of its samples."""
    uri: str = ""
    """Where it was read from; not written to the file."""

    @property
    def fingerprint(self) -> str:
        """sha256 over names, counts and hashes of all shards: the same for the same pictures,
        wherever they are stored."""
        return hashlib.sha256(_canonical([list(shard) for shard in self.shards])).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Task -> samples."""
        return {task: entry.samples for task, entry in self.tasks.items()}

    def location(self, shard: Shard) -> str:
        """Path or URI of a tar."""
        return storage.join(self.tasks[shard.task].source or self.uri, shard.name)

    def remedy(self, task: str) -> str:
        """What to do about a damaged shard of a task, as the end of a sentence."""
        entry = self.tasks[task]
        if entry.layout == WEBDATASET:
            return f"copy it again, or index the tars again by `{self._index_command(task)}`"
        task_option = f" --task {task}" if entry.layout == "paired" else ""
        return (
            "copy it again, or pack it again from the pictures by "
            f"`python -m shards.pack {entry.layout} ROOT {self.uri}{task_option} --repair`"
        )

    def _index_command(self, task: str) -> str:
        """The command that indexed the tars of a task."""
        entry, most = self.tasks[task], 3
        patterns, fields = entry.options["tars"], ("clean", "degraded")
        words = [storage.join(entry.source or self.uri, one) for one in patterns[:most]]
        more = [f"… ({len(patterns)} in all)"] if len(patterns) > most else []
        options = ["--task", task]
        named = [(f"--{field}", entry.options[field]) for field in fields if entry.options[field]]
        options += [word for pair in named for word in pair]
        options += ["--out", self.uri] if entry.source else []
        options += ["--skip-corrupt"] if entry.options["skip_corrupt"] else []
        return " ".join(["python -m shards.index", shlex.join(words), *more, shlex.join(options)])

    def shards_of(self, task: str) -> list[Shard]:
        """The shards of one task."""
        return [shard for shard in self.shards if shard.task == task]

    def to_bytes(self) -> bytes:
        """`manifest.json`, with one line per shard."""
        head = {
            "schema": self.schema,
            "fingerprint": self.fingerprint,
            "tasks": {task: dataclasses.asdict(entry) for task, entry in self.tasks.items()},
        }
        rows = ",\n".join("  " + json.dumps(shard._asdict()) for shard in self.shards)
        text = json.dumps(head, indent=1, ensure_ascii=False)
        return (text[:-2] + ',\n "shards": [\n' + rows + "\n ]\n}\n").encode()

    def with_task(self, task: str, entry: TaskEntry, shards: list[Shard]) -> "Manifest":
        """The manifest with a task added, or with its shards replaced."""
        tasks = {**self.tasks, task: entry}
        all_shards = [shard for shard in self.shards if shard.task != task] + shards
        return Manifest(
            tasks={name: tasks[name] for name in TASKS if name in tasks},
            shards=tuple(sorted(all_shards, key=lambda row: (TASKS.index(row.task), row.name))),
            uri=self.uri,
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def read(uri: str) -> Manifest:
    """Reads `manifest.json` of a folder or store of shards.

    Raises:
        ValueError: there is none, it is damaged or of another version, or it names a file outside
            its folder. The message names the command that helps.
    """
    uri = storage.checked(uri)
    where = storage.join(uri, NAME)
    try:
        data = storage.read(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(_not_packed(uri)) from error
    try:
        return _parse(json.loads(data), uri)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where} is damaged ({type(error).__name__}: {error}); {_ANEW}"
        ) from error


def _not_packed(uri: str) -> str:
    """What to do where there is no manifest."""
    names = [] if uri.startswith("http") else storage.list_names(uri)
    if any(name.endswith(".tar") for name in names) and ".packing" not in names:
        return (
            f"{uri} holds tars, but no {NAME}; index them by `python -m shards.index {uri} "
            "--task TASK --clean FIELD --degraded FIELD` (denoise has no --degraded)"
        )
    return (
        f"{uri} has no {NAME}, so it is not a (finished) folder of packed shards; "
        f"make it by `python -m shards.pack LAYOUT ROOT {uri}`"
    )


def _parse(raw: dict[str, Any], uri: str) -> Manifest:
    where = storage.join(uri, NAME)
    if raw["schema"] != SCHEMA:
        raise ValueError(
            f"{where} has version {raw['schema']}, but this program reads version {SCHEMA}; "
            "pack or index again"
        )
    manifest = Manifest(
        tasks={task: TaskEntry(**entry) for task, entry in raw["tasks"].items()},
        shards=tuple(Shard(**row) for row in raw["shards"]),
        uri=uri,
    )
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{where} names {shard.name!r}, which is not a shard in its folder")
        if shard.task not in manifest.tasks or shard.task not in TASKS:
            raise ValueError(f"{where}: {shard.name} has the unknown task {shard.task!r}")
    for task, entry in manifest.tasks.items():
        storage.checked(entry.source)
        if sum(shard.samples for shard in manifest.shards_of(task)) != entry.samples:
            raise ValueError(
                f"{where} is damaged: the samples of {task}'s shards do not add up to "
                f"{entry.samples}; {_ANEW}"
            )
    if raw["fingerprint"] != manifest.fingerprint:
        raise ValueError(f"{where} is damaged: its fingerprint does not match its shards; {_ANEW}")
    return manifest


def write(manifest: Manifest, uri: str) -> None:
    """Writes `manifest.json`, atomically."""
    storage.write(storage.join(uri, NAME), manifest.to_bytes())
