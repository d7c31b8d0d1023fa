"""Source folders -> shards: `python -m shards.pack LAYOUT ROOT OUT`.

A shard is one unit of work, done by one process: it is written aside and renamed when whole, and a
row about it is left in `OUT/.packing`. Killed and run again, the packing goes on with the shards
that are not there yet, and gives the same bytes as an undisturbed run. The manifest comes last:
without it nothing takes OUT for shards.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from shards import degrade, layouts, manifest, storage
from shards.layouts import LAYOUTS, Found, Group
from shards.manifest import Manifest, Shard, TaskEntry
from shards.tasks import TASKS
from shards.writer import WORK, Job, set_counter, write_shard


@dataclass(frozen=True, kw_only=True)
class Options:
    """What changes the bytes of the shards; written to the manifest."""

    seed: int = 0
    """Of what is synthesised."""
    shard_mib: float = 256
    """Size of a shard, about, judged by the source files."""
    tiles: int = 0
    """Side of the lossless tiles (QOI) that PNG and other lossless pictures are cut into; 0 keeps
    them whole, with their original bytes.
    """

    def __post_init__(self) -> None:
        """Refuse sizes out of range."""
        if self.shard_mib <= 0:
            raise ValueError(f"--shard-mib is {self.shard_mib}, but must be above 0")
        if self.tiles and not 16 <= self.tiles <= 4096:
            raise ValueError(f"--tiles is {self.tiles}, but must be 0, or 16 to 4096")


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


def pack(
    layout: str,
    root: str,
    out: str,
    *,
    task: str | None = None,
    synthesise: Iterable[str] = (),
    seed: int = 0,
    shard_mib: float = 256,
    tiles: int = 0,
    allow_missing: bool = False,
    repair: bool = False,
    workers: int | None = None,
    ray: bool = False,
    progress: bool = False,
) -> Manifest:
    """Packs a source folder into OUT, beside the tasks that it already holds; the manifest.

    Args:
        layout: one of `LAYOUTS`.
        root: the source folder.
        out: folder or store for the shards.
        task: of a `paired` folder.
        synthesise: tasks whose degraded pictures are made from clean ones; `dehaze+lowlight`
            makes a chain of two or three, which is packed as the task `mixed`.
        seed: of what is synthesised.
        shard_mib: size of a shard, about, in MiB.
        tiles: side of the lossless tiles that lossless pictures are cut into; 0 keeps their bytes.
        allow_missing: goes on where the benchmark is not whole, and writes so in the manifest.
        repair: makes shards anew that are missing or damaged, with the options of the manifest.
        workers: processes; None for one per core.
        ray: spreads the shards over a Ray cluster (RAY_ADDRESS, or this machine); ROOT and
            OUT must be reachable from each of its nodes.
        progress: shows a bar.

    Raises:
        ValueError, OSError: with one line that says what to do.
    """
    out = storage.checked(out)
    options = Options(seed=seed, shard_mib=shard_mib, tiles=tiles)
    layouts.check_name(layout)
    chains = {} if repair else _chains(layout, task, synthesise)
    found = layouts.find(layout, root)
    with _only_one(out):
        if repair:
            return _repair(layout, task, root, out, found, workers, ray, progress)
        before = _before(out, list(chains))
        _check_whole(layout, found, out, next(iter(chains)), allow_missing)
        jobs = [
            job
            for name, chain in chains.items()
            for job in _jobs(name, chain, root, out, found, options)
        ]
        rows = _run(jobs, workers, ray, progress)
        result = before
        for name, chain in chains.items():
            shards = [row for row in rows if row.task == name]
            result = result.with_task(name, _entry(layout, chain, found, options, shards), shards)
        storage.remove_unfinished(out)
        manifest.write(result, out)
        _clean_up(out, result)
    return result


def _jobs(
    task: str, chain: tuple[str, ...], root: str, out: str, found: Found, options: Options
) -> list[Job]:
    split = _split(root, found.groups, int(options.shard_mib * 2**20), chain)
    return [
        Job(
            name=f"{task}-{number:06d}.tar",
            task=task,
            root=root,
            out=out,
            groups=groups,
            first=first,
            chain=chain,
            seed=options.seed,
            tiles=options.tiles,
        )
        for number, (first, groups) in enumerate(split)
    ]


def _entry(
    layout: str, chain: tuple[str, ...], found: Found, options: Options, shards: list[Shard]
) -> TaskEntry:
    told: dict[str, Any] = {"shard_mib": options.shard_mib, "tiles": options.tiles}
    if chain:
        told |= {"seed": options.seed, "chain": list(chain)}
    return TaskEntry(
        samples=sum(row.samples for row in shards),
        layout=layout,
        expected=LAYOUTS[layout].expected,
        options=told,
        missing=list(found.missing),
        leaks=list(found.leaks),
    )


def _chains(layout: str, task: str | None, synthesise: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Task -> degradations to synthesise for it, () where the pictures are files."""
    own = LAYOUTS[layout].task
    if own is None and task not in TASKS:
        raise ValueError(f"--task is {task}, but {layout} needs one of {', '.join(TASKS)}")
    if own is not None and task not in (None, own):
        raise ValueError(f"--task is {task}, but {layout} is always {own}; leave it away")
    chains: dict[str, tuple[str, ...]] = {own or str(task): ()}
    for wish in synthesise:
        chain = tuple(wish.split("+"))
        name = chain[0] if len(chain) == 1 else "mixed"
        unknown = [link for link in chain if link not in degrade.SYNTHESISED]
        if unknown or len(chain) > 3 or chain == ("denoise",):
            raise ValueError(
                f"--synthesise names {wish!r}; known: {', '.join(degrade.SYNTHESISED)}, and "
                "chains of two or "
                "three as dehaze+lowlight (noise alone is added while loading)"
            )
        if name in chains:
            raise ValueError(
                f"--synthesise gives {name} twice; pack one of them into another folder"
            )
        chains[name] = chain
    if len(chains) > 1 and own != "denoise":
        raise ValueError(
            f"--synthesise needs clean pictures, but {layout} holds pairs; use `clean`"
        )
    return chains


