"""What happens when trials end: figures taken in, losers' checkpoints deleted, the best kept,
MLflow completed, the page written."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import checkpoint as checkpoints
from distributed import tracking
from distributed.config import TrackingConfig, TrainConfig, to_yaml
from shards.storage import open_folder, write_whole
from tune.config import SearchConfig
from tune.owner import OWNER
from tune.record import Record, Row, is_number
from tune.space import Space, apply, describe
from tune.trial import read_outcome

if TYPE_CHECKING:
    from rich.console import Console

BEST_CONFIG = "best.yaml"
CHAMPION = "champion.safetensors"


def refresh(row: Row) -> None:
    """Take in what the trial's run said at its end."""
    complete_curve(row)
    outcome = read_outcome(row.folder)
    validation = outcome.get("validation") or {}
    row.samples = max(row.samples, int(outcome.get("samples", 0)))
    row.mlflow_run_id = outcome.get("mlflow_run_id") or row.mlflow_run_id
    if validation.get("at") == row.samples or row.state == "finished":
        report = validation.get("report") or {}
        row.tasks = {t: s["restored_psnr"] for t, s in report.get("tasks", {}).items()}
        row.routing = report.get("routing", {})
        if is_number(validation.get("psnr")):
            row.validated(int(validation["at"]), float(validation["psnr"]))


def complete_curve(row: Row) -> None:
    """Take in validations whose report was lost because the search was killed just then.

    Rank 0 writes them into the run's folder before anybody else hears of them.
    """
    _, root = open_folder(row.folder)
    if not Path(root).is_absolute():
        return  # not a folder but a URI: the file lies with the worker
    found = {
        int(record["step"]): float(record["metrics"]["val_psnr/mean"])
        for record in tracking.read_metrics(Path(root))
        if is_number(record["metrics"].get("val_psnr/mean"))
    }
    row.curve = sorted({**found, **dict(row.curve)}.items())
    if row.curve and row.curve[-1][0] > row.samples:
        row.samples, row.psnr = row.curve[-1]


def open_summary(config: SearchConfig, record: Record) -> tracking.Run:
    """The search's own run in MLflow; without an id where MLflow does not answer."""
    run = tracking.prepare(
        config.train.tracking,
        name=record.name,
        key=tracking.run_key(record.folder),
        tags={"measnet.kind": "search", "measnet.search": record.name},
    )
    record.mlflow_run_id = run.id
    return run


def prune_losers(record: Record, keep: int) -> None:
    """Delete the checkpoints of ended trials that are not among the best `keep`, nor on the front.

    A trial that failed keeps its last ones, for `--retry-failed`, unless it diverged.
    """
    record.rank()
    kept = {row.number for row in record.best(keep)}
    for row in record.rows:
        crashed = row.state == "failed" and not row.reason.startswith("diverged")
        if not row.ended or row.number in kept or crashed or row.name in record.pruned:
            continue
        fs, root = open_folder(row.folder)
        if fs.exists(f"{root}/{OWNER}"):
            continue  # its run is still writing
        if fs.exists(f"{root}/checkpoints"):
            fs.rm(f"{root}/checkpoints", recursive=True)
        record.pruned.append(row.name)


def conclude(config: SearchConfig, space: Space, record: Record, console: "Console") -> None:
    """Complete the record, the champion, MLflow and the page; may be done again."""
    for row in record.rows:
        if row.ended:
            refresh(row)
    if record.state == "finished":
        _clear(record, config.keep)
    record.rank()
    _write_best(config, record)
    record.save()
    _to_mlflow(config, record)
    record.save()
    page = _page(record)
    if page is not None:
        _page_to_mlflow(record, config, page)
    _say(record, console)


def best_config(config: SearchConfig, row: Row) -> TrainConfig:
    """The champion's values at the full length of the preset."""
    train = apply(config.train, row.changes)
    return dataclasses.replace(train, name=f"{config.train.name}-best")


def card(record: Record, row: Row) -> str:
    """The champion in Markdown: what it is, what it reached, by which protocol."""
    lines = [
        f"# {row.name}",
        "",
        f"Best of {len(record.finished)} finished trials of the search `{record.name}`.",
        "",
        f"* values: {describe(row.changes)}",
        f"* validation PSNR: {row.psnr:.2f} dB, mean over tasks, after {row.samples:,} samples",
        *(f"    * {task}: {psnr:.2f} dB" for task, psnr in row.tasks.items()),
        f"* parameters: {row.costs.get('parameters', 0):,.0f}",
        f"* multiply-adds of 256x256: {row.costs.get('multiply_adds', 0) / 1e9:.2f} G",
        "",
        "PSNR in RGB, range [0, 1], no border cut, on whole pictures of "
        f"`{record.config['train']['data']['validation']}`, averaged weights.",
        "",
        f"At full length: `{record.best_command}`",
    ]
    return "\n".join(lines)


