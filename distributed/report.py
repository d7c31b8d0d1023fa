"""The report of runs: `python -m distributed.report RUN [RUN ...] [--out FILE.html]`.

One HTML file without external files. Figures of the last validation come from the checkpoint; some
held-out pictures are restored again, to show them and what the network does with them.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from markupsafe import Markup

from distributed import mlflow_tracker
from distributed.pages import charts
from distributed.pages.gallery import gallery
from distributed.pages.render import differences, fixed, render
from distributed.pages.runs import RunPage, read, show_pictures
from measnet.complexity import PEERS
from measnet.hardware import DeviceChoice, choose_device, this_machine
from shards.storage import is_remote, open_folder, write_whole

PICTURES = 3
"""Pictures per degradation that are restored."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a page about one run, or about several side by side."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders or URIs of runs, such as runs/demo."""
    out: Path | None = None
    """The file to write; default: report.html in the first run's folder."""
    data: str = ""
    """Folder or URI of packed shards with the pictures to show; default: those of each run's
    validation."""
    pictures: int = PICTURES
    """Pictures per degradation that are restored; the first is shown. 0: none, then the network
    does not run."""
    price: float = 0.0
    """Price of one worker's card (or machine, on a CPU) per hour, in any currency; 0: not shown."""
    mlflow: bool = True
    """Also store the page in MLflow, as an artifact of each run."""
    device: DeviceChoice = "auto"
    """Device for restoring; `auto`: the GPU if there is one."""

    def check(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            ValueError: with the flag and the limit.
        """
        if not self.runs:
            raise ValueError("give the folder of at least one run, such as runs/demo")
        twice = sorted({run for run in self.runs if self.runs.count(run) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is given twice; give each run once")
        if self.pictures < 0:
            raise ValueError(f"--pictures is {self.pictures}, but must be 0 or more")
        if self.price < 0:
            raise ValueError(f"--price is {self.price}, but must be 0 or more")
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"--out {self.out} is a folder; give a file such as report.html")
        if self.out is None and is_remote(self.runs[0]):
            raise ValueError(f"{self.runs[0]} is not a local folder; name the page with --out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.report")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        write(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(given: Arguments, say: Callable[[str], None] = print) -> Path:
    """Write the page, and store it in MLflow.

    Args:
        given: the runs, and what to show.
        say: gets the lines about what is done.

    Raises:
        ValueError, OSError: arguments, runs or pictures that cannot be used.
    """
    given.check()
    path = given.out or Path(given.runs[0]) / "report.html"
    runs = [read(folder, price=given.price) for folder in given.runs]
    runs = _named_apart(runs)
    if given.pictures:
        device = choose_device(given.device, this_machine()).choice
        show_pictures(runs, device, limit=given.pictures, data=given.data, say=say)
    text = page(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(*open_folder(str(path)), text.encode())
    say(f"{path} ({len(text.encode()) / 2**20:.1f} MiB)")
    if given.mlflow:
        for run in runs:
            _log(run, path, say)
    return path


def page(runs: Sequence[RunPage]) -> str:
    """The page as HTML."""
    changed = differences({run.name: run.state.config for run in runs})
    return render(
        "run.html",
        runs=runs,
        several=len(runs) > 1,
        figures=figures(runs),
        warnings=warnings(runs),
        gallery=gallery(runs),
        curves=curves(runs),
        expert_colour=charts.colour,
        most_experts=max(run.model.pixel_experts for run in runs),
        blocks=list(dict.fromkeys(block for run in runs for block in run.complexity.parameters)),
        networks=networks(runs),
        differences=[
            ("", [name, *("–" if v is None else v for v in row)]) for name, row in changed
        ],
    )


def networks(runs: Sequence[RunPage]) -> list[tuple[str, list[str]]]:
    """Rows of the table of sizes: the runs, then networks of other authors."""
    own = [
        (
            "best",
            [
                run.name,
                fixed(run.complexity.total_parameters / 1e6),
                fixed(run.complexity.total_multiply_adds / 1e9, 1),
                "",
            ],
        )
        for run in runs
    ]
    others = [
        ("", [one.name, fixed(one.parameters), fixed(one.multiply_adds, 1), fixed(one.psnr)])
        for one in PEERS
    ]
    return own + others


def figures(runs: Sequence[RunPage]) -> list[dict[str, Any]]:
    """Rows of the table: a degradation or the mean, and each run's means or None."""
    names = dict.fromkeys(name for run in runs for name in run.report.get("degradations", {}))
    rows: list[dict[str, Any]] = [
        {"name": name, "cells": [r.report.get("degradations", {}).get(name) for r in runs]}
        for name in names
    ]
    mean = {"name": "mean of tasks", "cells": [run.report.get("mean") for run in runs]}
    return [one | {"total": one is mean} for one in [*rows, mean]]


def warnings(runs: Sequence[RunPage]) -> list[str]:
    """Why the figures of the runs cannot be compared."""
    found = []
    reports = [run.report for run in runs if run.report]
    if len({one["data"] for one in reports}) > 1:
        found.append("The runs were measured on different pictures: their figures do not compare.")
    elif len({one["mean"]["pictures"] for one in reports}) > 1:
        found.append("The runs were measured on different numbers of pictures.")
    if len({one["protocol"]["description"] for one in reports}) > 1:
        found.append("The runs were measured by different protocols: their figures do not compare.")
    return found


GROUPS = {
    "val_psnr": ("Validation PSNR", "dB"),
    "val_ssim": ("Validation SSIM", "SSIM"),
    "val_effective_experts": ("Effective experts", "experts"),
}
"""Group of metrics -> title of its chart, and unit."""
SINGLE = {
    "train/l1": ("Training loss", "L1"),
    "train/balance": ("Balance loss", "without λ"),
    "train/learning_rate": ("Learning rate", "rate"),
    "speed/samples_per_s": ("Speed", "samples/s"),
}
"""Metric -> title of its chart, and unit."""


def curves(runs: Sequence[RunPage]) -> list[Markup]:
    """Charts over the training samples: for one run a line per task, for several a line per run."""
    found: dict[str, tuple[str, dict[str, list[tuple[float, float]]]]] = {}
    for group, (title, unit) in GROUPS.items():
        for run in runs:
            for name, points in run.curves.items():
                if not name.startswith(f"{group}/"):
                    continue
                leaf = name.removeprefix(f"{group}/")
                several = len(runs) > 1
                heading, line = (f"{title}, {leaf}", run.name) if several else (title, leaf)
                found.setdefault(heading, (unit, {}))[1][line] = points
    for name, (title, unit) in SINGLE.items():
        for run in runs:
            if name in run.curves:
                found.setdefault(title, (unit, {}))[1][run.name] = run.curves[name]
    return [charts.lines(lines, title=title, unit=unit) for title, (unit, lines) in found.items()]


def _named_apart(runs: Sequence[RunPage]) -> list[RunPage]:
    """Runs of equal names get their folders as names."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else dataclasses.replace(run, name=run.folder)
        for run in runs
    ]


def _log(run: RunPage, path: Path, say: Callable[[str], None]) -> None:
    """Store the page in MLflow, if the run has been recorded in a store that is there."""
    tracked = run.tracked
    if tracked is None:
        return _warn(f"{run.name} has no run in MLflow; its page is not stored there")
    database = Path(tracked.uri.removeprefix("sqlite:///"))
    if tracked.uri.startswith("sqlite:") and not database.exists():
        return _warn(f"{database} is not on this machine; the page is not stored in MLflow")
    if mlflow_tracker.log_artifacts(tracked, path, "report"):
        say(f"MLflow: report/{path.name} of {run.name}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
