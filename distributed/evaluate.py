"""The benchmark protocol on whole pictures: PSNR and SSIM per task, before and after restoring.

    python -m distributed.evaluate CHECKPOINT DATA [DATA ...] [--compare OTHER ...] [--out DIR]

Each picture always gets the same noise, so figures repeat. Every output states the protocol and how
much of the benchmark it covers.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from distributed import baselines, compare, iqa, routing, tables
from distributed.checkpoint import newest_complete
from distributed.iqa import Name
from distributed.routing import Routing, RoutingOf
from distributed.scores import (
    Elapsed,
    EvaluationReport,
    Held,
    iqa_table,
    routing_table,
    table,
    write,
)
from distributed.scoring import (
    GPU_BATCH,
    Panels,
    Restore,
    Scorer,
    chunks,
    network_scorer,
    score_with,
)
from distributed.scoring_workers import Count, Job, Workers, ray_workers
from distributed.sources import packed, parse_all
from measnet.config import ModelConfig, from_dict
from measnet.hardware import Decision, DeviceChoice, choose_device, this_machine
from measnet.hub import SMALL
from measnet.metrics import FIELD, Protocol
from measnet.network import MEASNet
from measnet.routing import mean_gates
from measnet.tiling import ARITHMETIC, OVERLAP, Restored, Tiling, choose_tiling
from measnet.weights import load_weights
from shards import manifest, stream
from shards.storage import is_remote, local_path
from shards.stream import Picture
from shards.tasks import DEGRADATIONS

WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt")
"""Suffixes of weights: files of this program, or checkpoints of the authors' program."""


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
    batch: int = 0,
    workers: Workers | None = None,
    iqa: Sequence[Name] = (),
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
        batch: pictures of a chunk, see `scoring.chunks`; 0: `scoring.GPU_BATCH` on a GPU, else 1.
        workers: restore the pictures, in place of this process.
        iqa: perceptual metrics, see `distributed.iqa`.

    Raises:
        ValueError, OSError: no readable shards, or no pictures in them.
    """
    rows = grid_rows if out is not None else 0
    panels = Panels(rows)
    device = next(model.parameters()).device.type if workers is None else workers.device
    if tiling is None:
        tiling = workers.tiling(model, OVERLAP) if workers else choose_tiling(model)
    start = time.perf_counter()
    pictures = protocol_pictures(data_uri, protocol, limit=limit)
    source = chunks(pictures, batch or (1 if device == "cpu" else GPU_BATCH), tiling.at_once)
    if workers is None:
        scorer = network_scorer(model, tiling, protocol=protocol, ensemble=ensemble, iqa=iqa)
        scores = list(score_with(scorer, source, seen=panels.keep))
    else:
        job = Job(protocol, tiling, ensemble, tuple(iqa))
        scores = workers.score(model, job, source, rows=rows, seen=panels.keep)
    elapsed = Elapsed(time.perf_counter() - start, len(workers) if workers else 1)
    report = EvaluationReport(str(data_uri), protocol, scores, held_by(data_uri), elapsed)
    if out is not None:
        write(report, panels.grids, Path(out))
    return report


def protocol_pictures(
    data_uri: str, protocol: Protocol, *, limit: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Picture]:
    """The pictures of packed shards, cropped and degraded as the protocol says."""
    multiple = 16 if protocol.crop16 else 1
    share: dict[str, Any] = {"limit": limit, "rank": rank, "world": world}
    return stream.pictures(data_uri, noise=protocol.noise, multiple=multiple, **share)


def held_by(data_uri: str) -> dict[str, Held]:
    """Degradation -> pictures in the packed set and in the benchmark, from the set's manifest."""
    entries = manifest.read(data_uri).tasks
    return {
        name: Held(entries[kind.task].samples, entries[kind.task].expected)
        for name, kind in DEGRADATIONS.items()
        if kind.task in entries
    }


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
    iqa: tuple[Name, ...] = ()
    """Also compute these perceptual metrics (`pip install "measnet-ray[iqa]"`). Their weights must
    be on this machine; a missing file is named before anything is restored."""
    routing: Routing = "learned"
    """Also evaluate with another choice of experts, and say what the learned one is worth in dB:
    `fixed` for all pixels, at `random`, or the `best-single` expert of each library."""
    routing_of: RoutingOf = "pixel"
    """Whose choice is replaced: the per-pixel libraries', the per-picture ones', or all."""
    device: DeviceChoice = "auto"
    """Device for restoring; `auto`: the GPU if there is one."""
    batch: int = 0
    """Pictures that are taken at a time; those of one size are restored together. 0: 16 on a GPU, 1
    on a CPU."""
    workers: Count = 0
    """Restore on so many workers of a Ray cluster (RAY_ADDRESS, else a local one), or on `all`; 0:
    in this process. Classical methods of --compare stay in this process."""

    def check(self) -> None:
        """Refuse values out of range."""
        for name in ("limit", "grid_rows", "tile", "overlap", "border", "batch", "workers"):
            value = getattr(self, name)
            if value != "all" and value < 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {value}, but must be 0 or more")
        if self.workers and self.routing != "learned":
            raise ValueError(
                f"--routing {self.routing} changes the network of this process; leave --workers out"
            )


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
    with ExitStack() as stack:
        device = choose_device("cpu" if given.workers else given.device, this_machine())
        model = load(given.checkpoint, device.choice)
        others = {name: _method(name, device.choice) for name in given.compare}
        out = given.out or _beside(given.checkpoint)
        workers = None
        if given.workers:
            workers = stack.enter_context(ray_workers(given.workers, given.device))
            device = Decision(workers.device, f"of each of {len(workers)} workers on Ray")
            workers.check(given.iqa)
        else:
            iqa.check(given.iqa)
        if given.tile or workers is None:
            tiling = choose_tiling(model, tile=given.tile or None, overlap=given.overlap)
        else:
            tiling = workers.tiling(model, given.overlap)
        arithmetic = Decision(ARITHMETIC, "a GPU and a CPU give the same figures")
        decisions = {"device": device, "arithmetic": arithmetic, "tiles": tiling.decision}
        for name, made in decisions.items():
            console.print(f"{name}: {made.choice} ({made.reason})", style="dim", highlight=False)
        settings = _settings(given, tiling, workers)
        reports = []
        for source in sources:
            folder = out if len(sources) == 1 else out / source.name
            with packed(source) as uri:
                report = _evaluate_source(given, model, settings, uri, folder, console)
                report = dataclasses.replace(report, data=source.name if source.layout else uri)
                if others:
                    _compare(given, report, others, settings, uri, folder, console)
            reports.append(report)
    written = tables.write(Path(given.checkpoint).name, reports, out)
    console.print(
        f"per picture:  {out / ('pictures.csv' if len(sources) == 1 else '*/pictures.csv')}\n"
        f"before/after: {out / ('grids' if len(sources) == 1 else '*/grids')}\n"
        f"beside the field's figures: {', '.join(map(str, written))}",
        style="dim",
    )


