"""Several checkpoints and classical methods on the same pictures, with paired differences."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from rich.table import Table

from distributed.scores import EvaluationReport
from shards.storage import finite


class Difference(NamedTuple):
    """PSNR in dB of one method less that of another, on the same pictures."""

    mean: float
    error: float
    """Standard error of the mean over the pictures; NaN for one picture."""
    better: int
    """Number of pictures on which it is higher."""
    pictures: int


def difference(report: EvaluationReport, other: EvaluationReport, task: str = "") -> Difference:
    """Of all pictures, or of those of a task.

    Raises:
        ValueError: the reports are of other pictures.
    """
    first, second = (
        {(s.degradation, s.position): s for s in one.scores if task in ("", s.task)}
        for one in (report, other)
    )
    if first.keys() != second.keys():
        raise ValueError(f"the results on {report.data} are not of the same pictures")
    apart = np.array([first[key].restored_psnr - second[key].restored_psnr for key in first])
    count = len(apart)
    error = float(apart.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Difference(float(apart.mean()), error, int((apart > 0).sum()), count)


def over_tasks(apart: Sequence[Difference]) -> Difference:
    """The mean over tasks of their differences, as PSNR is averaged; the tasks' errors are
    independent."""
    return Difference(
        fmean(one.mean for one in apart),
        math.sqrt(sum(one.error**2 for one in apart)) / len(apart),
        sum(one.better for one in apart),
        sum(one.pictures for one in apart),
    )


def table(reports: dict[str, EvaluationReport]) -> Table:
    """PSNR per task of each method; below it the difference from the first, ± standard error."""
    names = list(reports)
    first = reports[names[0]]
    view = Table(
        title=first.data,
        caption=f"PSNR in dB; below: paired difference from {names[0]}, mean ± standard error over "
        f"pictures; {first.protocol.describe()}",
    )
    view.add_column("method", no_wrap=True)
    for task in [*first.tasks, "mean"]:
        view.add_column(task, justify="right")
    before = [f"{row.input_psnr:.2f}" for row in (*first.tasks.values(), first.mean)]
    view.add_row("input", *before, style="dim")
    for name, report in reports.items():
        rows = [*report.tasks.values(), report.mean]
        view.add_row(name, *(f"{row.restored_psnr:.2f}" for row in rows))
        if name != names[0]:
            apart = [difference(report, first, task) for task in first.tasks]
            view.add_row("", *map(_cell, [*apart, over_tasks(apart)]), style="dim")
    return view


def _cell(apart: Difference) -> str:
    error = "" if math.isnan(apart.error) else f" ± {apart.error:.2f}"
    return f"{apart.mean:+.2f}{error}"


def write(reports: dict[str, EvaluationReport], path: Path, about: Sequence[str] = ()) -> None:
    """Write methods, their PSNR per task and degradation, and the differences as JSON."""
    names = list(reports)
    first = reports[names[0]]
    content = {
        "data": first.data,
        "protocol": first.protocol.as_dict(),
        "about": list(about),
        "methods": {
            name: {
                "psnr": {t: row.restored_psnr for t, row in report.tasks.items()},
                "degradations": {d: row.restored_psnr for d, row in report.degradations.items()},
                "mean": report.mean.restored_psnr,
                f"less {names[0]}": {
                    **{task: difference(report, first, task)._asdict() for task in first.tasks},
                    "mean": over_tasks(
                        [difference(report, first, task) for task in first.tasks]
                    )._asdict(),
                    "all": difference(report, first, "")._asdict(),
                },
            }
            for name, report in reports.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")
