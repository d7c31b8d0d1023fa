"""Are the shards what was packed? `python -m shards.inspect DIR` verifies, describes and draws.

Every byte is hashed, in parallel; `--deep` decodes every picture as well. What is wrong is named,
with the command that mends it. A contact sheet shows samples of each task.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from shards import degrade, manifest, storage
from shards.cache import Cache
from shards.config import DataConfig
from shards.manifest import Manifest, Shard
from shards.reader import DamagedError, Reader
from shards.tasks import TASKS

_IN_PROCESS = 64 * 2**20
"""Sets of fewer bytes are hashed in this process: others take longer to start."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """File name."""
    problem: str
    """What is wrong."""
    mend: str
    """What to do about it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a folder or store of shards."""

    uri: str
    """The place."""
    ok: bool
    """Nothing is wrong."""
    deep: bool
    """Every picture was decoded too."""
    fingerprint: str
    """Of the manifest."""
    tasks: dict[str, dict[str, Any]]
    """Task -> samples, shards, bytes, layout, options, tile, missing, leaks."""
    sizes: dict[str, dict[str, int]]
    """Task -> "WIDTHxHEIGHT" -> samples, the commonest first."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the shards."""
    shared: list[str] = field(default_factory=list)
    """Clean pictures that the other set holds too, one line each."""
    contact_sheet: str | None = None
    """PNG that was drawn."""


def inspect(
    uri: str,
    *,
    deep: bool = False,
    workers: int | None = None,
    sheet: str | None = None,
    against: str | None = None,
    data: DataConfig | None = None,
) -> Report:
    """Verifies a packed folder or store; draws a contact sheet where `sheet` names a PNG.

    `against` names another packed set: clean pictures that look the same in both are reported.
    `data` gives the cache for remote stores. ValueError where there is no readable manifest.
    """
    data = data or DataConfig()
    made = manifest.read(uri)
    cache = Cache(folder=data.cache_dir, limit=int(data.cache_gib * 2**30), attempts=2)
    work = [(made.uri, shard, deep, cache) for shard in made.shards]
    problems: list[Problem] = []
    sizes: dict[str, Counter[str]] = {task: Counter() for task in made.tasks}
    tiles: dict[str, int] = {}
    with _mapping(made, deep, workers) as spread:
        for shard, found in zip(made.shards, spread(_check_shard, work), strict=True):
            wrong, counted, tile = found
            mend = made.mend(shard.task)
            problems += [Problem(shard=name, problem=what, mend=mend) for name, what in wrong]
            sizes[shard.task].update(counted)
            tiles[shard.task] = tile
    problems += _strays(made)
    shared = [] if against is None else in_both(Reader(made, cache), _reader(against, cache))
    drawn = None
    if sheet is not None:
        drawn = sheet if contact_sheet(Reader(made, cache), sheet) else None
    return Report(
        uri=made.uri,
        ok=not problems,
        deep=deep,
        fingerprint=made.fingerprint,
        tasks={task: _describe(made, task, tiles.get(task, 0)) for task in made.tasks},
        sizes={task: dict(counter.most_common()) for task, counter in sizes.items()},
        problems=problems,
        shared=shared,
        contact_sheet=drawn,
    )


def _reader(uri: str, cache: Cache) -> Reader:
    return Reader(manifest.read(uri), cache)


def _strays(made: Manifest) -> list[Problem]:
    """Shards in the folder that the manifest does not name: a plain WebDataset reader would take
    them."""
    named = {shard.name for shard in made.shards}
    strays = [n for n in storage.names(made.uri) if n.endswith(".tar") and n not in named]
    mend = "finish the packing that wrote it, or remove it"
    return [Problem(shard=n, problem="is not named in the manifest", mend=mend) for n in strays]


ALIKE = 10
"""Bits of 128 that the signatures of two copies of a picture may differ in."""


def in_both(one: Reader, other: Reader) -> list[str]:
    """Clean pictures of one set that stand in the other one too, judged by their signatures.

    Found also where they were scaled, cropped by a few pixels or encoded again. One line each, with
    the names of both source files.
    """
    numbers, marks = _signatures(one)
    other_numbers, other_marks = _signatures(other)
    lines = []
    for (task, number), mark in zip(numbers, marks, strict=True):
        differ = np.bitwise_count(other_marks ^ mark).sum(axis=1)
        for match in np.flatnonzero(differ <= ALIKE)[:1]:
            other_task, other_number = other_numbers[match]
            names = [
                reader.about(reader.locate(t, n))["target"]
                for reader, t, n in ((one, task, number), (other, other_task, other_number))
            ]
            lines.append(f"{task} {names[0]} is {other_task} {names[1]}")
    return sorted(set(lines))


