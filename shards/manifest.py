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

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from shards import storage
from shards.table import Shard, ShardTable, TableBuilder
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
SHARED_BYTES = 1 << 20
"""Size of `manifest.json` from which the processes of a node share its shards (5,000 of them)."""
TABLE_FORMAT = 1
"""Version of the shared files: the fields of `Shard` and `TaskEntry`."""
_BLOCK = 4096
"""Shards that are hashed at a time."""

log = logging.getLogger(__name__)
_ANEW = "copy it again, or remove it and pack or index again"


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
    shards: ShardTable
    """The shards, tasks in the order of `TASKS`, each task's in the order of its samples."""
    uri: str = ""
    """Where it was read from; not written to the file."""
    fingerprint: str = ""
    """sha256 over names, counts and hashes of all shards: the same for the same pictures, wherever
    they are stored; computed where it is not given."""

    def __post_init__(self) -> None:
        """Compute the fingerprint."""
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self.shards))

    @property
    def counts(self) -> dict[str, int]:
        """Task -> samples."""
        return {task: entry.samples for task, entry in self.tasks.items()}

    def folder(self, task: str) -> str:
        """Folder or URI of the tars of a task."""
        return self.tasks[task].source or self.uri

    def location(self, shard: Shard) -> str:
        """Path or URI of a tar."""
        return storage.join(self.folder(shard.task), shard.name)

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
        words = [storage.join(self.folder(task), one) for one in patterns[:most]]
        more = [f"… ({len(patterns)} in all)"] if len(patterns) > most else []
        options = ["--task", task]
        named = [(f"--{field}", entry.options[field]) for field in fields if entry.options[field]]
        options += [word for pair in named for word in pair]
        options += ["--out", self.uri] if entry.source else []
        options += ["--skip-corrupt"] if entry.options["skip_corrupt"] else []
        return " ".join(["python -m shards.index", shlex.join(words), *more, shlex.join(options)])

    def shards_of(self, task: str) -> ShardTable:
        """The shards of one task."""
        return self.shards.of_task(task)

    def to_bytes(self) -> bytes:
        """`manifest.json`, with one line per shard."""
        head = self.head()
        rows = ",\n".join("  " + json.dumps(shard._asdict()) for shard in self.shards)
        text = json.dumps(head, indent=1, ensure_ascii=False)
        return (text[:-2] + ',\n "shards": [\n' + rows + "\n ]\n}\n").encode()

    def head(self) -> dict[str, Any]:
        """All but the shards, as plain data."""
        tasks = {task: dataclasses.asdict(entry) for task, entry in self.tasks.items()}
        return {"schema": self.schema, "fingerprint": self.fingerprint, "tasks": tasks}

    def with_task(self, task: str, entry: TaskEntry, shards: Iterable[Shard]) -> "Manifest":
        """The manifest with a task added, or with its shards replaced."""
        tasks = {**self.tasks, task: entry}
        all_shards = [*(shard for shard in self.shards if shard.task != task), *shards]
        all_shards.sort(key=lambda row: (TASKS.index(row.task), row.name))
        return Manifest(
            tasks={name: tasks[name] for name in TASKS if name in tasks},
            shards=ShardTable.of(all_shards),
            uri=self.uri,
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _fingerprint(shards: ShardTable) -> str:
    """sha256 of the list of rows as JSON, a block at a time."""
    whole, left, comma = hashlib.sha256(b"["), iter(shards), b""
    while block := list(itertools.islice(left, _BLOCK)):
        whole.update(comma + _canonical([list(shard) for shard in block])[1:-1])
        comma = b","
    whole.update(b"]")
    return whole.hexdigest()


def read(uri: str, cache: str = "") -> Manifest:
    """Reads `manifest.json` of a folder or store of shards.

    Args:
        uri: the folder or store.
        cache: a local folder, through which the processes of this node share the shards of a large
            manifest as a mapped file; empty: each has its own.

    Raises:
        ValueError: there is none, it is damaged or of another version, or it names a file outside
            its folder. The message names the command that helps.
    """
    uri = storage.checked(uri)
    try:
        data = storage.read(storage.join(uri, NAME))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(_not_packed(uri)) from error
    if cache and len(data) >= SHARED_BYTES:
        return _read_shared(data, uri, os.path.expanduser(cache))
    return _parse(data, uri)


def _read_shared(data: bytes, uri: str, cache: str) -> Manifest:
    """The manifest with its shards mapped from a file of the cache, which is made where it is
    missing or damaged. Where the cache cannot be used, this process keeps them itself."""
    name = f"{hashlib.sha256(data).hexdigest()}.{TABLE_FORMAT}"
    table, head = (os.path.join(cache, f"{name}.{kind}") for kind in ("npy", "json"))
    try:
        os.makedirs(os.path.join(cache, "locks"), exist_ok=True)
        with FileLock(os.path.join(cache, "locks", name)):
            found = _mapped(table, head, uri)
            if found is None:
                made = _parse(data, uri)
                with storage.atomic_path(table) as temporary:
                    made.shards.save(temporary)
                size, sha256 = storage.size_and_sha256(table)
                about = made.head() | {"table_bytes": size, "table_sha256": sha256}
                storage.write(head, json.dumps(about).encode())
                found = _mapped(table, head, uri) or made
            return found
    except OSError as error:
        log.warning("cannot use the shard cache %s: %s; each process reads %s", cache, error, NAME)
        return _parse(data, uri)


def _mapped(table: str, head: str, uri: str) -> Manifest | None:
    """The manifest of these two files; None where one is missing, evicted or damaged."""
    try:
        about = json.loads(Path(head).read_bytes())
        if storage.size_and_sha256(table) != (about["table_bytes"], about["table_sha256"]):
            return None
        shards = ShardTable.mapped(table)
        for path in (table, head):
            os.utime(path)  # the cache removes what was not used for long
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return _from_head(about, shards, uri)


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


def _parse(data: bytes, uri: str) -> Manifest:
    where, rows = storage.join(uri, NAME), TableBuilder()

    def take(value: dict[str, Any]) -> dict[str, Any] | None:
        """Moves a shard into the table, so that a million of them are never plain objects."""
        if value.keys() != set(Shard._fields):
            return value
        rows.add(Shard(**value))
        return None

    with _damage_named(where):
        raw = json.loads(data, object_hook=take)
        version = raw["schema"]
    if version != SCHEMA:
        raise ValueError(
            f"{where} has version {version}, but this program reads version {SCHEMA}; "
            "pack or index again"
        )
    with _damage_named(where):
        if others := [row for row in raw["shards"] if row is not None]:
            raise TypeError(f"{others[0]} is not a shard")
        manifest = _from_head(raw | {"fingerprint": ""}, rows.table(), uri)
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{where} names {shard.name!r}, which is not a shard in its folder")
        if shard.task not in manifest.tasks or shard.task not in TASKS:
            raise ValueError(f"{where}: {shard.name} has the unknown task {shard.task!r}")
    for task, entry in manifest.tasks.items():
        storage.checked(entry.source)
        if manifest.shards_of(task).column("samples").sum() != entry.samples:
            raise ValueError(
                f"{where} is damaged: the samples of {task}'s shards do not add up to "
                f"{entry.samples}; {_ANEW}"
            )
    if raw["fingerprint"] != manifest.fingerprint:
        raise ValueError(f"{where} is damaged: its fingerprint does not match its shards; {_ANEW}")
    return manifest


@contextlib.contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """An error in the block means that the file is damaged."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"{where} is damaged ({type(error).__name__}: {error}); {_ANEW}"
        ) from error


def _from_head(head: dict[str, Any], shards: ShardTable, uri: str) -> Manifest:
    tasks = {task: TaskEntry(**entry) for task, entry in head["tasks"].items()}
    return Manifest(tasks=tasks, shards=shards, uri=uri, fingerprint=head["fingerprint"])


def write(manifest: Manifest, uri: str) -> None:
    """Writes `manifest.json`, atomically."""
    storage.write(storage.join(uri, NAME), manifest.to_bytes())
