"""Runs work on shards: in this process, in several processes, or on a Ray cluster."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from shards import interrupt
from shards.table import Shard
from shards.writer import Job, finished, write_shard

T = TypeVar("T")
R = TypeVar("R")


def map_in_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """`[function(item) for item in items]`, computed in `workers` processes where there are two or
    more."""
    if workers <= 1:
        return [function(item) for item in items]
    with _process_pool(workers) as pool:
        with interrupt.blocked():
            futures = [pool.submit(function, item) for item in items]
        return [future.result() for future in futures]


@contextlib.contextmanager
def _process_pool(workers: int, *shared: Any) -> Iterator[ProcessPoolExecutor]:
    """New processes; `shared` objects are handed to `_start_worker`. Ctrl-C does not disturb the
    end.

    Ctrl-C in a terminal reaches the workers too, but only this process must react to it. So whoever
    submits work does it inside `interrupt.blocked()`: the pool starts its processes then.
    """
    context = multiprocessing.get_context("spawn")
    initializer = _start_worker if shared else None
    pool = ProcessPoolExecutor(workers, context, initializer, shared)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OSError(
            "a process was killed (out of memory?); run the same command again with fewer --workers"
        ) from error
    finally:
        with interrupt.ignored():
            pool.shutdown(wait=True, cancel_futures=True)


def run_jobs(jobs: list[Job], workers: int | None, ray: bool, progress: bool) -> list[Shard]:
    """Writes the shards that are not there yet; the rows of all shards, in the order of the jobs.

    Args:
        jobs: the shards.
        workers: processes; None for one per core.
        ray: use the Ray cluster of RAY_ADDRESS instead of processes.
        progress: show a bar.
    """
    rows = {job.name: row for job in jobs if (row := finished(job)) is not None}
    left = [job for job in jobs if job.name not in rows]
    total = sum(len(job.groups) for job in jobs)
    done = sum(len(job.groups) for job in jobs if job.name in rows)
    workers = min(workers or os.cpu_count() or 1, max(len(left), 1))
    with progress_bar(total, done, progress, "packing", "pictures") as show:
        if ray:
            rows |= _run_on_ray(left, show)
        else:
            rows |= {row.name: row for row in run(write_shard, left, workers, show)}
    return [rows[job.name] for job in jobs]


def run(
    function: Callable[[T, Callable[[int], None]], R],
    items: Sequence[T],
    workers: int,
    show: Callable[[int], None],
) -> list[R]:
    """`[function(item, advance) for item in items]`, in `workers` processes where there are two or
    more.

    The function calls `advance(amount)` for each bit of work done; `show` gets the sum over all
    items so far.
    """
    if workers > 1:
        return _run_in_processes(function, items, workers, show)
    count = 0

    def advance(amount: int) -> None:
        nonlocal count
        interrupt.check()
        count += amount
        show(count)

    return [function(item, advance) for item in items]


class _Stopped(BaseException):
    """The parent process asked the workers to stop. No Exception, so that nothing retries it."""


_count: Any = None
_stop: Any = None


def _start_worker(count: Any, stop: Any) -> None:
    """In a new worker: the count of work done, and the event that asks to stop."""
    global _count, _stop
    _count, _stop = count, stop


def _advance(amount: int) -> None:
    with _count.get_lock():
        _count.value += amount
    if _stop.is_set():
        raise _Stopped


def _run_in_processes(
    function: Callable[[T, Callable[[int], None]], R],
    items: Sequence[T],
    workers: int,
    show: Callable[[int], None],
) -> list[R]:
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    with _process_pool(workers, count, stop) as pool:
        try:
            with interrupt.blocked():
                futures = [pool.submit(function, item, _advance) for item in items]
            ended: SimpleQueue[Future[R]] = SimpleQueue()
            for future in futures:
                future.add_done_callback(ended.put)
            left = len(futures)
            while left:
                with contextlib.suppress(Empty):
                    ended.get(timeout=0.2).result()
                    left -= 1
                interrupt.check()
                show(count.value)
        except BaseException:
            # Each worker finishes its bit of work and removes its temporary file.
            with interrupt.ignored():
                stop.set()
            raise
    return [future.result() for future in futures]


def _run_on_ray(jobs: list[Job], show: Callable[[int], None]) -> dict[str, Shard]:
    """One Ray task per shard; each needs the source folder and the destination on its node."""
    with _ray_cluster() as ray:
        remote = ray.remote(num_cpus=1, max_retries=2)(write_shard)
        running = {remote.remote(job): job for job in jobs}
        rows: dict[str, Shard] = {}
        count, waiting = 0, list(running)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1)
            for reference in ready:
                job = running[reference]
                try:
                    rows[job.name] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause or error) from None
                count += len(job.groups)
            show(count)
        return rows


@contextlib.contextmanager
def _ray_cluster() -> Iterator[Any]:
    """Ray, connected to the cluster that this process uses already, or to that of RAY_ADDRESS."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            "--ray needs a cluster: set RAY_ADDRESS (auto for one that was started on this "
            "machine), or use --workers to pack with the cores of this machine"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(log_to_driver=False, logging_level="error")
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def progress_bar(
    total: int, done: int, wanted: bool, verb: str, unit: str
) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how much was done in addition to `done`."""
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, disable=not wanted) as bar:
        task = bar.add_task(verb, total=total, completed=done, rate="?")

        def show(more: int) -> None:
            rate = more / max(time.monotonic() - start, 1e-3)
            bar.update(task, completed=done + more, rate=f"{rate:.1f}")

        yield show
