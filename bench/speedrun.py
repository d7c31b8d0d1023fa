"""The speed run: how long training takes from nothing to a given PSNR on CBSD68, noise of sigma 25.

    python bench/speedrun.py --train SHARDS --test SHARDS [--recipe.samples 20000 ...]

Trains the preset `speedrun`, evaluates by the frozen protocol, and writes a record to
results/speedrun/. The clock starts with the command and stands still during validation. Packing is
not counted. docs/speedrun.md has the rules and the records.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.results import RESULTS  # noqa: E402
from bench.results import commit as commit_now  # noqa: E402
from distributed.presets import parse  # noqa: E402

MARKS = (30.0, 30.7, 31.0)
"""PSNR in dB. CBM3D reaches 30.71 (Dabov et al., 2007), DnCNN 31.24 (Zhang et al., 2017)."""
DEGRADATION = "denoise_25"
VALIDATED = "val_psnr/denoise"
"""Metric of the run; the preset validates `DEGRADATION` only."""
RECORDS = RESULTS / "speedrun"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, write the record; returns the exit code."""
    started, commit = time.time(), commit_now()
    given = list(sys.argv[1:] if argv is None else argv)
    config = parse(["speedrun", *_as_fields(given)], prog="python bench/speedrun.py")
    console = Console()
    if Path(config.folder).exists():
        console.print(
            f"error: {config.folder} exists, but a record begins from nothing; remove it, or give "
            "another --name",
            style="red",
            highlight=False,
        )
        return 2

    from distributed.launch import launch

    outcome = launch(config, console=console)
    if outcome.status != "finished":
        console.print(f"the training {outcome.status}: {outcome.reason or 'see above'}")
        return outcome.exit_code

    from distributed.evaluate import evaluate, load
    from distributed.mlflow_tracker import read_metrics

    report = evaluate(load(config.folder, "cpu"), config.data.validation, f"{config.folder}/test")
    curve = clock(read_metrics(config.folder), started)
    environment = json.loads(Path(config.folder, "environment.json").read_text())
    machine = environment["workers"][0]
    tested = report.as_dict()["degradations"][DEGRADATION]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "machine": {name: machine.get(name) for name in ("device", "processor", "cores", "torch")},
        "workers": config.scaling.workers,
        "samples": config.recipe.samples,
        "pictures": tested["pictures"],
        "psnr": tested["restored_psnr"],
        "ssim": tested["restored_ssim"],
        "input_psnr": tested["input_psnr"],
        "seconds": curve[-1]["seconds"],
        "seconds_to": {str(mark): seconds_to(curve, mark) for mark in MARKS},
        "curve": curve,
        "protocol": report.protocol.describe(),
        "command": "python bench/speedrun.py " + " ".join(given),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{record['date']}-{config.name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(table(record))
    console.print(
        f"CBSD68, sigma 25, {record['pictures']} pictures: {record['psnr']:.2f} dB",
        highlight=False,
    )
    console.print(f"record: {path}\nrun: {config.folder}", highlight=False)
    return 0


def _as_fields(given: Sequence[str]) -> list[str]:
    """`--train` and `--test` are short for the fields of the data."""
    short = {"--train": "--data.train", "--test": "--data.validation"}
    return [short.get(argument, argument) for argument in given]


def clock(records: Sequence[Mapping[str, Any]], started: float) -> list[dict[str, float]]:
    """Samples, seconds of training and PSNR at each validation.

    Args:
        records: of the run's metrics.
        started: when the command began, in seconds since the epoch.
    """
    curve, validating = [], 0.0
    ends: dict[int, float] = {}
    psnr: dict[int, float] = {}
    took: dict[int, float] = {}
    for record in records:
        at = int(record["step"])
        metrics = record["metrics"]
        if VALIDATED in metrics:
            psnr[at], ends[at] = metrics[VALIDATED], record["time"] / 1000
        if "speed/validate_s" in metrics:
            took[at] = metrics["speed/validate_s"]
    for at in sorted(psnr):
        validating += took[at]
        seconds = ends[at] - started - validating
        curve.append({"samples": at, "seconds": round(seconds, 1), "psnr": round(psnr[at], 3)})
    return curve


def seconds_to(curve: Sequence[Mapping[str, float]], mark: float) -> float | None:
    """Seconds of the first validation with at least `mark` dB; None: never."""
    return next((point["seconds"] for point in curve if point["psnr"] >= mark), None)


def table(record: Mapping[str, Any]) -> Table:
    """The record for the terminal."""
    view = Table()
    view.add_column("PSNR")
    view.add_column("minutes", justify="right")
    for mark, seconds in record["seconds_to"].items():
        view.add_row(f"{mark} dB", f"{seconds / 60:.1f}" if seconds else "not reached")
    view.add_row("whole run", f"{record['seconds'] / 60:.1f}")
    return view


if __name__ == "__main__":
    raise SystemExit(main())
