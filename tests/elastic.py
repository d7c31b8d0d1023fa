"""Give a run more and fewer nodes while it trains, and see what that costs.

    python -m tests.elastic --minutes 10 --every-s 30 --seed 0 [--json]

A run that takes any number of workers from one to `--nodes` trains on a cluster of this machine,
whose nodes are drawn anew again and again: lost ones are killed, others join. It must finish, on
the samples of an undisturbed run in their order, with its curve. Goodput is the time of the steps
that were kept, as a share of all the time since the first step and while nodes were redrawn.
"""

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
    """Redraw the nodes of a running cluster, and report goodput and the curve."""

    minutes: float = 10.0
    """How long the nodes are redrawn; then the run goes on to its end."""
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
    """Where the time of a run went."""

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
        """Kept time of all time."""
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


def differences(expected: Run, found: Run) -> tuple[bool, float]:
    """Whether both runs consumed the same samples in the same order, and how far their curves are
    apart: the largest difference of their means over `WINDOW` steps, as a share of the mean."""
    same = expected.consumed()[-1]["consumed"] == found.consumed()[-1]["consumed"]
    one, other = (list(losses(run.folder).values()) for run in (expected, found))
    means = [
        [statistics.fmean(curve[at : at + WINDOW]) for at in range(0, len(curve), WINDOW)]
        for curve in (one, other)
    ]
    return same, max(abs(a - b) / a for a, b in zip(*means, strict=True))


def redraw(cluster: Cluster, run: Run, given: Arguments, console: Console) -> list[int]:
    """Draw the number of nodes again and again; what was drawn."""
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
    """Run both; 0 where the disturbed run finished as the undisturbed one did."""
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
    (base / "disturbed").mkdir()
    (base / "undisturbed").mkdir()
    cluster = Cluster(nodes=given.nodes, cpus=1)
    try:
        run = Run(base / "disturbed", data, cluster.environment, *options)
        run.wait_for_step(1)
        drawn = redraw(cluster, run, given, console)
        until = time.time()
        code = run.process.wait()
    finally:
        cluster.close()
    console.print("the same run undisturbed")
    undisturbed = Run(base / "undisturbed", data, {}, *options, "--scaling.workers", "2")
    undisturbed.process.wait()
    told = goodput([line for line in run.consumed() if line["time"] <= until])
    same, apart = differences(undisturbed, run)
    summary = {
        "finished": code == 0,
        "draws": len(drawn),
        "changes": sum(a != b for a, b in itertools.pairwise(drawn)),
        "starts": told.starts,
        "steps_made_again": told.again,
        "minutes": round(told.all_s / 60, 1),
        "goodput": round(told.share, 3),
        "same_samples": same,
        "curve_apart": round(apart, 5),
    }
    print(json.dumps(summary) if given.json else summary)
    if code == 0:
        shutil.rmtree(base)
    else:
        console.print(f"the runs are kept in {base}")
    return 0 if code == 0 and same else 1


if __name__ == "__main__":
    sys.exit(main())
