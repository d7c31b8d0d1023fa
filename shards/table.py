"""The shards of a manifest as one array.

A million shards take 165 MB as an array, which the processes of a node share as a memory-mapped
file (`python bench/manifest.py`). As Python objects they took 850 MB in every process.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

_KINDS = ("S", "S", "<u8", "<u8", "S", "S")
"""How the fields of `Shard` are stored; text is as wide as the longest."""
_BLOCK = 4096
"""Rows that are turned from or into Python objects at a time."""


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


class ShardTable(Sequence[Shard]):
    """Shards in their order; a row becomes a `Shard` when it is asked for."""

    def __init__(self, rows: np.ndarray, file: str = "", start: int = 0) -> None:
        """Take the rows.

        Args:
            rows: (n,), structured: a field for each of `Shard`, text as UTF-8 bytes.
            file: the file that they are mapped from; empty: they are in memory.
            start: number of the first row in that file.
        """
        self._rows, self._file, self._start = rows, file, start

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "ShardTable":
        """The table of these shards."""
        builder = TableBuilder()
        for shard in shards:
            builder.add(shard)
        return builder.table()

    @classmethod
    def mapped(cls, file: str) -> "ShardTable":
        """The table in a file that `save` wrote; its rows are read when they are used."""
        return cls(np.load(file, mmap_mode="r"), file)

    def save(self, file: str) -> None:
        """Write a file for `mapped`."""
        with open(file, "wb") as opened:
            np.save(opened, self._rows)
            opened.flush()
            os.fsync(opened.fileno())

    def column(self, name: str) -> np.ndarray:
        """(n,): one field of all rows; text as UTF-8 bytes."""
        column: np.ndarray = self._rows[name]
        return column

    def of_task(self, task: str) -> "ShardTable":
        """The rows of one task."""
        chosen = np.flatnonzero(self._rows["task"] == task.encode())
        if len(chosen) == 0 or chosen[-1] - chosen[0] >= len(chosen):  # other tasks in between
            return ShardTable(self._rows[chosen])
        return self[int(chosen[0]) : int(chosen[-1]) + 1]

    def __len__(self) -> int:
        """The number of shards."""
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> "ShardTable": ...
    def __getitem__(self, at: int | slice) -> "Shard | ShardTable":
        """One shard, or the table of a range."""
        if isinstance(at, slice):
            first, _, step = at.indices(len(self))
            file = self._file if step == 1 else ""
            return ShardTable(self._rows[at], file, self._start + first)
        return _shard(self._rows[at].item())

    def __iter__(self) -> Iterator[Shard]:
        """Each shard."""
        for start in range(0, len(self), _BLOCK):
            yield from map(_shard, self._rows[start : start + _BLOCK].tolist())

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same shards in the same order."""
        if not isinstance(other, ShardTable):
            return NotImplemented
        return len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process of this node: of a mapped table only the file and the range."""
        if self._file:
            return _mapped_range, (self._file, self._start, len(self))
        return ShardTable, (self._rows,)


class TableBuilder:
    """Makes a table row by row, without keeping the rows as Python objects."""

    def __init__(self) -> None:
        """Begin with no row."""
        self._waiting: list[Shard] = []
        self._blocks = [_rows([])]

    def add(self, shard: Shard) -> None:
        """Append a row."""
        self._waiting.append(shard)
        if len(self._waiting) == _BLOCK:
            self._pack()

    def table(self) -> ShardTable:
        """All rows."""
        self._pack()
        return ShardTable(np.concatenate(self._blocks))  # as wide as the longest text

    def _pack(self) -> None:
        self._blocks.append(_rows(self._waiting))
        self._waiting = []


def _rows(shards: list[Shard]) -> np.ndarray:
    columns: list[list[Any]] = [[row[field] for row in shards] for field in range(len(_KINDS))]
    arrays = [
        np.array([text.encode() for text in column] if kind == "S" else column, kind)
        for kind, column in zip(_KINDS, columns, strict=True)
    ]
    kinds = [(name, array.dtype) for name, array in zip(Shard._fields, arrays, strict=True)]
    rows = np.empty(len(shards), kinds)
    for name, array in zip(Shard._fields, arrays, strict=True):
        rows[name] = array
    return rows


def _shard(row: tuple[bytes, bytes, int, int, bytes, bytes]) -> Shard:
    name, task, samples, size, sha256, index_sha256 = row
    return Shard(
        name.decode(), task.decode(), samples, size, sha256.decode(), index_sha256.decode()
    )


def _mapped_range(file: str, start: int, count: int) -> ShardTable:
    return ShardTable.mapped(file)[start : start + count]