def _clear(record: Record, keep: int) -> None:
    """The search is over: nobody writes any more, and Tune's own files are of no use."""
    for row in record.rows:
        fs, root = open_folder(row.folder)
        if fs.exists(f"{root}/{OWNER}"):
            fs.rm(f"{root}/{OWNER}")
    prune_losers(record, keep)
    fs, root = open_folder(record.folder)
    if fs.exists(f"{root}/tune"):
        fs.rm(f"{root}/tune", recursive=True)


def _write_best(config: SearchConfig, record: Record) -> None:
    """best.yaml and the champion's weights."""
    if record.champion is None:
        return
    row = record.rows[record.champion]
    fs, root = open_folder(record.folder)
    write_whole(fs, f"{root}/{BEST_CONFIG}", to_yaml(best_config(config, row)).encode())
    place = shlex.quote(f"{record.folder}/{BEST_CONFIG}")
    record.best_command = f"python -m distributed.train --config {place}"
    newest = checkpoints.newest_whole(row.folder)
    if newest is not None:
        newest.export(fs, f"{root}/{CHAMPION}")


def _to_mlflow(config: SearchConfig, record: Record) -> None:
    """Terminal states and reasons of the trials, the summary run, the champion.

    Where MLflow does not answer, everything stays on disk; the same command again sends it.
    """
    settings = config.train.tracking
    summary = open_summary(config, record)
    if not summary.id:
        return
    for row in record.rows:
        fs, root = open_folder(row.folder)
        known = row.ended and fs.exists(f"{root}/{tracking.KEY_FILE}")
        if known and not _finish_trial(settings, record, row):
            return  # gone meanwhile: no waiting for it once per trial
    if record.champion is not None:
        best = record.rows[record.champion]
        tracking.annotate(
            summary,
            {"measnet.champion": best.name, "mlflow.note.content": card(record, best)},
            {
                "search/best_psnr": best.psnr or 0.0,
                "search/trials": float(len(record.rows)),
                "search/finished": float(len(record.finished)),
                "search/samples": float(record.samples),
                "search/seconds": record.seconds,
            },
        )
        if config.register and record.state == "finished":
            _register(settings, config, record, best)


def _finish_trial(settings: TrackingConfig, record: Record, row: Row) -> bool:
    """One trial's end and reason; False where MLflow does not answer."""
    run = tracking.prepare(settings, name=row.name, key=tracking.run_key(row.folder))
    if not run.id:
        return False
    row.mlflow_run_id = run.id
    status: Any = {"finished": "FINISHED", "stopped": "KILLED"}.get(row.state, "FAILED")
    _, root = open_folder(row.folder)
    tracking.finish(run, status, Path(root) if Path(root).is_absolute() else None)
    return tracking.annotate(
        run,
        {
            "measnet.state": row.state,
            "measnet.reason": row.reason,
            "measnet.on_front": str(row.number in record.front).lower(),
        },
        {f"cost/{name}": value for name, value in row.costs.items()},
    )


def _register(settings: TrackingConfig, config: SearchConfig, record: Record, best: Row) -> None:
    """The champion's model under the alias `champion`, once."""
    _, root = open_folder(record.folder)
    weights, done = Path(root) / CHAMPION, Path(root) / ".registered"
    if not weights.exists() or (done.exists() and done.read_text() == best.name):
        return
    run = tracking.prepare(settings, name=best.name, key=tracking.run_key(best.folder))
    if (
        run.id
        and tracking.log_model(run, weights)
        and tracking.register(run, config.register, "champion", card(record, best))
    ):
        tracking.finish(run, "FINISHED")
        done.write_text(best.name)


def _page(record: Record) -> Path | None:
    from tune.report import write

    _, root = open_folder(record.folder)
    if not Path(root).is_absolute():
        return None
    return write(record, Path(root) / "report.html")


def _page_to_mlflow(record: Record, config: SearchConfig, page: Path) -> None:
    if not record.mlflow_run_id:
        return
    run = open_summary(config, record)
    for path in (page, page.with_name("search.json"), page.with_name(BEST_CONFIG)):
        if path.exists():
            tracking.log_artifacts(run, path)
    status: Any = "FINISHED" if record.state == "finished" else "KILLED"
    tracking.finish(run, status)


def _say(record: Record, console: "Console") -> None:
    states = [row.state for row in record.rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    console.print(f"{record.state}: {counts or 'no trial'}")
    if record.champion is not None:
        best = record.rows[record.champion]
        console.print(
            f"  best      {best.label or describe(best.changes)}: {best.psnr:.2f} dB",
            soft_wrap=True,
        )
        console.print(f"  in full   {record.best_command}", soft_wrap=True)
    console.print(f"  report    {record.folder}/report.html", soft_wrap=True)
    if record.state == "stopped":
        console.print(f"  go on     {record.command}", soft_wrap=True)
