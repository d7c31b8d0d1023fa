"""Break real runs at random moments and check that their results are those of an uninterrupted run.

    python -m tests.chaos --trials 20 --seed 0 [--json]

Every trial trains the same small run on two workers and kills what the trial's point names, once or
twice, with SIGKILL at a moment drawn from the seed. A hung worker is stopped with SIGSTOP instead,
and in a hung collective one worker never comes out of an all-reduce (`tests.hanging`). Where the
command itself was killed it is given again. The end is compared with an undisturbed run: weights,
their average, Adam's moments and the digest of all pixels trained on must be identical to the bit.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

from distributed import checkpoint as checkpoints
from distributed.cluster import LOCAL_ENVIRONMENT
from distributed.run_log import CONSUMED
from tests.hanging import FLAG
from tests.photographs import pack_photographs

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
BATCH = 4
LIMIT_S = 300.0
"""Seconds after which a trial counts as hung."""


@dataclass
class Trial:
    """One run that is broken once."""

    number: int
    point: str
    folder: Path
    at: list[int]
    """Steps at which it is killed."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each kill to the next training step."""
    problem: str = ""
    """What differs from the undisturbed run; empty where nothing does."""


def python_path() -> str:
    """The project's own folder, and behind it what is there, as packages that lie elsewhere."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(ROOT), *(path for path in known if path and path != str(ROOT))])


class Run:
    """A training command, started in a folder."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        environment: dict[str, str],
        *more: str,
        module: str = "distributed.train",
    ) -> None:
        """Start it; `more` arguments of the command."""
        arguments = [
            *(sys.executable, "-m", module, "demo"),
            *("--data.train", str(data / "train"), "--data.validation", str(data / "test")),
            *("--data.crop", "32", "--data.later-crops", "", "--model.dim", "8"),
            *("--scaling.workers", "2"),
            *("--scaling.cpus-per-worker", "1", "--scaling.max-failures", "-1"),
            *("--scaling.health-timeout-s", "10"),  # here nobody is so busy for so long
            *("--recipe.samples", str(STEPS * BATCH), "--recipe.global-batch", str(BATCH)),
            *("--recipe.micro-batch", "2", "--recipe.warmup-samples", "8"),
            *("--every.log", str(BATCH), "--every.checkpoint", str(5 * BATCH)),
            *("--every.validate", "0", "--every.validation-pictures", "1"),
            *more,
        ]
        self.folder = folder / "runs" / "demo"
        self.hang = folder / "hang"
        self.log = (folder / "log.txt").open("a")
        environment = {**environment, FLAG: str(self.hang), "PYTHONPATH": python_path()}
        self.process = psutil.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def consumed(self) -> list[dict[str, Any]]:
        """The log of consumed samples so far."""
        path = self.folder / CONSUMED
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self) -> int:
        """Steps made, of the last attempt."""
        lines = self.consumed()
        return lines[-1]["samples"] // BATCH if lines else 0

    def half_written(self) -> list[str] | None:
        """Files of a checkpoint that has no marker yet."""
        for folder in self.folder.glob("checkpoints/*"):
            with contextlib.suppress(FileNotFoundError):
                files = os.listdir(folder)
                if checkpoints.MARKER not in files:
                    return files
        return None

    def wait_for(self, ready: Callable[[], bool], pause: float = 0.02) -> bool:
        """Wait for a condition; False if the run ends first."""
        deadline = time.monotonic() + LIMIT_S
        while not ready():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder}: nothing for {LIMIT_S:.0f} s")
            time.sleep(pause)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Wait for this many steps; False if the run ends first."""
        return self.wait_for(lambda: self.step() >= step)

    def wait_for_lines(self, count: int) -> bool:
        """Wait until the log of consumed samples has this many lines."""
        return self.wait_for(lambda: len(self.consumed()) >= count)

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return int(self.process.wait(LIMIT_S))


NODE_HEALTH = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
"""When a head takes a node for lost, as in deploy/node/head.sh."""


class Cluster:
    """A Ray cluster of a head without CPUs and some nodes, on this machine."""

    def __init__(self, nodes: int = 2, cpus: int = 2) -> None:
        """Start it, with as many CPUs on each node."""
        self._cpus = cpus
        from ray.cluster_utils import Cluster as LocalCluster

        # Workers use this project's code, also where another copy of it is installed.
        os.environ.update(NODE_HEALTH | LOCAL_ENVIRONMENT | {"PYTHONPATH": python_path()})
        self._cluster = LocalCluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self.resize(nodes)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a command uses this cluster."""
        return {"RAY_ADDRESS": self._cluster.address, "RAY_AUTH_MODE": "disabled"}

    def processes(self) -> list[psutil.Process]:
        """All processes of all nodes."""
        own = psutil.Process().children(recursive=True)
        return [p for p in own if _is_ray(p)]

    def add_node(self) -> None:
        """Start a node that replaces a lost one."""
        self._cluster.add_node(num_cpus=self._cpus, object_store_memory=80 * 2**20)

    def resize(self, nodes: int) -> None:
        """Change the number of nodes beside the head: new ones join, or some die."""
        there = list(self._cluster.worker_nodes)
        for _ in range(len(there), nodes):
            self.add_node()
        for node in there[nodes:]:
            self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all of it."""
        _kill(self.processes())
        with contextlib.suppress(Exception):  # its own bookkeeping does not know who is dead
            self._cluster.shutdown()


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _is_ray(process: psutil.Process) -> bool:
    line = _command_line(process)
    return any(word in line for word in ("raylet", "gcs_server", "ray::", "site-packages/ray/"))


def _workers(root: Sequence[psutil.Process]) -> list[psutil.Process]:
    found = {
        child.pid: child
        for parent in root
        for child in parent.children(recursive=True)
        if "RayTrainWorker" in _command_line(child)
    }
    return [found[pid] for pid in sorted(found)]


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def worker(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """One worker dies."""
    _kill([draw.choice(_workers([run.process]))])


def hung_worker(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """One worker is stopped, but its process stays."""
    draw.choice(_workers([run.process])).suspend()


def collective(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """One worker hangs in a collective, and the other one waits for it."""
    run.hang.touch()
    run.wait_for(lambda: not run.hang.exists())


def all_workers(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """All workers die at once."""
    _kill(_workers([run.process]))


def driver(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """The command and all processes of its Ray die."""
    _kill([run.process, *run.process.children(recursive=True)])


def checkpoint_write(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """All workers die while the first file of a checkpoint is written."""
    workers = _workers([run.process])
    run.wait_for(lambda: run.half_written() is not None, pause=0.0)
    _kill(workers)


def checkpoint_upload(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """All workers die when files of a checkpoint are in the storage, and its marker is not."""
    workers = _workers([run.process])
    run.wait_for(lambda: len(run.half_written() or ()) >= 2, pause=0.0)
    _kill(workers)


def node(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """The raylet of a node with workers dies, and so the node; another node is left."""
    assert cluster is not None
    raylets = [p for p in cluster.processes() if _command_line(p).split()[0].endswith("raylet")]
    _kill([draw.choice([raylet for raylet in raylets if _workers([raylet])])])
    cluster.add_node()


def head(run: Run, cluster: Cluster | None, draw: random.Random) -> None:
    """The head, all nodes and the command die; a new cluster comes up."""
    assert cluster is not None
    _kill([run.process, *cluster.processes()])


POINTS: dict[str, Callable[[Run, Cluster | None, random.Random], None]] = {
    "worker": worker,
    "hung worker": hung_worker,
    "collective": collective,
    "all workers": all_workers,
    "driver": driver,
    "checkpoint write": checkpoint_write,
    "checkpoint upload": checkpoint_upload,
    "node": node,
    "head": head,
}
NEEDS_CLUSTER = ("node", "head")


@contextlib.contextmanager
def _cluster_for(point: str) -> Iterator[list[Cluster]]:
    clusters = [Cluster()] if point in NEEDS_CLUSTER else []
    try:
        yield clusters
    finally:
        for cluster in clusters:
            cluster.close()


def disturb(trial: Trial, data: Path, draw: random.Random) -> None:
    """Run a trial to its end."""
    trial.folder.mkdir(parents=True)
    module = "tests.hanging" if trial.point == "collective" else "distributed.train"
    with _cluster_for(trial.point) as clusters:
        environment = clusters[-1].environment if clusters else {}
        run = Run(trial.folder, data, environment, module=module)
        for at in trial.at:
            if not run.wait_for_step(at):
                break
            POINTS[trial.point](run, clusters[-1] if clusters else None, draw)
            killed, known = time.time(), len(run.consumed())
            if not run.process.is_running() or run.process.status() == psutil.STATUS_ZOMBIE:
                if trial.point == "head":
                    clusters.append(Cluster())
                run = Run(trial.folder, data, clusters[-1].environment if clusters else {})
            if run.wait_for_lines(known + 1):
                trial.recoveries.append(run.consumed()[known]["time"] - killed)
        code = run.end()
        if code != 0:
            trial.problem = f"exit code {code}, see {trial.folder / 'log.txt'}"


def final_state(folder: Path) -> dict[str, Any]:
    """Everything that must be identical, of the run that was started in a folder."""
    return state_of(str(folder / "runs" / "demo"))


def state_of(run: str) -> dict[str, Any]:
    """The same of the run in a folder or URI."""
    newest = checkpoints.newest_complete(run)
    if newest is None:
        return {}
    state = newest.state()
    counts = {"samples": state.samples, "updates": state.updates, "consumed": state.consumed}
    return counts | {kind: newest.tensors(kind) for kind in ("weights", "ema", "optimizer")}


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first difference between two final states; empty if there is none."""
    if expected.keys() != found.keys():
        return "there is no final checkpoint"
    for kind, value in expected.items():
        other = found[kind]
        if not isinstance(value, dict):
            if value != other:
                return f"{kind}: {other} instead of {value}"
            continue
        for name in value.keys() | other.keys():
            if name not in value or name not in other or not torch.equal(value[name], other[name]):
                return f"{kind}: {name} differs"
    return ""


