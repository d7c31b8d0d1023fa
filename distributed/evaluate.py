"""The benchmark protocol on whole pictures: PSNR and SSIM per task, before and after restoring.

Command: `python -m distributed.evaluate CHECKPOINT DATA [--out DIR]`. Each picture always gets the
same noise, so figures repeat. Every output states the protocol and how much of the benchmark it
covers.
"""

import csv
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distributed import figures
from distributed.checkpoint import newest_complete
from measnet.config import ModelConfig, from_dict
from measnet.hardware import Decision, DeviceChoice, choose_device, this_machine
from measnet.metrics import FIELD, Protocol, psnr, ssim
from measnet.network import MEASNet
from measnet.tiling import ARITHMETIC, Restored, Tiling, choose_tiling, restore_routed
from measnet.weights import load_weights
from shards import manifest
from shards.storage import finite
from shards.stream import Picture, pictures
from shards.tasks import DEGRADATIONS, TASKS

OVERLAP = 64
"""Pixels that neighbouring tiles share."""
WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt")
"""Suffixes of weights: files of this program, or checkpoints of the authors' program."""
_OVERVIEW = 240
"""Pixels of the longer side in the grid that shows one picture per task."""


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
    seconds: float
    """Time to restore it."""
    routing: dict[str, list[float]]
    """Expert library -> share of the picture that chose each expert."""


class Summary(NamedTuple):
    """Means over pictures."""

    pictures: int
    input_psnr: float
    restored_psnr: float
    input_ssim: float
    restored_ssim: float


@dataclass(frozen=True)
class EvaluationReport:
    """Scores, their means, the data and the protocol."""

    data: str
    protocol: Protocol
    scores: list[Score]
    """Per picture, in the fixed order."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """Degradation -> number of pictures, from `held_by`; empty: not known."""
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
    def gain_error(self) -> float:
        """Standard error of the mean gain in PSNR (dB) over the pictures; NaN for one picture."""
        gains = [s.restored_psnr - s.input_psnr for s in self.scores]
        return float(np.std(gains, ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else math.nan

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """The figures under the names that MLflow groups into charts: `PREFIX_psnr/TASK`."""
        rows = {**self.tasks, "mean": self.mean}
        return {
            f"{prefix}_{kind}/{name}": float(getattr(row, f"restored_{kind}"))
            for kind in ("psnr", "ssim")
            for name, row in rows.items()
        }

    def count(self, name: str) -> str:
        """Number of restored pictures of a degradation; `3 of 15` if the packed set has more."""
        pictures = self.degradations[name].pictures
        packed = self.held[name].packed if name in self.held else pictures
        return str(pictures) if pictures == packed else f"{pictures} of {packed}"

    @property
    def tiles(self) -> dict[str, int]:
        """`whole` or `in tiles of 512, overlap 64` -> number of pictures."""
        return dict(
            Counter(
                f"in tiles of {one.tile}, overlap {one.overlap}" if one.tile else "whole"
                for one in self.scores
            )
        )

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
            "routing": self.routing,
        }
        return dict(finite(report))


def evaluate(
    model: MEASNet,
    data_uri: str,
    out: Path | str | None,
    *,
    limit: int = 0,
    protocol: Protocol = FIELD,
    tiling: Tiling | None = None,
    grid_rows: int = 2,
) -> EvaluationReport:
    """Restore whole pictures, compare them, and write the results.

    Args:
        model: on any device; its mode does not change.
        data_uri: packed shards.
        out: folder for pictures.csv, summary.json, experts.png, grids/DEGRADATION.png and
            grids/overview.png (a picture per task); None writes nothing.
        limit: pictures per degradation; 0 takes all.
        protocol: how pictures are compared.
        tiling: tiles of large pictures; None: chosen by the free memory.
        grid_rows: pictures drawn per degradation.

    Raises:
        ValueError, OSError: no readable shards, or no pictures in them.
    """
    panels = Panels(grid_rows if out is not None else 0)
    tiling = tiling or choose_tiling(model, overlap=OVERLAP)
    source = pictures(data_uri, limit=limit)
    scores = score(model, source, tiling, protocol=protocol, seen=panels.keep)
    report = EvaluationReport(str(data_uri), protocol, list(scores), held_by(data_uri))
    if out is not None:
        write(report, panels.grids, Path(out))
    return report


def held_by(data_uri: str) -> dict[str, Held]:
    """Degradation -> pictures in the packed set and in the benchmark, from the set's manifest."""
    entries = manifest.read(data_uri).tasks
    return {
        name: Held(entries[kind.task].samples, entries[kind.task].expected)
        for name, kind in DEGRADATIONS.items()
        if kind.task in entries
    }


class Panels:
    """Rows of the before/after grids, collected while pictures are scored."""

    def __init__(self, rows: int) -> None:
        """Keep the first `rows` pictures of each degradation."""
        self._rows = rows
        self.grids: Grids = {}
        self._overview: dict[str, Image.Image] = {}

    def keep(self, score: Score, picture: Picture, restored: Tensor) -> None:
        """Add a scored picture, unless its degradation has enough rows."""
        own = self.grids.setdefault(score.degradation, [])
        if len(own) >= self._rows:
            return
        row = _row(score, picture, restored)
        if not own:  # the last, strongest degradation of a task stays in the overview
            self._overview[score.task] = figures.panel(row, widest=_OVERVIEW)
            self.grids["overview"] = list(self._overview.values())
        own.append(figures.panel(row))


