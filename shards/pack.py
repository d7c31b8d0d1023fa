"""Source folders -> shards: `python -m shards.pack LAYOUT ROOT OUT`.

A shard is one unit of work, done by one process: it is written aside and renamed when whole, and a
row about it is left in `OUT/.packing`. Killed and run again, the packing goes on with the shards
that are not there yet, and gives the same bytes as an undisturbed run. The manifest comes last:
without it nothing takes OUT for shards.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from shards import degrade, layouts, manifest, storage
from shards.decode import DecodeError, decode
from shards.layouts import Found, Group
from shards.manifest import Index, Manifest, Shard, TaskEntry
from shards.tasks import TASKS

WORK = ".packing"
"""Folder inside of OUT with the rows of finished shards while a packing is under way."""


class Job(NamedTuple):
    """One shard to write: everything its bytes depend on, and where it goes."""

    name: str
    task: str
    root: str
    out: str
    groups: tuple[Group, ...]
    first: int  # number of the first group within the task
    chain: tuple[str, ...]  # degradations to synthesise; empty: the inputs are files
    seed: int
    tiles: int

    def digest(self) -> str:
        """Changes with the options and with any of the source files."""
        files = [
            (path, os.path.getsize(full), os.stat(full).st_mtime_ns)
            for group in self.groups
            for path in (group.target, *group.inputs, *([group.map] if group.map else []))
            for full in [os.path.join(self.root, path)]
        ]
        return manifest.digest([self.name, self.first, self.chain, self.seed, self.tiles, files])


class _Tar:
    """Writes a plain USTAR archive member by member and notes where each one lies."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.members: list[tuple[int, int, int]] = []

    def add(self, name: str, data: bytes) -> int:
        """Writes one member; its number."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self.members.append((self.size, len(data), zlib.crc32(data)))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return len(self.members) - 1

    def close(self) -> None:
        """Writes the end of the archive and waits for the disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


_counter: Any = None
"""In a packing process: the shared count of pictures done."""


def _set_counter(counter: Any) -> None:
    global _counter
    _counter = counter


def write_shard(job: Job) -> Shard:
    """Writes one shard, its index and its row; returns the row. OSError or ValueError with a clear
    line."""
    target = storage.join(job.out, job.name)
    with contextlib.ExitStack() as stack:
        if storage.is_remote(job.out):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="measnet-pack-"))
            path = os.path.join(folder, job.name)
            shard, index = _write_tar(job, path)
            storage.put(path, target)
        else:
            path = stack.enter_context(storage.replacing(target))
            shard, index = _write_tar(job, path)
    storage.write(storage.join(job.out, shard.index_name), index)
    row = {"job": job.digest(), "row": shard._asdict()}
    storage.write(storage.join(job.out, f"{WORK}/{job.name}.json"), json.dumps(row).encode())
    return shard


def _write_tar(job: Job, path: str) -> tuple[Shard, bytes]:
    samples: list[tuple[int, ...]] = []
    with open(path, "wb") as file:
        tar = _Tar(file)
        for number, group in enumerate(job.groups, start=job.first):
            samples += _add_group(tar, job, group, f"{job.task}_{number:08d}")
            if _counter is not None:
                with _counter.get_lock():
                    _counter.value += 1
        tar.close()
    index = Index(
        np.array(tar.members, manifest.MEMBER), np.array(samples, manifest.SAMPLE), job.tiles
    ).to_bytes()
    sha256 = tar.sha256.hexdigest()
    index_sha256 = hashlib.sha256(index).hexdigest()
    return Shard(job.name, job.task, len(samples), tar.size, sha256, index_sha256), index