def _check_whole(layout: str, found: Found, out: str, task: str, allow_missing: bool) -> None:
    line = layouts.shortfall(layout, found)
    if line is None:
        return
    if allow_missing:
        print(f"warning: {line} (full list in {out}/{manifest.NAME})", file=sys.stderr)
        return
    if found.missing:
        line += f" (full list in {_write_list(found, out, task)})"
    raise ValueError(f"{line}; add them, or go on without them by --allow-missing")


def _write_list(found: Found, out: str, task: str) -> str:
    text = "\n".join(found.missing) + "\n"
    if storage.is_remote(out):
        with tempfile.NamedTemporaryFile("w", delete=False, suffix=f"-missing-{task}.txt") as file:
            file.write(text)
        return file.name
    path = f"{out}/{WORK}/missing-{task}.txt"
    storage.write(path, text.encode())
    return path


def _repair(
    layout: str,
    task: str | None,
    root: str,
    out: str,
    found: Found,
    workers: int | None,
    ray: bool,
    progress: bool,
) -> Manifest:
    """Makes the damaged shards of a layout's tasks anew; ValueError where the pictures are not the
    same."""
    made = manifest.read(out)
    jobs = []
    for name, entry in made.tasks.items():
        if entry.layout == layout and task in (None, name):
            told = dict(entry.options)
            chain = tuple(told.pop("chain", ()))
            jobs += _jobs(name, chain, root, out, found, Options(**told))
    if not jobs:
        held = ", ".join(f"{name} from {entry.layout}" for name, entry in made.tasks.items())
        raise ValueError(f"{out} holds nothing of {layout}; it holds {held}")
    wanted = {shard.name: shard for shard in made.shards}
    jobs = [job for job in jobs if job.name not in wanted or not _is_whole(out, wanted[job.name])]
    rows = _run(jobs, workers, ray, progress) if jobs else []
    for row in rows:
        if row != wanted.get(row.name):
            storage.remove(f"{out}/{row.name}")
            raise ValueError(
                f"{root} is not what {row.name} was packed from; find the old pictures, or pack "
                "anew into "
                "another folder"
            )
    _clean_up(out, made)
    print(f"{len(rows)} of {len(made.shards)} shards made anew", file=sys.stderr)
    return made


def _is_whole(out: str, shard: Shard) -> bool:
    wanted = {shard.name: shard.sha256, shard.index_name: shard.index_sha256}
    try:
        return all(storage.size_and_sha256(f"{out}/{n}")[1] == sha for n, sha in wanted.items())
    except FileNotFoundError:
        return False


def _before(out: str, tasks: list[str]) -> Manifest:
    """The manifest that OUT holds, or an empty one; refuses other things and tasks it holds."""
    there = [name for name in storage.names(out) if not name.startswith(".")]
    if manifest.NAME not in there:
        strange = [name for name in there if not name.endswith((".tar", ".idx"))]
        unfinished = any(name.endswith(".json") for name in storage.names(f"{out}/{WORK}"))
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
            "pack anew (damaged "
            "shards are made anew by --repair)"
        )
    return before


