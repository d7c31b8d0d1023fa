"""The demo, run by `make demo`: pack photographs, train, evaluate, and log to MLflow.

    python -m distributed.demo [--pictures DIR]

Removes its own folders (data/demo, runs/demo) first, so that its figures repeat. Without --pictures
it uses photographs that installed packages ship. Some are held out: they are never trained on, and
all figures are measured on them. Others are for validation while it trains, so that nothing is
chosen by the pictures of the figures.
"""

import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from distributed.config import ScalingConfig, TrainConfig
from distributed.presets import demo
from measnet import decoding
from measnet.hardware import Machine, choose_device, this_machine
from measnet.pictures import WHITE
from shards import layouts

DATA, RUN = Path("data/demo"), Path("runs/demo")
"""The demo's own folders; removed when it starts."""
SYNTHESISED = ("derain", "dehaze", "deblur", "lowlight")
SEVERITY = {"deblur": 0.5}
"""Blur reaches half as far as the packer makes it. The test photographs show much detail per pixel:
with the full reach they have a PSNR of 21.0 dB, with half 24.8 dB, about that of real pairs (a pair
of GoPro has 24.1 dB)."""
TEST = ("astronaut", "motorcycle")
"""Packaged photographs that all figures are measured on."""
VALIDATION = ("hopper",)
"""Packaged photographs that validate while training; `tune.search demo` chooses by them."""
SCALES = tuple(round(1.0 - 0.5 * step / 14, 2) for step in range(15))
"""Each training photograph is packed at these scales, 1 to 0.5, each with its own degradations."""
TEST_SCALES = (1.0, 0.75, 0.5)
"""The same for test photographs: two in one exposure each say little about low light."""
MOST_PICTURES, MOST_TEST, LONGEST, SHORTEST = 24, 2, 768, 96
"""Limits with --pictures: number of pictures, of those to test on, longest and shortest side."""


class Split(NamedTuple):
    """Names of the pictures for each purpose; no picture has two."""

    train: list[str]
    validation: list[str]
    test: list[str]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Pack photographs, train and evaluate on them; takes minutes on a CPU."""

    pictures: Path | None = None
    """Folder of your own pictures, three or more; default: those that installed packages ship."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 2 if pictures cannot be used, 130 if it was stopped."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.demo")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return run(given.pictures, Console())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(source: Path | None, console: Console) -> int:
    """Run all steps; returns the exit code.

    Raises:
        ValueError, OSError: pictures that cannot be used, or a full disk.
    """
    seconds: dict[str, float | None] = {"install": _install_seconds()}
    with _timed(seconds, "pack"):
        pictures = packaged_pictures() if source is None else own_pictures(source)
        _start_from_nothing()
        names = split(sorted(pictures))
        _write_pictures(pictures, names)
        _pack(console, names)

    from distributed.launch import launch

    machine = this_machine()
    config = dataclasses.replace(demo(), scaling=scaling_for(machine))
    console.print(describe_device(machine), highlight=False, markup=False, soft_wrap=True)
    with _timed(seconds, "train"):
        outcome = launch(config, console=console)
    if outcome.status != "finished":
        console.print(f"the training {outcome.status}: {outcome.reason or 'see above'}")
        return outcome.exit_code

    from distributed.evaluate import evaluate, load
    from distributed.scores import table

    with _timed(seconds, "evaluate"):
        device = choose_device("auto", machine).choice
        network = load(str(RUN), device)
        report = evaluate(network, str(DATA / "shards" / "test"), RUN / "evaluation")
        _draw_curves()
    _log_evaluation(config, outcome, report)
    with _timed(seconds, "page"):
        from distributed.report import Arguments, write

        console.print("making the page about the run")
        shown = Arguments(runs=(str(RUN),), data=str(DATA / "shards" / "test"), pictures=1)
        page = write(shown, say=lambda _: None)
    console.print(table(report))
    console.print(_result(report.tasks, names))
    _write_summary(report, outcome.mlflow_run_id, seconds)
    _where_to_look(console, outcome, page, seconds)
    return 0


def scaling_for(machine: Machine) -> ScalingConfig:
    """The workers of the demo: one for each GPU, at most two; without a GPU the preset's two."""
    if not machine.cards:
        return demo().scaling
    return ScalingConfig(workers=str(min(2, len(machine.cards))), device="gpu")


def describe_device(machine: Machine) -> str:
    """One line: the device that the demo trains on."""
    scaling = scaling_for(machine)
    if machine.cards:
        several = "s" if scaling.bounds[1] > 1 else ""
        return f"trains on {scaling.workers} GPU{several}: {machine.cards[0].name}"
    reason = f" ({machine.problem})" if machine.problem else ""
    return f"trains on the CPU with {scaling.workers} workers{reason}"


