"""Scores of restored pictures, their means, and how they are shown and written."""

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table

from distributed import figures
from distributed.iqa import METRICS
from measnet.metrics import Protocol
from measnet.routing import Measures, measures
from measnet.tiling import ARITHMETIC
from shards.storage import finite
from shards.tasks import DEGRADATIONS, TASKS

Grids = dict[str, list[Image.Image]]
"""Degradation -> rows of its before/after grid; `overview` -> a row per task."""


class Held(NamedTuple):
    """Number of pictures of a degradation."""

    packed: int
    """In the packed set."""
    benchmark: int = 0
    """In the whole benchmark; 0 if that is not known."""


class Score(NamedTuple):
    """Result for one picture; plain values, so that ranks can send them to each other."""

    position: int
    """Position in the fixed order of the pictures."""
    degradation: str
    task: str
    name: str
    height: int
    width: int
    tile: int
    """Side of the tiles in pixels; 0: restored whole."""
    overlap: int
    """Pixels that the tiles share; 0: restored whole."""
    input_psnr: float
    restored_psnr: float
    input_ssim: float
    restored_ssim: float
    input_psnr_y: float
    """Of luma, with the same border and crop."""
    restored_psnr_y: float
    input_ssim_y: float
    restored_ssim_y: float
    seconds: float
    """Time to restore it."""
    routing: dict[str, list[float]]
    """Expert library -> share of the picture that chose each expert."""
    turns: int = 1
    """Mirrored and turned pictures that the result is the mean of; 1: no self-ensemble."""
    iqa: Mapping[str, Sequence[float]] = {}
    """Perceptual metric (`distributed.iqa`) -> value before and after."""


class Summary(NamedTuple):
    """Means over pictures."""

    pictures: int
    input_psnr: float
    restored_psnr: float
    input_ssim: float
    restored_ssim: float
    input_psnr_y: float
    restored_psnr_y: float
    input_ssim_y: float
    restored_ssim_y: float


class Elapsed(NamedTuple):
    """Time of an evaluation, from the first picture read to the last one compared."""

    seconds: float
    workers: int = 1
    """Processes that restored pictures at the same time."""