def _settings(given: Arguments, tiling: Tiling, workers: Workers | None) -> dict[str, Any]:
    protocol = Protocol(
        colour=given.colour, border=given.border, crop16=given.crop16, noise=given.noise
    )
    return {
        "limit": given.limit,
        "protocol": protocol,
        "tiling": tiling,
        "ensemble": given.self_ensemble,
        "batch": given.batch,
        "workers": workers,
        "iqa": given.iqa,
    }


def _evaluate_source(
    given: Arguments,
    model: MEASNet,
    settings: dict[str, Any],
    uri: str,
    folder: Path,
    console: Console,
) -> EvaluationReport:
    """Evaluate one set, show its tables, and what the choice of experts is worth if asked for."""
    with mean_gates(model) as means:
        report = evaluate(model, uri, folder, grid_rows=given.grid_rows, **settings)
    console.print(table(report))
    if given.iqa:
        console.print(iqa_table(report))
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
    settings: dict[str, Any],
    uri: str,
    folder: Path,
    console: Console,
) -> None:
    """Evaluate the other methods on the same pictures, and show the differences."""
    protocol: Protocol = settings["protocol"]
    reports = {Path(given.checkpoint).name or given.checkpoint: first}
    for name, network in others.items():
        if network is not None:
            reports[name] = evaluate(network, uri, None, **settings)
            continue

        source = chunks(protocol_pictures(uri, protocol, limit=given.limit))
        scores = list(
            score_with(Scorer(_classical(name), protocol=protocol, iqa=given.iqa), source)
        )
        reports[name] = EvaluationReport(uri, protocol, scores, held_by(uri))
    console.print(compare.table(reports))
    used = [baselines.BASELINES[n].about for n in others if n in baselines.BASELINES]
    compare.write(reports, folder / "compare.json", used)


def _classical(name: str) -> Restore:
    def restore(picture: Picture) -> Restored:
        degraded = picture.degraded.permute(1, 2, 0).numpy()
        image = baselines.apply(name, picture.degradation, degraded)
        return Restored(torch.from_numpy(image).permute(2, 0, 1).float(), {}, None, 0)

    return lambda pictures: [restore(picture) for picture in pictures]


def _beside(checkpoint: str) -> Path:
    """Default folder of results: in the run's folder, or beside the file."""
    if is_remote(checkpoint):
        raise ValueError(
            f"{checkpoint} is not a local folder; set a folder for the results with --out"
        )
    path = Path(local_path(checkpoint))
    if checkpoint == SMALL and not path.exists():
        return Path("evaluation")
    return (path.parent if path.is_file() else path) / "evaluation"


if __name__ == "__main__":
    sys.exit(main())