def _signatures(reader: Reader) -> tuple[list[tuple[str, int]], np.ndarray]:
    """(task, number) of one sample for each clean picture, and (n, 2) uint64 signatures."""
    numbers: list[tuple[str, int]] = []
    marks: list[np.ndarray] = []
    for task, shards in reader.shards.items():
        first = 0
        for shard in shards:
            samples = reader.index(shard).samples
            _, one_each = np.unique(samples["target"], return_index=True)
            numbers += [(task, first + int(row)) for row in one_each]
            marks.append(np.frombuffer(samples["signature"][one_each].tobytes(), np.uint64))
            first += len(samples)
    return numbers, np.concatenate(marks).reshape(-1, 2)


def _describe(made: Manifest, task: str, tile: int) -> dict[str, Any]:
    entry = dataclasses.asdict(made.tasks[task])
    shards = made.of(task)
    size = sum(shard.bytes for shard in shards)
    return {**entry, "shards": len(shards), "bytes": size, "tile": tile}


@contextlib.contextmanager
def _mapping(made: Manifest, deep: bool, workers: int | None) -> Iterator[Any]:
    workers = min(workers or os.cpu_count() or 1, len(made.shards))
    size = sum(shard.bytes for shard in made.shards)
    if workers <= 1 or size * (20 if deep else 1) < _IN_PROCESS:
        yield map
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _check_shard(
    work: tuple[str, Shard, bool, Cache],
) -> tuple[list[tuple[str, str]], Counter[str], int]:
    """What is wrong with a shard ((file, what) each), its samples by size, and the side of its
    tiles."""
    uri, shard, deep, cache = work
    reader = Reader(_only(uri, shard), cache)
    wrong = _check_file(uri, shard)
    sizes: Counter[str] = Counter()
    tile = 0
    try:
        index = reader.index(shard)
        sizes.update(f"{row['width']}x{row['height']}" for row in index.samples)
        tile = index.tile
        if deep or (wrong and not storage.is_remote(uri)):
            wrong += _check_samples(reader, shard)
        if deep and not wrong:
            wrong += _check_members(reader, shard)
    except DamagedError as error:
        if not wrong or wrong[0][1] not in error.what:
            wrong.append((shard.index_name if "idx" in error.what else shard.name, error.what))
    except OSError as error:
        wrong.append((shard.name, str(error)))
    finally:
        reader.close()
    return wrong, sizes, tile


def _only(uri: str, shard: Shard) -> Manifest:
    """A manifest of one shard, so that its samples count from 0."""
    entry = manifest.TaskEntry(samples=shard.samples, layout="")
    return Manifest(tasks={shard.task: entry}, shards=(shard,), uri=uri)


def _check_file(uri: str, shard: Shard) -> list[tuple[str, str]]:
    try:
        size, digest = storage.size_and_sha256(storage.join(uri, shard.name))
    except FileNotFoundError:
        return [(shard.name, "is named in the manifest, but is not there")]
    if size != shard.bytes:
        return [(shard.name, f"has {size} bytes, but the manifest says {shard.bytes}")]
    if digest != shard.sha256:
        return [(shard.name, "its bytes have changed since packing (sha256)")]
    return []


def _check_samples(reader: Reader, shard: Shard) -> list[tuple[str, str]]:
    """Decodes each sample; one line for each that fails."""
    wrong = []
    for number in range(shard.samples):
        try:
            place = reader.locate(shard.task, number)
            size = place.size
            for picture in reader.both(place):
                if picture is not None and picture.shape[:2] != size:
                    wrong.append((shard.name, f"sample {number} is not {size[1]}x{size[0]}"))
            reader.about(place)
        except DamagedError as error:
            if "bytes, but" in error.what or "not there" in error.what:
                break  # of the whole shard, and said already
            wrong.append((shard.name, error.what))
    return wrong


