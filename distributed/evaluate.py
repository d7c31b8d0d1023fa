"""The benchmark protocol on whole pictures: PSNR and SSIM per task, before and after restoring.

Command: `python -m distributed.evaluate CHECKPOINT DATA [--out DIR]`. Noise belongs to the picture,
not to the run, so figures repeat. Every output states the protocol by which it was measured.
"""

import csv
import json
import math
import sys
import time
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
from distributed.checkpoint import newest_whole
from distributed.storage import finite
from measnet.config import ModelConfig, from_dict
from measnet.metrics import FIELD, Protocol, psnr, ssim
from measnet.network import MEASNet
from measnet.restore import restore
from shards.stream import Picture, pictures
from shards.tasks import DEGRADATIONS, TASKS

WHOLE_UP_TO = 2_000_000
"""Pixels up to which a picture is restored in one piece; larger ones in tiles."""

_OVERVIEW = 240
"""Pixels of the longer side in the grid that shows one picture per task."""


class Tiling(NamedTuple):
    """How large pictures are cut up."""

    tile: int | None = None
    """Side of the tiles in pixels; None: whole pictures up to `WHOLE_UP_TO` pixels, else 512."""
    overlap: int = 64
    """Pixels that neighbouring tiles share."""

    def side(self, height: int, width: int) -> int | None:
        """Side of the tiles for one picture; None restores it in one piece."""
        if self.tile is not None:
            return self.tile if max(height, width) > self.tile else None
        return 512 if height * width > WHOLE_UP_TO else None


