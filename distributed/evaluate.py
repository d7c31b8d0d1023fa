"""The benchmark protocol on whole pictures: PSNR and SSIM per task, before and after restoring.

    python -m distributed.evaluate CHECKPOINT DATA [DATA ...] [--compare OTHER ...] [--out DIR]

Each picture always gets the same noise, so figures repeat. Every output states the protocol and how
much of the benchmark it covers.
"""

import dataclasses
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

from distributed import baselines, compare, figures, routing, tables
from distributed.checkpoint import newest_complete
from distributed.routing import Routing, RoutingOf
from distributed.scores import EvaluationReport, Grids, Held, Score, routing_table, table, write
from distributed.sources import packed, parse_all
from measnet.config import ModelConfig, from_dict
from measnet.ensemble import TURNS, self_ensemble
from measnet.hardware import Decision, DeviceChoice, choose_device, this_machine
from measnet.hub import SMALL
from measnet.metrics import FIELD, Protocol, quality
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
_COMPARED = tuple(
    f"{side}_{kind}{colour}"
    for colour in ("", "_y")
    for kind in ("psnr", "ssim")
    for side in ("input", "restored")
)
"""Figures of a `Score`: first both PSNR of RGB, then both SSIM, then those of luma."""
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
    ensemble: bool = False,
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
        ensemble: restore each picture as `measnet.ensemble` says.

    Raises:
        ValueError, OSError: no readable shards, or no pictures in them.
    """
    panels = Panels(grid_rows if out is not None else 0)
    tiling = tiling or choose_tiling(model, overlap=OVERLAP)
    source = protocol_pictures(data_uri, protocol, limit=limit)
    scores = score(model, source, tiling, protocol=protocol, seen=panels.keep, ensemble=ensemble)
    report = EvaluationReport(str(data_uri), protocol, list(scores), held_by(data_uri))
    if out is not None:
        write(report, panels.grids, Path(out))
    return report


def protocol_pictures(
    data_uri: str, protocol: Protocol, *, limit: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Picture]:
    """The pictures of packed shards, cropped and degraded as the protocol says."""
    multiple = 16 if protocol.crop16 else 1
    share: dict[str, Any] = {"limit": limit, "rank": rank, "world": world}
    return pictures(data_uri, noise=protocol.noise, multiple=multiple, **share)


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
    ensemble: bool = False,
) -> Iterator[Score]:
    """Restore pictures by the network and compare them, one by one; see `score_with`."""
    device = next(model.parameters()).device

    def restore(picture: Picture) -> Restored:
        if not ensemble:
            return _restore(model, picture.degraded, tiling)
        turned: list[Restored] = []

        def one_turn(image: Tensor, turn: int) -> Tensor:
            turned.append(_restore(model, image, tiling))
            return turned[-1].image

        image = self_ensemble(one_turn, picture.degraded)
        return turned[0]._replace(image=image)  # the experts of the upright picture

    scores = score_with(restore, source, protocol=protocol, seen=seen, device=device)
    return (one._replace(turns=TURNS if ensemble else 1) for one in scores)


def score_with(
    restore: Callable[[Picture], Restored],
    source: Iterable[Picture],
    *,
    protocol: Protocol = FIELD,
    seen: Callable[[Score, Picture, Tensor], None] | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Score]:
    """Restore and compare pictures, one by one.

    Args:
        restore: the method.
        source: the pictures.
        protocol: how to compare.
        seen: is called with each score, its picture and the restored picture (3, H, W) on the CPU.
        device: where pictures are compared.
    """
    luma = dataclasses.replace(protocol, colour="y")
    for picture in source:
        height, width = picture.clean.shape[-2:]
        start = time.perf_counter()
        restored = restore(picture)
        seconds = time.perf_counter() - start
        sides = torch.stack([picture.degraded, restored.image]).to(device)
        clean = picture.clean.to(device).expand_as(sides)
        rgb, y = quality(sides, clean, protocol), quality(sides, clean, luma)
        figures_of = dict(zip(_COMPARED, torch.cat([*rgb, *y]).tolist(), strict=True))
        result = Score(
            position=picture.position,
            degradation=picture.degradation,
            task=picture.task,
            name=picture.name,
            height=height,
            width=width,
            tile=restored.tile or 0,
            overlap=restored.overlap,
            **figures_of,
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
    if checkpoint == SMALL and not Path(SMALL).exists():
        return load_weights(SMALL).to(device)
    if checkpoint.endswith(WEIGHT_FILES):
        if not Path(checkpoint).is_file():
            raise ValueError(f"there is no file {checkpoint}")
        return load_weights(Path(checkpoint)).to(device)
    newest = newest_complete(checkpoint, say=lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise ValueError(
            f"{checkpoint} holds no complete checkpoint; give a run folder such as runs/demo, "
            f"a file ({', '.join(WEIGHT_FILES)}), or {SMALL}"
        )
    model = MEASNet(from_dict(ModelConfig, newest.state().config["model"], "model"))
    model.load_state_dict(newest.tensors("ema"))
    return model.to(device)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Restore whole pictures of packed shards and compare them with the clean ones."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest complete checkpoint, averaged weights), a .safetensors file, a
    checkpoint of the authors' program (.ckpt, .pth), or `small`, which comes with the program."""
    data: tyro.conf.Positional[list[str]]
    """Folders or URIs of packed shards, or raw benchmark folders as LAYOUT=FOLDER: cbsd68=CBSD68
    (layouts: python -m shards.pack --help)."""
    out: Path | None = None
    """Folder for pictures.csv, summary.json, experts.png, grids/ (in a folder each, if there are
    several DATA), tables.md and tables.tex; default: evaluation/ beside the checkpoint."""
    compare: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """Another checkpoint, or a classical method (cbm3d, dark-channel, gamma, histogram,
    richardson-lucy), on the same pictures; may be repeated."""
    limit: int = 0
    """Pictures per degradation; 0 takes all."""
    grid_rows: int = 2
    """Pictures drawn per degradation in the before/after grids."""
    tile: int = 0
    """Side of tiles in pixels; 0: pictures are restored whole if the free memory allows it, else in
    the largest tiles that fit."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share."""
    self_ensemble: bool = False
    """Mean over the eight mirrored and turned pictures: a little better, eight times as long."""
    colour: Literal["rgb", "y"] = "rgb"
    """Compare RGB, or the luma of BT.601."""
    border: int = 0
    """Pixels cut off on each side before comparing."""
    crop16: bool = False
    """Crop pictures to multiples of 16 before they are restored, as programs of the field do."""
    noise: Literal["picture", "field"] = "picture"
    """Noise of denoising: keyed by the picture, or the stream of the field's test programs."""
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
    sources = parse_all(given.data)
    device = choose_device(given.device, this_machine())
    model = load(given.checkpoint, device.choice)
    others = {name: _method(name, device.choice) for name in given.compare}
    out = given.out or _beside(given.checkpoint)
    tiling = choose_tiling(model, tile=given.tile or None, overlap=given.overlap)
    arithmetic = Decision(ARITHMETIC, "a GPU and a CPU give the same figures")
    for name, made in (("device", device), ("arithmetic", arithmetic), ("tiles", tiling.decision)):
        console.print(f"{name}: {made.choice} ({made.reason})", style="dim", highlight=False)
    reports = []
    for source in sources:
        folder = out if len(sources) == 1 else out / source.name
        with packed(source) as uri:
            report = _evaluate_source(given, model, tiling, uri, folder, console)
            report = dataclasses.replace(report, data=source.name if source.layout else uri)
            if others:
                _compare(given, report, others, tiling, uri, folder, console)
        reports.append(report)
    written = tables.write(Path(given.checkpoint).name, reports, out)
    console.print(
        f"per picture:  {out / ('pictures.csv' if len(sources) == 1 else '*/pictures.csv')}\n"
        f"before/after: {out / ('grids' if len(sources) == 1 else '*/grids')}\n"
        f"beside the field's figures: {', '.join(map(str, written))}",
        style="dim",
    )


