"""Where an evaluation's pictures are: packed shards, or the raw folder of a benchmark."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shards import layouts
from shards.packing import pack

SEPARATOR = "="


class Source(NamedTuple):
    """One set of pictures."""

    name: str
    """Names its results: the layout, or the last part of the folder."""
    place: str
    """Folder or URI of shards, or the raw folder."""
    layout: str = ""
    """Of a raw folder, as `shards.pack` has them; empty: packed shards."""


def parse(given: str) -> Source:
    """`data/shards/test`, or `cbsd68=FOLDER` for the raw pictures of a benchmark.

    Raises:
        ValueError: the layout is not known, or belongs to no benchmark task.
    """
    layout, separator, folder = given.partition(SEPARATOR)
    if not separator or "/" in layout or "://" in layout:
        return Source(Path(given.rstrip("/")).name or given, given)
    layouts.check_name(layout)
    if layouts.LAYOUTS[layout].task is None:
        raise ValueError(
            f"{given}: the layout {layout} has no task of its own; pack the folder with --task, "
            f"then evaluate the shards: python -m shards.pack {layout} {folder} OUT --task TASK"
        )
    return Source(layout, folder, layout)


def parse_all(given: list[str]) -> list[Source]:
    """Each one, with names that differ.

    Raises:
        ValueError: as `parse`.
    """
    sources: dict[str, Source] = {}
    for one in map(parse, given):
        numbered = (f"{one.name}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([one.name], numbered) if name not in sources)
        sources[name] = one._replace(name=name)
    return list(sources.values())


@contextmanager
def packed(source: Source) -> Iterator[str]:
    """Folder or URI of the source's shards; a raw folder is packed for the time of the block.

    Packing keeps the files' bytes, so noise and figures are those of shards packed beforehand. An
    incomplete benchmark is accepted: reports say how much of it there is.

    Raises:
        ValueError, OSError: nothing of the layout is in the folder, or the disk is full.
    """
    if not source.layout:
        yield source.place
        return
    with tempfile.TemporaryDirectory(prefix="measnet-evaluate-") as folder:
        out = str(Path(folder, source.name))
        pack(source.layout, source.place, out, allow_missing=True)
        yield out