@dataclass(frozen=True)
class Arguments:
    """Break real runs at random moments and compare their results with an uninterrupted run."""

    trials: int = 20
    """Runs to disturb; the points take turns."""
    seed: int = 0
    """Draws the moments."""
    points: tuple[str, ...] = tuple(POINTS)
    """What to kill."""
    json: bool = False
    """Print a JSON summary instead of a table."""
    keep: bool = False
    """Keep the runs' folders."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials; returns 0 if all results are identical."""
    given = tyro.cli(Arguments, args=argv, prog="python -m tests.chaos")
    unknown = [point for point in given.points if point not in POINTS]
    if unknown:
        print(f"error: unknown point {unknown[0]!r}; known: {', '.join(POINTS)}", file=sys.stderr)
        return 2
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of the clusters started here
    console = Console(stderr=given.json)
    base = Path(tempfile.mkdtemp(prefix="measnet-chaos-"))
    draw = random.Random(given.seed)
    data = pack_photographs(base / "data")
    console.print(f"undisturbed run in {base}")
    (base / "undisturbed").mkdir()
    if Run(base / "undisturbed", data, {}).end() != 0:
        console.print((base / "undisturbed" / "log.txt").read_text())
        return 1
    expected = final_state(base / "undisturbed")
    trials = []
    for number in range(given.trials):
        point = given.points[number % len(given.points)]
        kills = draw.choice((1, 1, 2)) if point not in NEEDS_CLUSTER else 1
        at = sorted(draw.sample(range(1, STEPS - 6), kills))
        trial = Trial(number, point, base / f"trial-{number}", at)
        try:
            disturb(trial, data, draw)
            trial.problem = trial.problem or difference(expected, final_state(trial.folder))
        except (TimeoutError, psutil.Error, IndexError) as error:
            trial.problem = f"{type(error).__name__}: {error}"
        trials.append(trial)
        took = ", ".join(f"{s:.1f} s" for s in trial.recoveries)
        console.print(
            f"{number + 1}/{given.trials} {point} at steps {at}: recovered in {took or '-'}, "
            f"{trial.problem or 'identical'}",
            highlight=False,
        )
    if given.json:
        print(json.dumps(summary(trials)))
    else:
        console.print(_table(trials))
    if given.keep or any(t.problem for t in trials):
        console.print(f"the runs are kept in {base}")
    else:
        shutil.rmtree(base)
    return 0 if all(not t.problem for t in trials) else 1


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Counts and median recovery, in all and per point."""

    def counts(own: Sequence[Trial]) -> dict[str, Any]:
        recoveries = [s for t in own for s in t.recoveries]
        return {
            "trials": len(own),
            "identical": sum(not t.problem for t in own),
            "recovery_s_median": round(statistics.median(recoveries), 2) if recoveries else None,
        }

    points = {p: counts([t for t in trials if t.point == p]) for p in {t.point for t in trials}}
    return {**counts(trials), "points": points}


def _table(trials: Sequence[Trial]) -> Table:
    result = summary(trials)
    table = Table("point", "trials", "identical", "median recovery")
    for point, row in [*result["points"].items(), ("all", result)]:
        took = row["recovery_s_median"]
        table.add_row(
            point, str(row["trials"]), str(row["identical"]), "-" if took is None else f"{took} s"
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
