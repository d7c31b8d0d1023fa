"""Checks shards: `python -m shards.inspect DIR` verifies and describes them, and draws samples.

Every byte is hashed, in parallel; `--deep` decodes every picture as well. Each problem is named
with the command that repairs it. A contact sheet shows samples of each task.
"""

import dataclasses
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from shards import degrade, interrupt, manifest, storage
from shards.cache import Cache
from shards.config import DataConfig
from shards.execution import map_in_processes
from shards.manifest import Manifest
from shards.reader import Damage, DamagedError, Reader
from shards.table import Shard, ShardTable
from shards.tasks import TASKS
from shards.wording import counted

_IN_PROCESS = 64 * 2**20
"""Fewer bytes than these are hashed in this process: starting others would take longer."""
_PATIENCE_S = 10.0
"""Seconds for which a fetch is retried: shorter than in training, because somebody waits."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """File name."""
    problem: str
    """What is wrong."""
    remedy: str
    """What to do about it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a folder or store of shards."""

    uri: str
    """Folder or store."""
    ok: bool
    """Nothing is wrong."""
    deep: bool
    """Every picture was decoded."""
    fingerprint: str
    """Of the manifest."""
    tasks: dict[str, dict[str, Any]]
    """Task -> samples, shards, bytes, layout, options, tile, missing, leaks."""
    sizes: dict[str, dict[str, int]]
    """Task -> "WIDTHxHEIGHT" -> samples, the most frequent size first."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the shards."""
    against: str | None = None
    """The other dataset that it was compared with."""
    shared: list[str] = field(default_factory=list)
    """Clean pictures that both datasets have, one line each."""
    contact_sheet: str | None = None
    """The PNG file that was drawn."""


def inspect(
    uri: str,
    *,
    deep: bool = False,
    workers: int | None = None,
    sheet: str | None = None,
    against: str | None = None,
    data: DataConfig | None = None,
) -> Report:
    """Verifies a folder or store of shards.

    Args:
        uri: the folder or store.
        deep: decode every picture as well.
        workers: processes; None for one per core.
        sheet: PNG file for a contact sheet.
        against: another folder or store; clean pictures that look the same in both are reported.
        data: the cache for remote stores.

    Raises:
        ValueError: there is no readable manifest.
    """
    data = data or DataConfig()
    source = manifest.read(uri)
    cache_bytes = int(data.cache_gib * 2**30)
    cache = Cache(folder=data.cache_dir, limit=cache_bytes, patience_s=_PATIENCE_S)
    work = [(_only(source, shard), deep, cache) for shard in source.shards]
    problems: list[Problem] = []
    sizes: dict[str, Counter[str]] = {task: Counter() for task in source.tasks}
    tiles: dict[str, int] = {}
    checks = map_in_processes(_check_shard, work, _process_count(source, deep, workers))
    for shard, check in zip(source.shards, checks, strict=True):
        problems += [
            dataclasses.replace(problem, remedy=source.remedy(shard.task))
            for problem in check.problems
        ]
        sizes[shard.task].update(check.sizes)
        tiles[shard.task] = check.tile
    problems += _stray_shards(source)
    shared = [] if against is None else in_both(Reader(source, cache), _reader(against, cache))
    drawn = None
    if sheet is not None:
        drawn = sheet if contact_sheet(Reader(source, cache), sheet) else None
    return Report(
        uri=source.uri,
        ok=not problems,
        deep=deep,
        fingerprint=source.fingerprint,
        tasks={task: _describe(source, task, tiles.get(task, 0)) for task in source.tasks},
        sizes={task: dict(counter.most_common()) for task, counter in sizes.items()},
        problems=problems,
        against=against,
        shared=shared,
        contact_sheet=drawn,
    )


def _reader(uri: str, cache: Cache) -> Reader:
    return Reader(manifest.read(uri), cache)


def _stray_shards(source: Manifest) -> list[Problem]:
    """Tars in a packed folder that are not in the manifest: a plain WebDataset reader would read
    them. Beside indexed tars there may be others, on purpose."""
    if any(entry.layout == manifest.WEBDATASET for entry in source.tasks.values()):
        return []
    named = {shard.name for shard in source.shards}
    strays = [n for n in storage.list_names(source.uri) if n.endswith(".tar") and n not in named]
    remedy = "finish the packing that wrote it, or remove it"
    return [Problem(shard=n, problem="is not named in the manifest", remedy=remedy) for n in strays]


ALIKE = 10
"""Two pictures count as the same if at most so many of 128 bits of their signatures differ."""