def _settings(given: Arguments, tiling: Tiling) -> dict[str, Any]:
    protocol = Protocol(
        colour=given.colour, border=given.border, crop16=given.crop16, noise=given.noise
    )
    return {
        "limit": given.limit,
        "protocol": protocol,
        "tiling": tiling,
        "ensemble": given.self_ensemble,
    }


def _evaluate_source(
    given: Arguments, model: MEASNet, tiling: Tiling, uri: str, folder: Path, console: Console
) -> EvaluationReport:
    """Evaluate one set, show its tables, and what the choice of experts is worth if asked for."""
    settings = _settings(given, tiling)
    with mean_gates(model) as means:
        report = evaluate(model, uri, folder, grid_rows=given.grid_rows, **settings)
    console.print(table(report))
    if report.routing_measures:
        console.print(routing_table(report))
    if given.routing != "learned":
        found = routing.worth(
            *(model, lambda: evaluate(model, uri, None, **settings), report, means),
            by=given.routing,
            of=given.routing_of,
            say=lambda text: console.print(text, style="dim", highlight=False),
        )
        console.print(routing.table(found))
        routing.write(found, folder / f"routing-{given.routing}-{given.routing_of}.json")
    return report


def _method(name: str, device: str) -> MEASNet | None:
    """A checkpoint's network; None for a classical method."""
    return None if name in baselines.BASELINES else load(name, device)


def _compare(
    given: Arguments,
    first: EvaluationReport,
    others: dict[str, MEASNet | None],
    tiling: Tiling,
    uri: str,
    folder: Path,
    console: Console,
) -> None:
    """Evaluate the other methods on the same pictures, and show the differences."""
    settings = _settings(given, tiling)
    protocol: Protocol = settings["protocol"]
    reports = {Path(given.checkpoint).name or given.checkpoint: first}
    for name, network in others.items():
        if network is not None:
            reports[name] = evaluate(network, uri, None, **settings)
            continue

        def restore(picture: Picture, name: str = name) -> Restored:
            image = baselines.apply(name, picture.degradation, _hwc(picture.degraded))
            return Restored(torch.from_numpy(image).permute(2, 0, 1).float(), {}, None, 0)

        source = protocol_pictures(uri, protocol, limit=given.limit)
        scores = list(score_with(restore, source, protocol=protocol))
        reports[name] = EvaluationReport(uri, protocol, scores, held_by(uri))
    console.print(compare.table(reports))
    used = [baselines.BASELINES[n].about for n in others if n in baselines.BASELINES]
    compare.write(reports, folder / "compare.json", used)


def _beside(checkpoint: str) -> Path:
    """Default folder of results: in the run's folder, or beside the file."""
    if "://" in checkpoint:
        raise ValueError(
            f"{checkpoint} is not a local folder; set a folder for the results with --out"
        )
    path = Path(checkpoint)
    if checkpoint == SMALL and not path.exists():
        return Path("evaluation")
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