class Score(NamedTuple):
    """One restored picture; plain values, so that ranks can send them to each other."""

    position: int
    """Place in the fixed order of the pictures."""
    degradation: str
    task: str
    name: str
    height: int
    width: int
    tile: int
    """Side of the tiles it was restored in; 0: in one piece."""
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
    """What was measured, on what, and how."""

    data: str
    protocol: Protocol
    scores: list[Score]
    """Per picture, in the fixed order."""
    degradations: dict[str, Summary] = field(init=False)
    """Means over the pictures of a degradation."""
    tasks: dict[str, Summary] = field(init=False)
    """Means over the degradations of a task; its pictures are those of all its degradations."""
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

    def metrics(self) -> dict[str, float]:
        """The figures under the names that MLflow groups into charts."""
        rows = {**self.tasks, "mean": self.mean}
        return {
            f"val_{kind}/{name}": float(getattr(row, f"restored_{kind}"))
            for kind in ("psnr", "ssim")
            for name, row in rows.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single pictures, for JSON; infinite and NaN become None."""
        report = {
            "data": self.data,
            "protocol": self.protocol.as_dict(),
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
    device: torch.device | str = "cpu",
    protocol: Protocol = FIELD,
    tiling: Tiling = Tiling(),  # noqa: B008 (immutable)
    grid_rows: int = 2,
) -> EvaluationReport:
    """Restore whole pictures, compare them, and write the results.

    Args:
        model: `MEASNet` on `device`; its mode is left as it was.
        data_uri: packed shards.
        out: folder for pictures.csv, summary.json, experts.png, grids/DEGRADATION.png and
            grids/overview.png (a picture per task); None writes nothing.
        limit: pictures per degradation; 0 takes all.
        device: where the pictures are restored.
        protocol: how pictures are compared.
        tiling: how large pictures are cut up.
        grid_rows: pictures drawn per degradation.

    Raises:
        ValueError, OSError: no readable shards, or no picture in them.
    """
    panels = Panels(grid_rows if out is not None else 0)
    source = enumerate(pictures(data_uri, limit=limit))
    scores = score(model, source, device=device, protocol=protocol, tiling=tiling, seen=panels.keep)
    report = EvaluationReport(str(data_uri), protocol, list(scores))
    if out is not None:
        write(report, panels.grids, Path(out))
    return report


class Panels:
    """Rows of the before/after grids, collected while pictures are scored."""

    def __init__(self, rows: int) -> None:
        """Keep the first `rows` pictures of each degradation."""
        self._rows = rows
        self.grids: dict[str, list[Image.Image]] = {}
        """Degradation -> its rows; `overview` -> a row per task."""
        self._overview: dict[str, Image.Image] = {}

    def keep(self, score: Score, picture: Picture, restored: Tensor) -> None:
        """Take a picture that was scored, if its degradation has room."""
        own = self.grids.setdefault(score.degradation, [])
        if len(own) >= self._rows:
            return
        row = _row(score, picture, restored)
        if not own:  # of a task's degradations the last, which is the strongest, stays
            self._overview[score.task] = figures.panel(row, widest=_OVERVIEW)
            self.grids["overview"] = list(self._overview.values())
        own.append(figures.panel(row))


def share(
    numbered: Iterable[tuple[int, Picture]], rank: int, world: int
) -> Iterator[tuple[int, Picture]]:
    """The pictures that one rank of `world` restores: every world-th of the fixed order.

    The ranks' scores, put together and sorted by position, are those of one rank alone.
    """
    return ((position, picture) for position, picture in numbered if position % world == rank)


def score(
    model: MEASNet,
    numbered: Iterable[tuple[int, Picture]],
    *,
    device: torch.device | str = "cpu",
    protocol: Protocol = FIELD,
    tiling: Tiling = Tiling(),  # noqa: B008 (immutable)
    seen: Callable[[Score, Picture, Tensor], None] | None = None,
) -> Iterator[Score]:
    """Restore and compare numbered pictures, one by one.

    `seen` is called with each score, its picture and the restored picture (3, H, W) on the CPU.
    """
    for position, picture in numbered:
        height, width = picture.clean.shape[-2:]
        tile = tiling.side(height, width)
        start = time.perf_counter()
        restored, routing = _restore(model, picture.degraded.to(device), tile, tiling.overlap)
        seconds = time.perf_counter() - start
        before, after, clean = (_hwc(p) for p in (picture.degraded, restored, picture.clean))
        result = Score(
            position=position,
            degradation=picture.degradation,
            task=picture.task,
            name=picture.name,
            height=height,
            width=width,
            tile=tile or 0,
            input_psnr=psnr(before, clean, protocol),
            restored_psnr=psnr(after, clean, protocol),
            input_ssim=ssim(before, clean, protocol),
            restored_ssim=ssim(after, clean, protocol),
            seconds=seconds,
            routing=routing,
        )
        if seen is not None:
            seen(result, picture, restored)
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
    view = Table(title=report.data, caption=report.protocol.describe())
    view.add_column("task", no_wrap=True, min_width=13)
    for name in ("pictures", "PSNR before", "PSNR after", "gain", "SSIM before", "SSIM after"):
        view.add_column(name, justify="right")
    for name, row in report.degradations.items():
        view.add_row(name, *_cells(row))
    view.add_section()
    view.add_row("mean of tasks", *_cells(report.mean), style="bold")
    return view


def load(checkpoint: str, device: torch.device | str) -> MEASNet:
    """The network of a .safetensors file, or of a run's newest whole checkpoint (averaged weights).

    Raises:
        ValueError, OSError: no such file, or not a checkpoint of this program.
    """
    if checkpoint.endswith(".safetensors"):
        if not Path(checkpoint).is_file():
            raise ValueError(f"there is no file {checkpoint}")
        return MEASNet.from_pretrained(checkpoint).to(device)
    newest = newest_whole(checkpoint, say=lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise ValueError(
            f"{checkpoint} holds no whole checkpoint; give a run folder such as runs/demo, "
            "or a .safetensors file"
        )
    model = MEASNet(from_dict(ModelConfig, newest.state().config["model"], "model"))
    model.load_state_dict(newest.tensors("ema"))
    return model.to(device)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Restore whole pictures of packed shards and compare them with the clean ones."""

    checkpoint: tyro.conf.Positional[str]
    """A .safetensors file, or a run folder (its newest whole checkpoint, averaged weights)."""
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
    """Side of tiles in pixels, for less memory; 0: whole pictures up to 2 megapixels, else 512."""
    overlap: int = 64
    """Pixels that neighbouring tiles share."""
    colour: Literal["rgb", "y"] = "rgb"
    """Compare RGB, or the luma of BT.601."""
    border: int = 0
    """Pixels cut off on each side before comparing."""
    crop16: bool = False
    """Compare the centre crop to multiples of 16, as some programs of the field do."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to restore; `auto`: the GPU where there is one."""

    def check(self) -> None:
        """Refuse values out of range."""
        for name in ("limit", "grid_rows", "tile", "overlap", "border"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}, but must be 0 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 after a message where something is wrong with what was asked for."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.evaluate")
    try:
        _run(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(given: Arguments) -> None:
    given.check()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = automatic if given.device == "auto" else given.device
    model = load(given.checkpoint, device)
    out = given.out or _beside(given.checkpoint)
    report = evaluate(
        model,
        given.data,
        out,
        limit=given.limit,
        device=device,
        protocol=Protocol(colour=given.colour, border=given.border, crop16=given.crop16),
        tiling=Tiling(given.tile or None, given.overlap),
        grid_rows=given.grid_rows,
    )
    console = Console()
    console.print(table(report))
    console.print(
        f"per picture: {out / 'pictures.csv'}\nbefore/after: {out / 'grids'}", style="dim"
    )


def _beside(checkpoint: str) -> Path:
    """Where results go by default: into the run's folder, or the folder of the file."""
    if "://" in checkpoint:
        raise ValueError(f"{checkpoint} is not a local folder: say with --out where results go")
    path = Path(checkpoint)
    return (path.parent if path.is_file() else path) / "evaluation"


def _restore(
    model: MEASNet, degraded: Tensor, tile: int | None, overlap: int
) -> tuple[Tensor, dict[str, list[float]]]:
    """Restored picture (3, H, W) on the CPU, and the experts' shares weighted by tile size."""
    shares: dict[str, Tensor] = {}
    pixels = 0

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal pixels
        size = output.image.shape[0] * output.image.shape[-2] * output.image.shape[-1]
        weight = size / output.image.shape[0]
        pixels += size
        for name, chosen in output.routing.items():
            total = weight * chosen.double().sum(0).cpu()
            shares[name] = shares[name] + total if name in shares else total

    training = model.training
    handle = model.register_forward_hook(note)
    try:
        restored = restore(model.eval(), degraded, tile=tile, overlap=overlap).float().cpu()
    finally:
        handle.remove()
        model.train(training)
    return restored, {name: (total / pixels).tolist() for name, total in shares.items()}


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
        str(row.pictures),
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