@contextlib.contextmanager
def _only_one(out: str) -> Iterator[None]:
    """Refuses a second packing into the same local folder at the same time."""
    if storage.is_remote(out):
        yield
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file; give a folder for the shards")
    os.makedirs(f"{out}/{WORK}", exist_ok=True)
    try:
        with FileLock(f"{out}/{WORK}/running.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another packing into {out} is running; wait for its end") from error
    finally:
        # Where nothing was written, nothing stays.
        if storage.names(f"{out}/{WORK}") in ([], ["running.lock"]):
            shutil.rmtree(f"{out}/{WORK}", ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(out)


def _clean_up(out: str, made: Manifest) -> None:
    """Removes the rows, and shards that an earlier unfinished run with other options has left."""
    wanted = {shard.name for shard in made.shards}
    for name in storage.names(f"{out}/{WORK}"):
        shard = name.removesuffix(".json")
        if shard.endswith(".tar") and shard not in wanted:
            storage.remove(f"{out}/{shard}")
            storage.remove(f"{out}/{shard.removesuffix('.tar')}.idx")
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


def _run(jobs: list[Job], workers: int | None, ray: bool, progress: bool) -> list[Shard]:
    """The rows of all shards in the order of the jobs; writes those that are not there yet."""
    rows = {job.name: row for job in jobs if (row := _finished(job)) is not None}
    left = [job for job in jobs if job.name not in rows]
    total = sum(len(job.groups) for job in jobs)
    done = sum(len(job.groups) for job in jobs if job.name in rows)
    workers = min(workers or os.cpu_count() or 1, max(len(left), 1))
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    with _bar(total, done, progress) as show:
        if ray:
            rows |= _run_ray(left, lambda count: show(done + count))
        elif workers == 1:
            set_counter(counter)
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
    with ProcessPoolExecutor(workers, context, _begin, (counter,)) as pool:
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


def _begin(counter: Any) -> None:
    """In a new packing process: Ctrl-C belongs to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_counter(counter)


def _run_ray(jobs: list[Job], show: Callable[[int], None]) -> dict[str, Shard]:
    """One Ray task per shard; each needs the source folder and the destination on its node."""
    with _ray_cluster() as ray:
        remote = ray.remote(num_cpus=1, max_retries=2)(write_shard)
        names = {remote.remote(job): job for job in jobs}
        rows: dict[str, Shard] = {}
        count, waiting = 0, list(names)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1)
            for reference in ready:
                job = names[reference]
                try:
                    rows[job.name] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause or error) from None
                count += len(job.groups)
            show(count)
        return rows


@contextlib.contextmanager
def _ray_cluster() -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS, or to one of this machine for the time inside.

    The local one listens on 127.0.0.1 only and answers nobody without its token.
    """
    elsewhere = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not elsewhere and "ray" not in sys.modules:  # read once, at its import
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield ray
        return
    if elsewhere:
        ray.init(log_to_driver=False, logging_level="error")
    else:
        from ray._private import services

        # Ray would put the machine's outward address in the place of 127.0.0.1, and listen there.
        services.resolve_ip_for_localhost = lambda host: host
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        yield ray
    finally:
        ray.shutdown()


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
    rows = [
        (name, f"{row.expected:,}" if row.expected else "any", row.shape)
        for name, row in LAYOUTS.items()
    ]
    table = "\n".join(f"  {name:15} {count:>7}  {shape}" for name, count, shape in rows)
    parser = argparse.ArgumentParser(
        prog="python -m shards.pack",
        description=textwrap.dedent(__doc__ or ""),
        epilog=f"layouts, their samples, and how they lie on disk:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("layout", help="one of those below")
    add("root", help="folder of the source pictures")
    add("out", help="folder, or URI of an object store, for the shards")
    add("--task", help=f"task of a paired folder: {', '.join(TASKS)}")
    add(
        "--synthesise", nargs="+", default=[], metavar="TASK", help="make these from clean pictures"
    )
    add("--seed", type=int, default=0, help="of what is synthesised (0)")
    add("--shard-mib", type=float, default=256, help="size of a shard, about, in MiB (256)")
    add(
        "--tiles",
        type=int,
        default=0,
        metavar="SIDE",
        help="cut lossless pictures into tiles (128)",
    )
    add("--allow-missing", action="store_true", help="go on where a benchmark is not whole")
    add("--repair", action="store_true", help="make missing and damaged shards of OUT anew")
    add("--workers", type=int, help="processes (one per core)")
    add("--ray", action="store_true", help="spread the work over a Ray cluster (RAY_ADDRESS)")
    options = vars(parser.parse_args(argv))
    try:
        result = pack(progress=sys.stderr.isatty(), **options)
    except KeyboardInterrupt:
        print("stopped; the same command again goes on from here", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 2
    _tell(result)
    return 0


def _tell(result: Manifest) -> None:
    size = sum(shard.bytes for shard in result.shards)
    counts = ", ".join(f"{task} {count:,}" for task, count in result.counts.items())
    print(f"{result.uri}: {counts} samples in {len(result.shards)} shards, {_bytes(size)}")
    for task, entry in result.tasks.items():
        if entry.leaks:
            more = (
                f" … ({len(entry.leaks)} in all, see the manifest)" if len(entry.leaks) > 2 else ""
            )
            print(f"note: {task}: {'; '.join(entry.leaks[:2])}{more}")
    print(f"look at them: python -m shards.inspect {result.uri}")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
