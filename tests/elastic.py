"""Change the number of nodes of a run while it trains, and measure the cost.

    python -m tests.elastic --minutes 10 --every-s 30 --seed 0 [--json]

A run that takes any number of workers from one to `--nodes` trains on a cluster of this machine,
whose nodes are drawn anew again and again: lost ones are killed, others join. It must finish, on
the samples of undisturbed runs in their order, with their curve. Of those there are two, with one
and with two workers: how far rounding alone drives equal runs apart is the measure for the rest.
Goodput is the time of the steps that were kept, as a share of all the time since the first step and
while nodes were redrawn.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from tests.chaos import BATCH, Cluster, Run
from tests.photographs import pack_photographs
from tests.test_train import losses

WINDOW = 250
"""Steps over which the curves are averaged before they are compared."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Change the nodes of a running cluster at random; report goodput and the loss curve."""

    minutes: float = 10.0
    """How long the nodes change; after that the run trains to its end."""
    every_s: float = 30.0
    """Seconds between two draws."""
    nodes: int = 3
    """Most nodes, of one CPU each; at least one is always there."""
    steps: int = 6500
    """Steps of the run."""
    seed: int = 0
    """Draws the nodes."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Goodput:
    """How the time of a run was spent."""

    kept_s: float
    """Seconds of the steps that were kept."""
    all_s: float
    """Seconds from the first step to the last one looked at."""
    starts: int
    """How often the workers were started anew."""
    again: int
    """Steps that were made again after a start."""

    @property
    def share(self) -> float:
        """Share of the time that was spent on kept steps."""
        return self.kept_s / self.all_s


def goodput(lines: Sequence[dict[str, Any]]) -> Goodput:
    """From the log of consumed samples: a step counts where it was made for the last time.

    The first step after a start has no step before it in its process: it counts as long as the
    median of all others.
    """
    durations: dict[int, float] = {}
    starts, usual = 0, []
    for before, line in zip([None, *lines], lines, strict=False):
        follows = before is not None and line["samples"] == before["samples"] + BATCH
        # A start shows as a jump back, or as a pause where nothing had to be made again.
        took = line["time"] - before["time"] if before is not None and follows else None
        if took is not None and (not usual or took < 20 * statistics.median(usual[-200:])):
            usual.append(took)
            durations[line["samples"]] = took
        else:
            starts += before is not None
            durations[line["samples"]] = -1.0
    typical = statistics.median(usual)
    kept = sum(typical if took < 0 else took for took in durations.values())
    first, last = lines[0]["time"], lines[-1]["time"]
    return Goodput(kept, last - first + typical, starts, len(lines) - len(durations))


@dataclass(frozen=True)
class Distance:
    """Distance of two curves: relative differences of their means over `WINDOW` steps."""

    largest: float
    average: float
    """Of the differences with their signs: 0 where neither curve lies above the other."""


def distance(one: Run, other: Run) -> Distance:
    """Between the losses of two runs of equally many steps."""
    means = [
        [statistics.fmean(curve[at : at + WINDOW]) for at in range(0, len(curve), WINDOW)]
        for curve in (list(losses(run.folder).values()) for run in (one, other))
    ]
    shares = [b / a - 1 for a, b in zip(*means, strict=True)]
    return Distance(round(max(map(abs, shares)), 4), round(statistics.fmean(shares), 4))


def redraw(cluster: Cluster, run: Run, given: Arguments, console: Console) -> list[int]:
    """Change the number of nodes at random again and again; returns the numbers."""
    draw, began = random.Random(given.seed), time.monotonic()
    drawn = [given.nodes]
    while time.monotonic() - began < 60 * given.minutes and run.process.poll() is None:
        drawn.append(draw.randint(1, given.nodes))
        console.print(
            f"{time.monotonic() - began:5.0f} s, step {run.step()}: {drawn[-1]} nodes",
            highlight=False,
        )
        cluster.resize(drawn[-1])
        until = time.monotonic() + given.every_s
        while time.monotonic() < until and run.process.poll() is None:
            time.sleep(0.2)
    cluster.resize(given.nodes)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; 0 if the changed run finished on the same samples as the unchanged ones."""
    given = tyro.cli(Arguments, args=argv, prog="python -m tests.elastic")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of the cluster started here
    console = Console(stderr=given.json)
    base = Path(tempfile.mkdtemp(prefix="measnet-elastic-"))
    data = pack_photographs(base / "data")
    options = (
        *("--recipe.samples", str(given.steps * BATCH), "--every.checkpoint", str(20 * BATCH)),
        *("--scaling.workers", f"1..{given.nodes}"),
        *("--recipe.lr", "2e-4"),  # at the demo's rate rounding alone moves the curve
    )
    for name in ("disturbed", "1", "2"):
        (base / name).mkdir()
    cluster = Cluster(nodes=given.nodes, cpus=1)
    try:
        run = Run(base / "disturbed", data, cluster.environment, *options)
        run.wait_for_step(1)
        drawn = redraw(cluster, run, given, console)
        until = time.time()
        code = run.process.wait()
    finally:
        cluster.close()
    if code:
        console.print(f"the disturbed run failed; it is kept in {base}", highlight=False)
        if given.json:
            print(json.dumps({"finished": False}))
        return 1
    undisturbed = []
    for workers in "12":
        console.print(f"the same run undisturbed, workers: {workers}", highlight=False)
        undisturbed.append(Run(base / workers, data, {}, *options, "--scaling.workers", workers))
        undisturbed[-1].process.wait()
    result = goodput([line for line in run.consumed() if line["time"] <= until])
    digests = {each.consumed()[-1]["consumed"] for each in (run, *undisturbed)}
    same = len(digests) == 1
    summary = {
        "finished": True,
        "draws": len(drawn),
        "changes": sum(a != b for a, b in itertools.pairwise(drawn)),
        "starts": result.starts,
        "steps_made_again": result.again,
        "minutes": round(result.all_s / 60, 1),
        "goodput": round(result.share, 3),
        "same_samples": same,
        "curve_apart": [dataclasses.asdict(distance(each, run)) for each in undisturbed],
        "undisturbed_apart": dataclasses.asdict(distance(*undisturbed)),
    }
    print(json.dumps(summary) if given.json else summary)
    shutil.rmtree(base)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