@dataclass(frozen=True)
class EvaluationReport:
    """Scores, their means, the data and the protocol."""

    data: str
    protocol: Protocol
    scores: list[Score]
    """Per picture, in the fixed order."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """Degradation -> number of pictures, from `held_by`; empty: not known."""
    elapsed: Elapsed | None = None
    """None: not known."""
    degradations: dict[str, Summary] = field(init=False)
    """Means over the pictures of a degradation."""
    tasks: dict[str, Summary] = field(init=False)
    """Means over the degradations of a task; `pictures` counts those of all its degradations."""
    routing: dict[str, dict[str, list[float]]] = field(init=False)
    """Task -> expert library -> mean share per expert."""

    def __post_init__(self) -> None:
        """Average the scores.

        Raises:
            ValueError: no scores.
        """
        if not self.scores:
            raise ValueError(f"{self.data} holds no picture to evaluate")
        degradations = {
            name: _mean(own)
            for name in DEGRADATIONS
            if (own := [s for s in self.scores if s.degradation == name])
        }
        tasks = {}
        for task in TASKS:
            rows = [row for name, row in degradations.items() if DEGRADATIONS[name].task == task]
            if rows:
                tasks[task] = _mean(rows)._replace(pictures=sum(row.pictures for row in rows))
        object.__setattr__(self, "degradations", degradations)
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "routing", {task: self._routing(task) for task in tasks})

    def _routing(self, task: str) -> dict[str, list[float]]:
        own = [s.routing for s in self.scores if s.task == task]
        return {
            library: np.mean([routing[library] for routing in own], axis=0).tolist()
            for library in own[0]
        }

    @property
    def mean(self) -> Summary:
        """Mean over tasks, each task counting once: the `average` of the field's tables."""
        tasks = list(self.tasks.values())
        return _mean(tasks)._replace(pictures=sum(s.pictures for s in tasks))

    @property
    def iqa(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Degradation -> perceptual metric -> mean before and after."""
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for name in self.degradations:
            own = [score.iqa for score in self.scores if score.degradation == name]
            for metric in own[0]:
                before, after = np.mean([values[metric] for values in own], axis=0).tolist()
                found.setdefault(name, {})[metric] = (before, after)
        return found

    @property
    def gain_error(self) -> float:
        """Standard error of the mean gain in PSNR (dB) over the pictures; NaN for one picture."""
        gains = [s.restored_psnr - s.input_psnr for s in self.scores]
        return float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.nan

    @property
    def network_share(self) -> float:
        """Share of the time that was spent in the network, 0 to 1; NaN where it is not known."""
        if self.elapsed is None:
            return math.nan
        restoring = sum(score.seconds for score in self.scores)
        return restoring / (self.elapsed.seconds * self.elapsed.workers)

    @property
    def routing_measures(self) -> dict[str, Measures]:
        """Library of experts -> how the tasks use it."""
        return measures(self.routing)

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """The figures under the names that MLflow groups into charts: `PREFIX_psnr/TASK`."""
        rows = {**self.tasks, "mean": self.mean}
        scores = {
            f"{prefix}_{kind}/{name}": float(getattr(row, f"restored_{kind}"))
            for kind in ("psnr", "ssim")
            for name, row in rows.items()
        }
        libraries = {
            f"{prefix}_{kind}/{name}": float(getattr(own, kind))
            for kind in ("effective_experts", "mutual_information")
            for name, own in self.routing_measures.items()
        }
        return scores | libraries

    def count(self, name: str) -> str:
        """Number of restored pictures of a degradation; `3 of 15` if the packed set has more."""
        pictures = self.degradations[name].pictures
        packed = self.held[name].packed if name in self.held else pictures
        return str(pictures) if pictures == packed else f"{pictures} of {packed}"

    @property
    def tiles(self) -> dict[str, int]:
        """`whole`, `in exact tiles of 512`, or `in tiles of 512, overlap 64` -> pictures."""
        return dict(Counter(_restored_how(one) for one in self.scores))

    def describe(self) -> str:
        """Protocol, arithmetic and tiles; also which packed sets are a part of a benchmark."""
        tiles = "; ".join(f"{number} {how}" for how, number in self.tiles.items())
        parts = {
            f"{DEGRADATIONS[name].task}: the packed set holds {held.packed:,} of the benchmark's "
            f"{held.benchmark:,} pictures": None
            for name, held in self.held.items()
            if name in self.degradations and held.packed < held.benchmark
        }
        lines = [self.protocol.describe(), f"restored in {ARITHMETIC}: {tiles}", *parts]
        if self.elapsed:
            seconds, workers = self.elapsed
            on = f" on {workers} workers" if workers > 1 else ""
            lines.append(f"{seconds:.1f} s{on}, {self.network_share:.0%} of it in the network")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the scores, for JSON; infinite and NaN become None."""
        report = {
            "data": self.data,
            "protocol": self.protocol.as_dict(),
            "arithmetic": ARITHMETIC,
            "restored": self.tiles,
            "held": {name: held._asdict() for name, held in self.held.items()},
            "tasks": {name: row._asdict() for name, row in self.tasks.items()},
            "degradations": {name: row._asdict() for name, row in self.degradations.items()},
            "mean": self.mean._asdict(),
            "gain_error": self.gain_error,
            "time": self.elapsed
            and {**self.elapsed._asdict(), "network_share": self.network_share},
            "iqa": self.iqa,
            "routing": self.routing,
            "routing_measures": {n: one._asdict() for n, one in self.routing_measures.items()},
        }
        return dict(finite(report))


def write(report: EvaluationReport, panels: Mapping[str, Sequence[Image.Image]], out: Path) -> None:
    """Write pictures.csv, summary.json, experts.png and the grids to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    columns = [name for name in Score._fields if name not in ("routing", "iqa")]
    metrics = list(report.scores[0].iqa)
    sides = [f"{side}_{metric}" for metric in metrics for side in ("input", "restored")]
    with (out / "pictures.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, *sides, "protocol"])
        for row in report.scores:
            values = [getattr(row, name) for name in columns]
            values += [value for metric in metrics for value in row.iqa[metric]]
            table.writerow([*map(_digits, values), report.protocol.describe()])
    text = json.dumps(report.as_dict(), indent=2, allow_nan=False)
    (out / "summary.json").write_text(text + "\n")
    if any(report.routing.values()):
        figures.expert_usage(report.routing, out / "experts.png")
    for name, own in panels.items():
        if own:
            figures.grid(own, out / "grids" / f"{name}.png", footer=report.protocol.describe())


def table(report: EvaluationReport) -> Table:
    """The report as a table for the terminal: a row per degradation, then the mean over tasks."""
    view = Table(title=report.data, caption=report.describe())
    view.add_column("task", no_wrap=True, min_width=13)
    for name in ("pictures", "PSNR before", "PSNR after", "gain", "SSIM before", "SSIM after"):
        view.add_column(name, justify="right")
    for name, row in report.degradations.items():
        view.add_row(name, report.count(name), *_cells(row))
    view.add_section()
    mean = report.mean
    view.add_row("mean of tasks", str(mean.pictures), *_cells(mean), style="bold")
    return view


def iqa_table(report: EvaluationReport) -> Table:
    """Perceptual metrics before -> after, a row per degradation."""
    view = Table(title="perceptual metrics", caption="before -> after; whole pictures, in [0, 1]")
    view.add_column("task", no_wrap=True)
    for name, metric in METRICS.items():
        if name in report.scores[0].iqa:
            better = "lower" if metric.lower_is_better else "higher"
            view.add_column(f"{name.upper()} ({better} is better)", justify="right")
    for degradation, own in report.iqa.items():
        cells = [own[name] for name in METRICS if name in own]
        view.add_row(degradation, *(f"{before:.4f} -> {after:.4f}" for before, after in cells))
    return view


def routing_table(report: EvaluationReport) -> Table:
    """How each library of experts is used, a row per library."""
    view = Table(title="choice of experts")
    view.add_column("library", no_wrap=True)
    for name in ("experts", "chosen", "effective", "task information"):
        view.add_column(name, justify="right")
    for name, own in report.routing_measures.items():
        shares = next(iter(report.routing.values()))[name]
        chosen, effective = f"{sum(shares):.0f}", f"{own.effective_experts:.2f}"
        information = f"{own.mutual_information:.3f} nat"
        view.add_row(name, str(len(shares)), chosen, effective, information)
    return view


def _restored_how(score: Score) -> str:
    mean = f", mean of {score.turns} turns" if score.turns > 1 else ""
    if not score.tile:
        return f"whole{mean}"
    if not score.overlap:
        return f"in exact tiles of {score.tile}{mean}"
    return f"in tiles of {score.tile}, overlap {score.overlap}{mean}"


def _mean(rows: Sequence[Score] | Sequence[Summary]) -> Summary:
    means = (float(np.mean([getattr(row, name) for row in rows])) for name in Summary._fields[1:])
    return Summary(len(rows), *means)


def _cells(row: Summary) -> tuple[str, ...]:
    return (
        f"{row.input_psnr:.2f}",
        f"{row.restored_psnr:.2f}",
        f"{row.restored_psnr - row.input_psnr:+.2f}",
        f"{row.input_ssim:.4f}",
        f"{row.restored_ssim:.4f}",
    )


def _digits(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else value