def _add_group(tar: _Tar, job: Job, group: Group, key: str) -> list[tuple[int, ...]]:
    """Writes a clean picture and its degraded ones; the rows of the index."""
    clean_bytes, clean = _open(job.root, group.target)
    height, width = clean.shape[:2]
    about: dict[str, Any] = {"target": group.target, "width": width, "height": height}
    rows: list[tuple[int, ...]] = []
    if job.chain:
        degraded, about["chain"] = _synthesise(job, group, clean)
        inputs = [("png", _png(degraded), degraded)]
    else:
        about["inputs"] = list(group.inputs)
        inputs = [(_suffix(path), *_open(job.root, path)) for path in group.inputs]
    places = []
    for part, (suffix, data, pixels) in enumerate(inputs):
        if pixels.shape != clean.shape:
            raise ValueError(_sizes_differ(job.root, group, part, pixels, clean))
        field = "input" if len(inputs) == 1 else f"input{part:02d}"
        places.append(tar.add(f"{key}.{field}.{suffix}", data))
    target = tar.add(f"{key}.target.{_suffix(group.target)}", clean_bytes)
    text = json.dumps(about, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    meta = tar.add(f"{key}.json", text.encode())
    for part, place in enumerate(places or [manifest.NONE]):
        rows.append((place, target, meta, part, height, width, 0, 0))
    return rows


def _open(root: str, path: str) -> tuple[bytes, np.ndarray]:
    full = os.path.join(root, path)
    with open(full, "rb") as file:
        data = file.read()
    try:
        return data, decode(data)
    except DecodeError as error:
        raise ValueError(
            f"{full} is not a whole picture ({error}); replace or remove it, then run the same "
            "command again"
        ) from error


def _sizes_differ(root: str, group: Group, part: int, pixels: np.ndarray, clean: np.ndarray) -> str:
    return (
        f"{os.path.join(root, group.inputs[part])} is {pixels.shape[1]}x{pixels.shape[0]}, but "
        "its clean picture "
        f"{group.target} is {clean.shape[1]}x{clean.shape[0]}; replace or remove the pair, then "
        "run the same "
        "command again"
    )


def _synthesise(job: Job, group: Group, clean: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    rng = degrade.generator(job.seed, "+".join(job.chain), group.target)
    depth = None
    if group.map and "dehaze" in job.chain:
        depth = read_map(os.path.join(job.root, group.map))
        if depth.shape != clean.shape[:2]:
            raise ValueError(
                f"{os.path.join(job.root, group.map)} is {depth.shape[1]}x{depth.shape[0]}, but "
                "its picture is "
                f"{clean.shape[1]}x{clean.shape[0]}; replace or remove the map"
            )
    return degrade.synthesise(clean, job.chain, rng, depth)


def read_map(path: str) -> np.ndarray:
    """Relative depth (H, W) in [0, 1] from a `.npy` or 16-bit `.png` whose name says depth or
    disparity."""
    values = (
        np.load(path, allow_pickle=False) if path.endswith(".npy") else np.asarray(Image.open(path))
    )
    if values.ndim != 2:
        raise ValueError(f"{path} has the shape {values.shape}, but a map has two dimensions")
    kind = path.replace(os.sep, "/")
    disparity = ".disparity." in kind or "/disparity/" in kind
    return degrade.depth_from_map(values, "disparity" if disparity else "depth")


def _suffix(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _split(
    root: str, groups: list[Group], limit: int, chain: tuple[str, ...]
) -> Iterator[tuple[int, tuple[Group, ...]]]:
    """Cuts the groups into shards of about `limit` bytes, judged by the source files."""
    first, size = 0, 0
    for number, group in enumerate(groups):
        files = (group.target, *group.inputs)
        weight = sum(os.path.getsize(os.path.join(root, path)) for path in files)
        weight *= 3 if chain else 1
        if size and size + weight > limit:
            yield first, tuple(groups[first:number])
            first, size = number, 0
        size += weight
    yield first, tuple(groups[first:])


def find(layout: str, root: str, task: str | None = None) -> Found:
    """What a layout finds in a folder; ValueError where the folder or the layout is wrong."""
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder; give the folder that holds the pictures")
    if layout == "clean":
        return layouts.clean(root)
    if layout == "paired":
        if task is None or task not in TASKS:
            raise ValueError(
                f"--task is {task}, but a paired folder needs one of {', '.join(TASKS)}"
            )
        return layouts.paired(root, task)
    raise ValueError(f"{layout!r} is not a layout; known: clean, paired")


def pack(
    layout: str,
    root: str,
    out: str,
    *,
    task: str | None = None,
    synthesise: Iterable[str] = (),
    seed: int = 0,
    workers: int | None = None,
    shard_mib: float = 256,
    progress: bool = False,
) -> Manifest:
    """Packs a source folder into OUT, beside the tasks that it already holds; the manifest.

    `synthesise`: tasks whose degraded pictures are made from the clean ones (layout `clean`).
    `workers`: processes, None for one per core. ValueError or OSError, each with one line that says
    what to do.
    """
    out = storage.checked(out)
    found = find(layout, root, task)
    chains = {found.task: (), **{name: (name,) for name in synthesise}}
    for name in chains:
        if name not in TASKS or (name == "denoise" and chains[name]):
            raise ValueError(
                f"--synthesise names {name!r}; known: {', '.join(degrade.SYNTHESISED)}"
            )
    if len(chains) > 1 and layout != "clean":
        raise ValueError("--synthesise needs clean pictures: use the layout clean")
    with _only_one(out):
        before = _before(out, list(chains))
        jobs = [
            Job(f"{name}-{number:06d}.tar", name, root, out, groups, first, chain, seed, 0)
            for name, chain in chains.items()
            for number, (first, groups) in enumerate(
                _split(root, found.groups, int(shard_mib * 2**20), chain)
            )
        ]
        rows = _run(jobs, workers, progress)
        result = before
        for name, chain in chains.items():
            shards = [row for row in rows if row.task == name]
            entry = TaskEntry(
                samples=sum(row.samples for row in shards),
                layout=layout,
                options={"shard_mib": shard_mib, **({"seed": seed} if chain else {})},
            )
            result = result.with_task(name, entry, shards)
        manifest.write(result, out)
        _clean_up(out)
    return result


def _before(out: str, tasks: list[str]) -> Manifest:
    """The manifest that OUT holds, or an empty one; refuses folders with other things, and tasks
    that are there."""
    there = [name for name in storage.names(out) if not name.startswith(".")]
    if manifest.NAME not in there:
        strange = [name for name in there if not name.endswith((".tar", ".idx"))]
        unfinished = any(not name.endswith(".lock") for name in storage.names(f"{out}/{WORK}"))
        if strange or (there and not unfinished):
            raise ValueError(
                f"{out} is not empty and holds no {manifest.NAME} (but {(strange or there)[0]}); "
                "give another "
                "folder, or empty it"
            )
        return Manifest(tasks={}, shards=(), uri=out)
    before = manifest.read(out)
    again = [name for name in tasks if name in before.tasks]
    if again:
        raise ValueError(
            f"{out} already holds {', '.join(again)}; give another folder, or remove this one to "
            "pack anew"
        )
    return before


@contextlib.contextmanager
def _only_one(out: str) -> Iterator[None]:
    """Refuses a second packing into the same local folder at the same time."""
    if storage.is_remote(out):
        yield
        return
    os.makedirs(f"{out}/{WORK}", exist_ok=True)
    try:
        with FileLock(f"{out}/{WORK}/running.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another packing into {out} is running; wait for its end") from error


def _clean_up(out: str) -> None:
    for name in storage.names(f"{out}/{WORK}"):
        if not name.endswith(".lock"):
            storage.remove(f"{out}/{WORK}/{name}")


def _finished(job: Job) -> Shard | None:
    """The row of a shard that an earlier run wrote from the same files, else None."""
    try:
        raw = json.loads(storage.read(f"{job.out}/{WORK}/{job.name}.json"))
        row = Shard(**raw["row"])
        whole = raw["job"] == job.digest() and storage.exists(f"{job.out}/{job.name}")
        return row if whole and storage.exists(f"{job.out}/{row.index_name}") else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _run(jobs: list[Job], workers: int | None, progress: bool) -> list[Shard]:
    """The rows of all shards in the order of the jobs; writes those that are not there yet."""
    rows = {job.name: row for job in jobs if (row := _finished(job)) is not None}
    left = [job for job in jobs if job.name not in rows]
    total = sum(len(job.groups) for job in jobs)
    done = sum(len(job.groups) for job in jobs if job.name in rows)
    workers = min(workers or os.cpu_count() or 1, max(len(left), 1))
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    with _bar(total, done, progress) as show:
        if workers == 1:
            _set_counter(counter)
            for job in left:
                rows[job.name] = write_shard(job)
                show(done + counter.value)
        else:
            rows |= _run_processes(left, workers, counter, lambda: show(done + counter.value))
    return [rows[job.name] for job in jobs]


def _run_processes(
    jobs: list[Job], workers: int, counter: Any, show: Callable[[], None]
) -> dict[str, Shard]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_counter, (counter,)) as pool:
        futures: list[Future[Shard]] = [pool.submit(write_shard, job) for job in jobs]
        waiting = set(futures)
        try:
            while waiting:
                with contextlib.suppress(TimeoutError):
                    for future in as_completed(waiting, timeout=0.2):
                        future.result()
                        waiting.discard(future)
                        break
                show()
        except BrokenProcessPool as error:
            raise OSError(
                "a packing process was killed (out of memory?); run the same command again, with "
                "fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return {job.name: future.result() for job, future in zip(jobs, futures, strict=True)}


@contextlib.contextmanager
def _bar(total: int, done: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} pictures/s"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, disable=not wanted) as bar:
        task = bar.add_task("packing", total=total, completed=done, rate="?")

        def show(now: int) -> None:
            rate = (now - done) / max(time.monotonic() - start, 1e-3)
            bar.update(task, completed=now, rate=f"{rate:.1f}")

        yield show


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m shards.pack", description=__doc__)
    parser.add_argument("layout", help="clean | paired")
    parser.add_argument("root", help="folder of the source pictures")
    parser.add_argument("out", help="folder or store for the shards")
    parser.add_argument("--task", help="task of a paired folder: " + ", ".join(TASKS))
    parser.add_argument(
        "--synthesise", nargs="+", default=[], metavar="TASK", help="make these from clean pictures"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is synthesised")
    parser.add_argument("--workers", type=int, help="processes; default one per core")
    parser.add_argument(
        "--shard-mib", type=float, default=256, help="size of a shard, about, in MiB"
    )
    options = vars(parser.parse_args(argv))
    try:
        result = pack(progress=sys.stderr.isatty(), **options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 2
    size = sum(shard.bytes for shard in result.shards)
    counts = ", ".join(f"{task} {count}" for task, count in result.counts.items())
    print(f"{result.uri}: {counts} samples in {len(result.shards)} shards, {_megabytes(size)}")
    print(f"look at them: python -m shards.inspect {result.uri}")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 or math.isinf(size) else f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