def score(
    model: MEASNet,
    source: Iterable[Picture],
    tiling: Tiling,
    *,
    protocol: Protocol = FIELD,
    seen: Callable[[Score, Picture, Tensor], None] | None = None,
) -> Iterator[Score]:
    """Restore and compare pictures, one by one.

    `seen` is called with each score, its picture and the restored picture (3, H, W) on the CPU.
    """
    for picture in source:
        height, width = picture.clean.shape[-2:]
        start = time.perf_counter()
        restored = _restore(model, picture.degraded, tiling)
        seconds = time.perf_counter() - start
        before, after, clean = map(_hwc, (picture.degraded, restored.image, picture.clean))
        result = Score(
            position=picture.position,
            degradation=picture.degradation,
            task=picture.task,
            name=picture.name,
            height=height,
            width=width,
            tile=restored.tile or 0,
            overlap=restored.overlap,
            input_psnr=psnr(before, clean, protocol),
            restored_psnr=psnr(after, clean, protocol),
            input_ssim=ssim(before, clean, protocol),
            restored_ssim=ssim(after, clean, protocol),
            seconds=seconds,
            routing={name: shares[0].tolist() for name, shares in restored.routing.items()},
        )
        if seen is not None:
            seen(result, picture, restored.image)
        yield result


def write(report: EvaluationReport, panels: Mapping[str, Sequence[Image.Image]], out: Path) -> None:
    """Write pictures.csv, summary.json, experts.png and the grids to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    columns = [name for name in Score._fields if name != "routing"]
    with (out / "pictures.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, "protocol"])
        for row in report.scores:
            values = [getattr(row, name) for name in columns]
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


def load(checkpoint: str, device: torch.device | str) -> MEASNet:
    """Load a weights file, or the averaged weights of a run's newest complete checkpoint.

    Raises:
        ValueError, OSError: no such file, or not a checkpoint of this or the authors' program.
    """
    if checkpoint.endswith(WEIGHT_FILES):
        if not Path(checkpoint).is_file():
            raise ValueError(f"there is no file {checkpoint}")
        return load_weights(Path(checkpoint)).to(device)
    newest = newest_complete(checkpoint, say=lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise ValueError(
            f"{checkpoint} holds no complete checkpoint; give a run folder such as runs/demo, "
            f"or a file ({', '.join(WEIGHT_FILES)})"
        )
    model = MEASNet(from_dict(ModelConfig, newest.state().config["model"], "model"))
    model.load_state_dict(newest.tensors("ema"))
    return model.to(device)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Restore whole pictures of packed shards and compare them with the clean ones."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest complete checkpoint, averaged weights), a .safetensors file, or a
    checkpoint of the authors' program (.ckpt, .pth)."""
    data: tyro.conf.Positional[str]
    """Folder or URI of packed shards."""
    out: Path | None = None
    """Folder for pictures.csv, summary.json, experts.png and grids/; default: evaluation/ beside
    the checkpoint."""
    limit: int = 0
    """Pictures per degradation; 0 takes all."""
    grid_rows: int = 2
    """Pictures drawn per degradation in the before/after grids."""
    tile: int = 0
    """Side of tiles in pixels; 0: pictures are restored whole if the free memory allows it, else in
    the largest tiles that fit."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share."""
    colour: Literal["rgb", "y"] = "rgb"
    """Compare RGB, or the luma of BT.601."""
    border: int = 0
    """Pixels cut off on each side before comparing."""
    crop16: bool = False
    """Compare the centre crop to multiples of 16, as some programs of the field do."""
    device: DeviceChoice = "auto"
    """Device for restoring; `auto`: the GPU if there is one."""

    def check(self) -> None:
        """Refuse values out of range."""
        for name in ("limit", "grid_rows", "tile", "overlap", "border"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}, but must be 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.evaluate")
    try:
        _run(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: Arguments) -> None:
    given.check()
    console = Console(soft_wrap=True)
    device = choose_device(given.device, this_machine())
    model = load(given.checkpoint, device.choice)
    out = given.out or _beside(given.checkpoint)
    tiling = choose_tiling(model, tile=given.tile or None, overlap=given.overlap)
    arithmetic = Decision(ARITHMETIC, "a GPU and a CPU give the same figures")
    for name, made in (("device", device), ("arithmetic", arithmetic), ("tiles", tiling.decision)):
        console.print(f"{name}: {made.choice} ({made.reason})", style="dim", highlight=False)
    report = evaluate(
        model,
        given.data,
        out,
        limit=given.limit,
        protocol=Protocol(colour=given.colour, border=given.border, crop16=given.crop16),
        tiling=tiling,
        grid_rows=given.grid_rows,
    )
    console.print(table(report))
    console.print(
        f"per picture: {out / 'pictures.csv'}\nbefore/after: {out / 'grids'}", style="dim"
    )


def _beside(checkpoint: str) -> Path:
    """Default folder of results: in the run's folder, or beside the file."""
    if "://" in checkpoint:
        raise ValueError(
            f"{checkpoint} is not a local folder; set a folder for the results with --out"
        )
    path = Path(checkpoint)
    return (path.parent if path.is_file() else path) / "evaluation"


def _restore(model: MEASNet, degraded: Tensor, tiling: Tiling) -> Restored:
    """Restore one picture (3, H, W) on the CPU; the network's mode does not change."""
    training = model.training
    tile = tiling.side(*degraded.shape[-2:])
    try:
        return restore_routed(model.eval(), degraded, tile=tile, overlap=tiling.overlap)
    finally:
        model.train(training)


def _hwc(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def _row(score: Score, picture: Picture, restored: Tensor) -> figures.GridRow:
    return figures.GridRow(
        label=f"{score.degradation}   {score.name}",
        degraded=_hwc(picture.degraded),
        restored=_hwc(restored),
        clean=_hwc(picture.clean),
        input_psnr=score.input_psnr,
        restored_psnr=score.restored_psnr,
    )


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


if __name__ == "__main__":
    sys.exit(main())
