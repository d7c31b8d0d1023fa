"""The benchmark protocol on whole pictures: PSNR and SSIM per task, before and after restoring.

Command: `python -m distributed.evaluate CHECKPOINT DATA [--out DIR]`. Each picture always gets the
same noise, so figures repeat. Every output states the protocol and how much of the benchmark it
covers.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from torch import Tensor

from distributed import figures, routing
from distributed.checkpoint import newest_complete
from distributed.routing import Routing, RoutingOf
from distributed.scores import EvaluationReport, Grids, Held, Score, routing_table, table, write
from measnet.config import ModelConfig, from_dict
from measnet.hardware import Decision, DeviceChoice, choose_device, this_machine
from measnet.metrics import FIELD, Protocol, psnr, ssim
from measnet.network import MEASNet
from measnet.routing import mean_gates
from measnet.tiling import ARITHMETIC, Restored, Tiling, choose_tiling, restore_routed
from measnet.weights import load_weights
from shards import manifest
from shards.stream import Picture, pictures
from shards.tasks import DEGRADATIONS

OVERLAP = 64
"""Pixels that neighbouring tiles share."""
WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt")
"""Suffixes of weights: files of this program, or checkpoints of the authors' program."""
_OVERVIEW = 240
"""Pixels of the longer side in the grid that shows one picture per task."""


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
    routing: Routing = "learned"
    """Also evaluate with another choice of experts, and say what the learned one is worth in dB:
    `fixed` for all pixels, at `random`, or the `best-single` expert of each library."""
    routing_of: RoutingOf = "pixel"
    """Whose choice is replaced: the per-pixel libraries', the per-picture ones', or all."""
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
    protocol = Protocol(colour=given.colour, border=given.border, crop16=given.crop16)
    settings: dict[str, Any] = {"limit": given.limit, "protocol": protocol, "tiling": tiling}
    with mean_gates(model) as means:
        report = evaluate(model, given.data, out, grid_rows=given.grid_rows, **settings)
    console.print(table(report))
    if report.routing_measures:
        console.print(routing_table(report))
    if given.routing != "learned":
        found = routing.worth(
            *(model, lambda: evaluate(model, given.data, None, **settings), report, means),
            by=given.routing,
            of=given.routing_of,
            say=lambda text: console.print(text, style="dim", highlight=False),
        )
        console.print(routing.table(found))
        routing.write(found, out / f"routing-{given.routing}-{given.routing_of}.json")
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


if __name__ == "__main__":
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