def _check_members(reader: Reader, shard: Shard) -> list[tuple[str, str]]:
    """The tar as any other reader sees it: as many members, where the index says."""
    offsets = reader.index(shard).members["offset"].tolist()
    with tarfile.open(reader.local_path(shard)) as tar:
        if [member.offset_data for member in tar.getmembers()] != offsets:
            return [(shard.name, "its members are not where the index says")]
    return []


_CELL = 160
_PER_TASK = 6


def contact_sheet(reader: Reader, path: str) -> bool:
    """Draws samples of each task, degraded above clean, to a PNG; False where that fails."""
    rows = []
    for task, count in reader.manifest.counts.items():
        numbers = np.unique(np.linspace(0, count - 1, min(_PER_TASK, count)).astype(int))
        columns = [_column(reader, task, int(number)) for number in numbers]
        rows.append((task, count, [cell for cell in columns if cell is not None]))
    sheet = Image.new(
        "RGB", (110 + _PER_TASK * (_CELL + 6), len(rows) * (2 * _CELL + 16) + 10), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for line, (task, count, cells) in enumerate(rows):
        top = 10 + line * (2 * _CELL + 16)
        draw.text((10, top), f"{task}\n{count} samples", fill="black")
        for column, (degraded, clean) in enumerate(cells):
            left = 110 + column * (_CELL + 6)
            sheet.paste(degraded, (left, top))
            sheet.paste(clean, (left, top + _CELL + 2))
    try:
        with storage.replacing(path) as temporary:
            sheet.save(temporary, "PNG")
    except OSError:
        return False
    return True


def _column(reader: Reader, task: str, number: int) -> tuple[Image.Image, Image.Image] | None:
    try:
        place = reader.locate(task, number)
        degraded, clean = reader.both(place)
    except (DamagedError, OSError):
        return None
    if degraded is None:  # noise is added while loading; shown with σ 25
        degraded = degrade.noise(clean, 25.0, degrade.generator("sheet", reader.checksum(place)))
    return _cell(degraded), _cell(clean)


def _cell(pixels: np.ndarray) -> Image.Image:
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return square.resize((_CELL, _CELL), Image.Resampling.LANCZOS)


def show(report: Report) -> None:
    """Prints a report."""
    console = Console()
    table = Table(title=report.uri, title_justify="left")
    for name in ("task", "samples", "shards", "MB", "layout", "commonest sizes", "leaks"):
        table.add_column(name, justify="right" if name in ("samples", "shards", "MB") else "left")
    for task in TASKS:
        if task in report.tasks:
            row = report.tasks[task]
            sizes = [f"{size} ({n})" for size, n in list(report.sizes[task].items())[:3]]
            more = len(report.sizes[task]) - 3
            table.add_row(
                task,
                f"{row['samples']:,}" + (f" of {row['expected']:,}" if row["expected"] else ""),
                str(row["shards"]),
                f"{row['bytes'] / 1e6:.1f}",
                row["layout"],
                "\n".join(sizes) + (f"\n{more} more" if more > 0 else ""),
                str(len(row["leaks"])),
            )
    console.print(table)
    if report.ok:
        print(f"every hash is right{' and every picture decodes' if report.deep else ''}")
    for line in report.shared:
        print(f"in both: {line}")
    if report.contact_sheet:
        print(f"contact sheet: {report.contact_sheet}")


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 with one line on stderr for each thing that is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m shards.inspect",
        description=textwrap.dedent(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("uri", metavar="DIR", help="folder or store of packed shards")
    parser.add_argument("--deep", action="store_true", help="decode every picture")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--workers", type=int, help="processes; default one per core")
    parser.add_argument("--against", metavar="DIR", help="name pictures that this set holds too")
    parser.add_argument("--sheet", help="the contact sheet; default DIR/contact_sheet.png")
    options = parser.parse_args(argv)
    remote = storage.is_remote(options.uri)
    sheet = options.sheet or ("contact_sheet.png" if remote else f"{options.uri}/contact_sheet.png")
    try:
        report = inspect(
            options.uri,
            deep=options.deep,
            workers=options.workers,
            sheet=sheet,
            against=options.against,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        show(report)
    for problem in report.problems:
        print(f"error: {problem.shard}: {problem.problem}; {problem.mend}", file=sys.stderr)
    return 0 if report.ok else 2


if __name__ == "__main__":
    sys.exit(main())