def in_both(one: Reader, other: Reader) -> list[str]:
    """Clean pictures that both datasets have, one line each, with the names of both source files.

    They are compared by signature, so a copy is found that was scaled, cropped by a few pixels or
    encoded again.
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
    """(task, number) of one sample per clean picture, and (n, 2) uint64 signatures."""
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


def _describe(source: Manifest, task: str, tile: int) -> dict[str, Any]:
    entry = dataclasses.asdict(source.tasks[task])
    shards = source.shards_of(task)
    size = sum(shard.bytes for shard in shards)
    return {**entry, "shards": len(shards), "bytes": size, "tile": tile}


def _process_count(source: Manifest, deep: bool, workers: int | None) -> int:
    size = sum(shard.bytes for shard in source.shards)
    if size * (20 if deep else 1) < _IN_PROCESS:
        return 1
    return min(workers or os.cpu_count() or 1, len(source.shards))


class _Check(NamedTuple):
    """What was found in one shard."""

    problems: list[Problem]
    """Without a remedy yet."""
    sizes: Counter[str]
    """"WIDTHxHEIGHT" -> samples."""
    tile: int
    """Side of the tiles, or 0."""


def _problem(file: str, problem: str) -> Problem:
    return Problem(shard=file, problem=problem, remedy="")


def _check_shard(work: tuple[Manifest, bool, Cache]) -> _Check:
    source, deep, cache = work
    (shard,) = source.shards
    reader = Reader(source, cache)
    problems = _check_file(source.location(shard), shard)
    sizes: Counter[str] = Counter()
    tile = 0
    try:
        index = reader.index(shard)
        sizes.update(f"{row['width']}x{row['height']}" for row in index.samples)
        tile = index.tile
        if deep or (problems and not storage.is_remote(source.location(shard))):
            problems += _check_samples(reader, shard)
        if deep and not problems:
            problems += _check_members(reader, shard)
    except DamagedError as error:
        file = shard.index_name if error.kind is Damage.INDEX else shard.name
        problems.append(_problem(file, error.problem))
    except OSError as error:
        problems.append(_problem(shard.name, str(error)))
    finally:
        reader.close()
    return _Check(problems, sizes, tile)


def _only(source: Manifest, shard: Shard) -> Manifest:
    """A manifest of one shard, so that its samples count from 0."""
    entry = dataclasses.replace(source.tasks[shard.task], samples=shard.samples)
    return Manifest(tasks={shard.task: entry}, shards=ShardTable.of([shard]), uri=source.uri)


def _check_file(location: str, shard: Shard) -> list[Problem]:
    try:
        size, digest = storage.size_and_sha256(location)
    except FileNotFoundError:
        return [_problem(shard.name, "is named in the manifest, but does not exist")]
    if size != shard.bytes:
        text = f"has {size} bytes, but the manifest says {shard.bytes}"
        return [_problem(shard.name, text)]
    if digest != shard.sha256:
        return [_problem(shard.name, "its bytes have changed (sha256)")]
    return []


def _check_samples(reader: Reader, shard: Shard) -> list[Problem]:
    """Decodes each sample; one problem for each that fails."""
    problems = []
    for number in range(shard.samples):
        try:
            location = reader.locate(shard.task, number)
            height, width = location.size
            for picture in reader.both(location):
                if picture is not None and picture.shape[:2] != (height, width):
                    problems.append(
                        _problem(shard.name, f"sample {number} is not {width}x{height}")
                    )
            reader.about(location)
        except DamagedError as error:
            if error.kind.of_whole_shard:
                break  # _check_file has reported it already
            problems.append(_problem(shard.name, error.problem))
    return problems


def _check_members(reader: Reader, shard: Shard) -> list[Problem]:
    """The tar as any other reader sees it: it must have the members of the index, at their
    places."""
    offsets = reader.index(shard).members["offset"].tolist()
    with tarfile.open(reader.local_path(shard)) as tar:
        if [member.offset_data for member in tar.getmembers() if member.isreg()] != offsets:
            return [_problem(shard.name, "its members are not where the index says")]
    return []


_CELL = 160
_PER_TASK = 6


def contact_sheet(reader: Reader, path: str) -> bool:
    """Draws samples of each task, degraded above clean, as a PNG; False where it cannot be
    written."""
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
        draw.text((10, top), f"{task}\n{counted(count, 'sample')}", fill="black")
        for column, (degraded, clean) in enumerate(cells):
            left = 110 + column * (_CELL + 6)
            sheet.paste(degraded, (left, top))
            sheet.paste(clean, (left, top + _CELL + 2))
    try:
        with storage.atomic_path(path) as temporary:
            sheet.save(temporary, "PNG")
    except OSError:
        return False
    return True


def _column(reader: Reader, task: str, number: int) -> tuple[Image.Image, Image.Image] | None:
    try:
        location = reader.locate(task, number)
        degraded, clean = reader.both(location)
    except (DamagedError, OSError):
        return None
    if degraded is None:  # noise is added while loading; the sheet shows it with σ 25
        degraded = degrade.noise(clean, 25.0, degrade.generator("sheet", reader.checksum(location)))
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
    columns = ("task", "samples", "shards", "MB", "layout", "most frequent sizes", "known leaks")
    for name in columns:
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
    if report.against is not None and not report.shared:
        print(f"in both: none; {report.against} has no picture that looks the same")
    if report.contact_sheet:
        print(f"contact sheet: {report.contact_sheet}")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Verifies and describes shards, and draws samples of them."""

    uri: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """Folder or store of shards."""
    deep: bool = False
    """Decode every picture as well."""
    json: bool = False
    """Print the report as JSON."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes; by default one per core."""
    against: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Name the pictures that this other dataset has too; exit code 2 if there are any."""
    sheet: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """File of the contact sheet; by default DIR/contact_sheet.png."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 with one line on stderr for each problem."""
    options = tyro.cli(
        Arguments,
        args=argv,
        prog="python -m shards.inspect",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
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
        print(f"error: {problem.shard}: {problem.problem}; {problem.remedy}", file=sys.stderr)
    if report.shared:
        count = len(report.shared)
        print(
            f"error: {count} {'picture is' if count == 1 else 'pictures are'} in both "
            f"{report.uri} and {report.against}; results on a test set that was trained on are too "
            "good: leave these pictures out of one of them",
            file=sys.stderr,
        )
    return 0 if report.ok and not report.shared else 2


if __name__ == "__main__":
    sys.exit(interrupt.run_command(main))