def packaged_pictures() -> dict[str, dict[str, np.ndarray]]:
    """Name -> `picture` (H, W, 3) uint8, and `disparity` (H, W) if it was measured.

    All are in the installed packages; nothing is downloaded.

    Raises:
        ValueError: an installed package lacks them.
    """
    try:
        from matplotlib import get_data_path
        from skimage import data
        from sklearn.datasets import load_sample_image

        left, _right, disparity = data.stereo_motorcycle()
        found = {
            name: {"picture": getattr(data, name)()}
            for name in ("astronaut", "chelsea", "coffee", "rocket")
        }
        found["china"] = {"picture": load_sample_image("china.jpg")}
        found["flower"] = {"picture": load_sample_image("flower.jpg")}
        with Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")) as file:
            found["hopper"] = {"picture": np.asarray(file.convert("RGB"))}
    except (ImportError, OSError) as error:
        raise ValueError(
            f"cannot read the photographs of scikit-image, scikit-learn and matplotlib ({error}); "
            'install them with pip install -e ".[dev]", or use your own pictures: '
            "python -m distributed.demo --pictures DIR"
        ) from error
    found["motorcycle"] = {"picture": left, "disparity": disparity}
    return found


def own_pictures(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Pictures of a folder, at most `MOST_PICTURES`, scaled to at most `LONGEST` pixels.

    Raises:
        ValueError: too few, too small or unreadable pictures, or a folder that the demo removes.
    """
    if not folder.is_dir():
        raise ValueError(f"--pictures {folder} is not a folder")
    for own in (DATA, RUN):
        if own.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(
                f"--pictures {folder} is inside {own}, which the demo removes; copy it elsewhere"
            )
    names = layouts.pictures(str(folder))
    if len(names) < 3:
        raise ValueError(
            f"{folder} holds {len(names)} pictures ({', '.join(layouts.SUFFIXES)}), but at least 3 "
            "are needed: to train, to validate and to test on"
        )
    spread = np.linspace(0, len(names) - 1, min(len(names), MOST_PICTURES)).round().astype(int)
    found: dict[str, dict[str, np.ndarray]] = {}
    seen: dict[bytes, str] = {}
    for name in (names[at] for at in spread):
        picture = _read(folder / name)
        same = seen.setdefault(picture.tobytes(), name)
        if same != name:
            raise ValueError(
                f"{folder / name} and {same} are the same picture; remove one: no picture "
                "may be both trained on and tested on"
            )
        found[f"{len(found):03d}_{layouts.stem(name)}"] = {"picture": picture}
    return found


def split(names: Sequence[str]) -> Split:
    """Split pictures: the packaged ones as `TEST` and `VALIDATION` say.

    Of others one validates; a quarter tests, at most `MOST_TEST`.
    """
    if set(TEST + VALIDATION) <= set(names):
        validation, test = list(VALIDATION), list(TEST)
    else:
        count = min(MOST_TEST, max(1, len(names) // 4))
        every = len(names) / (count + 1)
        *test, last = (names[int((at + 0.5) * every)] for at in range(count + 1))
        validation = [last]
    held_out = {*validation, *test}
    return Split([name for name in names if name not in held_out], validation, test)


def _read(path: Path) -> np.ndarray:
    """One picture as RGB, upright, scaled down to at most `LONGEST` pixels."""
    try:
        colour = decoding.read(path).colour
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); repair or remove it") from error
    pixels = np.rint(colour * (255 / WHITE[colour.dtype])).astype(np.uint8)
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2))
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    if min(image.size) < SHORTEST:
        width, height = image.size
        raise ValueError(
            f"{path} is {width}x{height} pixels, but the demo needs {SHORTEST} on the shorter side "
            f"(at most {LONGEST} on the longer); remove it"
        )
    return np.asarray(image)


def _start_from_nothing() -> None:
    for folder in (DATA, RUN):
        if folder.exists():
            shutil.rmtree(folder)


def _write_pictures(pictures: Mapping[str, Mapping[str, np.ndarray]], names: Split) -> None:
    """Write PNGs: training and test pictures at several scales, the others as they are."""
    for side, own in names._asdict().items():
        folder = DATA / "pictures" / side
        folder.mkdir(parents=True, exist_ok=True)
        for name in own:
            for file, scale in _copies(side, name, min(pictures[name]["picture"].shape[:2])):
                _save(folder / file, pictures[name], scale)


def _copies(side: str, name: str, shorter: int) -> Iterator[tuple[str, float]]:
    """Name and scale of each copy of a picture whose shorter side is `shorter`.

    Test pictures have at least `SHORTEST` pixels, and come first in their own size: grids of a few
    rows then show different ones.
    """
    if side == "train":
        yield from ((f"{name}_{round(100 * scale):03d}", scale) for scale in SCALES)
        return
    yield name, 1.0
    if side == "test":
        for scale in TEST_SCALES[1:]:
            if scale * shorter >= SHORTEST:
                yield f"scaled_{round(100 * scale):03d}_{name}", scale


def _save(path: Path, picture: Mapping[str, np.ndarray], scale: float = 1.0) -> None:
    image = Image.fromarray(picture["picture"])
    size = (round(image.width * scale), round(image.height * scale))
    if scale != 1.0:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.save(path.with_name(path.name + ".png"))
    if "disparity" in picture:
        disparity = Image.fromarray(picture["disparity"].astype(np.float32))
        nearest = disparity.resize(size, Image.Resampling.NEAREST)
        np.save(path.with_name(path.name + ".disparity.npy"), np.asarray(nearest))


def _pack(console: Console, names: Split) -> None:
    from shards.packing import pack

    for number, side in enumerate(("train", "test", "validation")):
        folder, out = str(DATA / "pictures" / side), str(DATA / "shards" / side)
        manifest = pack(
            "clean", folder, out, synthesise=SYNTHESISED, severity=SEVERITY, seed=number
        )
        counts = ", ".join(f"{task} {count}" for task, count in manifest.counts.items())
        console.print(f"packed {out}: {counts}", highlight=False, soft_wrap=True)
    console.print(
        f"trains on:    {', '.join(names.train)}\nvalidates on: {', '.join(names.validation)}\n"
        f"held out:     {', '.join(names.test)}",
        highlight=False,
        soft_wrap=True,
    )


def _draw_curves() -> None:
    from distributed.figures import curves
    from distributed.mlflow_tracker import read_metrics

    records = read_metrics(RUN)
    if records:
        curves(records, RUN / "evaluation" / "curves.png")


def _log_evaluation(config: TrainConfig, outcome: Any, report: Any) -> None:
    from distributed import mlflow_tracker

    run = mlflow_tracker.Run(
        uri=outcome.tracking_uri,
        experiment=config.tracking.experiment,
        name=config.name,
        key=mlflow_tracker.run_key(outcome.folder),
        id=outcome.mlflow_run_id,
    )
    mlflow_tracker.log_artifacts(run, RUN / "evaluation", "evaluation")
    mlflow_tracker.annotate(run, {}, report.metrics("eval"), outcome.samples)


def _result(tasks: Mapping[str, Any], names: Split) -> Table:
    scales = ", ".join(f"{scale:g}" for scale in TEST_SCALES)
    view = Table(title=f"held-out pictures at scales {scales}: {', '.join(names.test)}")
    view.add_column("task")
    view.add_column("input PSNR -> restored PSNR", justify="right")
    view.add_column("gain in dB", justify="right")
    gains = []
    for task, row in tasks.items():
        gains.append(row.restored_psnr - row.input_psnr)
        change = f"{row.input_psnr:.2f} -> {row.restored_psnr:.2f}"
        view.add_row(task, change, f"{gains[-1]:+.2f}")
    view.add_section()
    view.add_row("mean of tasks", "", f"{np.mean(gains):+.2f}", style="bold")
    return view


def _write_summary(report: Any, run_id: str, seconds: Mapping[str, float | None]) -> None:
    summary = {
        "tasks": report.as_dict()["tasks"],
        "mlflow_run_id": run_id,
        "seconds": seconds,
        "protocol": report.protocol.describe(),
    }
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _where_to_look(
    console: Console, outcome: Any, page: Path, seconds: Mapping[str, float | None]
) -> None:
    from distributed.mlflow_tracker import run_page
    from distributed.train import ui_command

    worked = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value)
    lines = (
        f"page           {page}: sliders, maps of the experts, curves; open it in a browser",
        f"before/after   {RUN / 'evaluation' / 'grids' / 'overview.png'}, and others there",
        f"experts        {RUN / 'evaluation' / 'experts.png'}",
        f"curves         {RUN / 'evaluation' / 'curves.png'}",
        f"figures        {RUN / 'summary.json'}",
        f"MLflow         {ui_command(outcome.tracking_uri)}",
        f"  this run     {run_page(outcome.tracking_uri, outcome.mlflow_run_id)}",
        f"took           {worked}",
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _install_seconds() -> float | None:
    """Seconds of the installation, written by the Makefile; None if unknown."""
    try:
        return float((Path(sys.prefix) / ".installed").read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _timed(seconds: dict[str, float | None], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)


if __name__ == "__main__":
    sys.exit(main())
