"""Memory and time that a large manifest costs each process of a node.

Run `python bench/manifest.py [--shards 1000000] [--processes 4] [--json]`; needs 1 GB of disk. It
writes a manifest of so many shards, and opens it in several processes at a time, each of which then
plans the order of samples: first with a manifest of its own for each process, then with the mapped
file that they share. No tar is needed for that.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from shards import manifest
from shards.manifest import Manifest, TaskEntry
from shards.order import Plan
from shards.table import Shard, ShardTable

TASKS = ("denoise", "derain")


@dataclass(frozen=True)
class Arguments:
    """Memory and time that a large manifest costs each process of a node."""

    shards: int = 1_000_000
    """Shards of the manifest."""
    processes: int = 4
    """Processes that read it at the same time."""
    json: bool = False
    """Print one JSON object."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    given = tyro.cli(Arguments, args=argv, prog="python bench/manifest.py", description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        manifest.write(made(given.shards), folder)
        size = Path(folder, manifest.NAME).stat().st_size
        ways = {"own": "", "first, shared": f"{folder}/cache", "shared": f"{folder}/cache"}
        found = {way: together(given.processes, folder, cache) for way, cache in ways.items()}
    if given.json:
        print(json.dumps({"shards": given.shards, "manifest_bytes": size, "ways": found}))
        return 0
    print(f"{given.shards:,} shards, {size / 1e6:.0f} MB, {given.processes} processes at a time")
    for way, figures in found.items():
        text = "{seconds:5.1f} s, {own:6.0f} MB of its own, {with_others:6.0f} MB with others"
        print(f"{way:14s} {text.format(**figures)}")
    return 0


def made(count: int) -> Manifest:
    """A manifest of so many shards of 1,000 samples, half of each task."""
    each = count // len(TASKS)
    shards = (
        Shard(f"{task}-{number:06d}.tar", task, 1000, 100_000_000, *[digest(task, number)] * 2)
        for task in TASKS
        for number in range(each)
    )
    tasks = {task: TaskEntry(samples=1000 * each, layout="paired") for task in TASKS}
    return Manifest(tasks=tasks, shards=ShardTable.of(shards))


def digest(task: str, number: int) -> str:
    """A sha256 for a shard that does not exist."""
    return hashlib.sha256(f"{task}{number}".encode()).hexdigest()


def one(uri: str, cache: str) -> None:
    """Open the manifest and plan, print the seconds and the bytes in use before, and wait."""
    before, start = memory(), time.perf_counter()
    source = manifest.read(uri, cache)
    plan = Plan.from_manifest(source, {"denoise_15": 1, "derain": 1}, 0, "local")
    print(json.dumps({"seconds": time.perf_counter() - start, "own_before": before["own"]}))
    sys.stdout.flush()
    sys.stdin.read()  # until all have been measured
    assert len(source.shards) and plan.epoch_samples  # both are still in use


def memory(pid: int | str = "self") -> dict[str, float]:
    """MB of a process: `own` to it alone and not from a file; from files `with_others`."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return {
        "own": kib["Anonymous"] / 1024,
        "with_others": (kib["Shared_Clean"] + kib["Shared_Dirty"]) / 1024,
    }


def together(processes: int, uri: str, cache: str) -> dict[str, float]:
    """Medians over processes that read at the same time."""
    program = "import sys; from bench.manifest import one; one(*sys.argv[1:])"
    command = [sys.executable, "-c", program, uri, cache]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    told = [json.loads(process.stdout.readline()) for process in started if process.stdout]
    used = [memory(process.pid) for process in started]
    for process in started:
        process.communicate()
    return {
        "seconds": statistics.median(one["seconds"] for one in told),
        "own": statistics.median(
            use["own"] - one["own_before"] for use, one in zip(used, told, strict=True)
        ),
        "with_others": statistics.median(use["with_others"] for use in used),
    }


if __name__ == "__main__":
    sys.exit(main())
