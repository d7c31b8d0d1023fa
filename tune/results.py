"""What happens when trials end: read their figures, delete checkpoints that are not needed, keep
the best trial, and send the result to MLflow and the report."""

import dataclasses
import math
import shlex
from typing import TYPE_CHECKING, Any

from distributed import checkpoint as checkpoints
from distributed import mlflow_tracker
from distributed.config import TrainConfig, to_yaml
from distributed.lease import in_use
from measnet.config import replace_dotted
from shards.storage import exists, join, local_copy, open_folder, read_json, write_whole
from tune.config import SearchConfig
from tune.record import FILE, SearchRecord, TrialRecord, is_number
from tune.registry import register_champion
from tune.space import describe

if TYPE_CHECKING:
    from rich.console import Console

BEST_CONFIG = "best.yaml"
WORTH = "evaluation/routing-fixed-pixel.json"
"""What `python -m distributed.evaluate TRIAL DATA --routing fixed` writes."""
CHAMPION = "champion.safetensors"
REPORT = "report.html"


def refresh(trial: TrialRecord) -> None:
    """Read the trial's samples and figures from its newest checkpoint.

    Each checkpoint has all validations before it, so none is lost if the search was killed before
    the trial reported one.
    """
    state = checkpoints.newest_state(trial.folder)
    if state is None:
        return
    # With PBT a trial may have gone back to fewer samples: what it had beyond them is no longer so.
    taken = trial.inherited[-1]["samples"] if trial.inherited else math.inf
    kept = {samples: psnr for samples, psnr in trial.curve if samples <= taken}
    curve = {int(s): float(p) for s, p in state.validations if is_number(p)} | kept
    trial.curve = sorted(curve.items())
    trial.samples = state.samples if trial.inherited else max(trial.samples, state.samples)
    trial.psnr = trial.curve[-1][1] if trial.curve else None
    trial.mlflow_run_id = state.mlflow_run_id or trial.mlflow_run_id
    if report := state.validation.get("report"):
        trial.tasks = {task: row["restored_psnr"] for task, row in report["tasks"].items()}
        trial.routing = report["routing"]
        trial.input_psnr, trial.gain_error = report["mean"]["input_psnr"], report["gain_error"]
    fs, root = open_folder(trial.folder)
    if fs.exists(f"{root}/{WORTH}"):
        trial.choice_worth = read_json(fs, f"{root}/{WORTH}")["worth"]["mean"]


def open_summary(config: SearchConfig, record: SearchRecord) -> mlflow_tracker.Run:
    """The search's own run in MLflow; its id is empty if MLflow does not answer."""
    run = mlflow_tracker.prepare(
        config.train.tracking,
        name=record.name,
        key=mlflow_tracker.run_key(record.folder),
        tags={"measnet.kind": "search", "measnet.search": record.name},
    )
    record.mlflow_run_id = run.id
    return run


def prune_losers(record: SearchRecord, keep: int) -> None:
    """Delete the checkpoints of ended trials that are neither among the best `keep` nor on the
    front.

    A failed trial keeps its own for `--retry-failed`, unless it diverged.
    """
    record.rank()
    kept = record.kept(keep)
    for trial in record.trials:
        can_retry = trial.state == "failed" and trial.cause != "diverged"
        if not trial.ended or trial.number in kept or can_retry or trial.name in record.pruned:
            continue
        if in_use(trial.folder):
            continue  # its run still writes
        fs, root = open_folder(trial.folder)
        if fs.exists(f"{root}/checkpoints"):
            fs.rm(f"{root}/checkpoints", recursive=True)
        record.pruned.append(trial.name)


def write_results(config: SearchConfig, record: SearchRecord, console: "Console") -> None:
    """Complete the record, the best trial's files, MLflow and the report; may be called again."""
    from tune.report import write

    for trial in record.trials:
        if trial.ended:
            refresh(trial)
    fs, root = open_folder(record.folder)
    if record.state == "finished":
        prune_losers(record, config.keep)
        if fs.exists(f"{root}/tune"):  # Ray Tune's own files
            fs.rm(f"{root}/tune", recursive=True)
    record.rank()
    _write_best(config, record)
    record.save()
    summary = _send_to_mlflow(config, record)
    record.save()
    write(record, join(record.folder, REPORT))
    if summary is not None:
        for name in (REPORT, FILE, BEST_CONFIG):
            if fs.exists(f"{root}/{name}"):
                with local_copy(join(record.folder, name)) as path:
                    mlflow_tracker.log_artifacts(summary, path)
        mlflow_tracker.finish(summary, "FINISHED" if record.state == "finished" else "KILLED")
    _show_summary(record, console)


def best_config(config: SearchConfig, trial: TrialRecord) -> TrainConfig:
    """The trial's values at the full length of the preset."""
    train = replace_dotted(config.train, trial.changes)
    return dataclasses.replace(train, name=f"{config.train.name}-best")


def model_card(record: SearchRecord, trial: TrialRecord) -> str:
    """The best trial in Markdown: its values, its figures, and the protocol."""
    lines = [
        f"# {trial.name}",
        "",
        f"Best of {len(record.finished)} finished trials of the search `{record.name}`.",
        "",
        f"* values: {describe(trial.changes)}",
        f"* validation PSNR: {trial.title}, mean over tasks, after {trial.samples:,} samples",
        *(f"    * {task}: {psnr:.2f} dB" for task, psnr in trial.tasks.items()),
        f"* PSNR of the degraded pictures: {trial.input_psnr or 0:.2f} dB",
        f"* parameters: {trial.costs.get('parameters', 0):,.0f}",
        f"* multiply-adds of 256x256: {trial.costs.get('multiply_adds', 0) / 1e9:.2f} G",
        "",
        "PSNR in RGB, range [0, 1], no border cut, on whole pictures of "
        f"`{record.config['train']['data']['validation']}`, averaged weights.",
        "",
        f"At full length: `{record.best_command}`",
    ]
    return "\n".join(lines)


def _write_best(config: SearchConfig, record: SearchRecord) -> None:
    """best.yaml and the best trial's weights."""
    if record.best is None:
        return
    fs, root = open_folder(record.folder)
    write_whole(fs, f"{root}/{BEST_CONFIG}", to_yaml(best_config(config, record.best)).encode())
    path = shlex.quote(f"{record.folder}/{BEST_CONFIG}")
    record.best_command = f"python -m distributed.train --config {path}"
    newest = checkpoints.newest_complete(record.best.folder)
    if newest is not None:
        newest.export(fs, f"{root}/{CHAMPION}")


def _send_to_mlflow(config: SearchConfig, record: SearchRecord) -> mlflow_tracker.Run | None:
    """How the trials ended, the summary, and the best model; returns the run of the summary.

    If MLflow does not answer, everything is on disk, and the same command sends it later.
    """
    summary = open_summary(config, record)
    if not summary.id:
        return None
    for trial in record.trials:
        fs, root = open_folder(trial.folder)
        if (
            trial.ended
            and fs.exists(f"{root}/{mlflow_tracker.KEY_FILE}")
            and not _finish_trial(config, record, trial)
        ):
            return None  # MLflow stopped answering: do not wait for it once per trial
    best = record.best
    if best is not None:
        text = model_card(record, best)
        mlflow_tracker.annotate(
            summary,
            {"measnet.champion": best.name, "mlflow.note.content": text},
            {
                "search/best_psnr": best.psnr or 0.0,
                "search/trials": float(len(record.trials)),
                "search/finished": float(len(record.finished)),
                "search/samples": float(record.samples),
                "search/seconds": record.seconds,
            },
        )
        weights = join(record.folder, CHAMPION)
        if record.state == "finished" and exists(weights):
            with local_copy(weights) as path:
                register_champion(config, record, best, path, text)
    return summary


def _finish_trial(config: SearchConfig, record: SearchRecord, trial: TrialRecord) -> bool:
    """End one trial's run in MLflow; False if MLflow does not answer."""
    key = mlflow_tracker.run_key(trial.folder)
    run = mlflow_tracker.prepare(config.train.tracking, name=trial.name, key=key)
    if not run.id:
        return False
    trial.mlflow_run_id = run.id
    status: Any = {"finished": "FINISHED", "stopped": "KILLED"}.get(trial.state, "FAILED")
    mlflow_tracker.finish(run, status, trial.folder)
    return mlflow_tracker.annotate(
        run,
        {
            "measnet.state": trial.state,
            "measnet.reason": trial.reason,
            "measnet.on_front": str(trial.number in record.front).lower(),
        },
        {f"cost/{name}": value for name, value in trial.costs.items()},
    )


def _show_summary(record: SearchRecord, console: "Console") -> None:
    console.print(f"{record.state}: {record.counts}")
    if record.best is not None:
        label = record.best.label or describe(record.best.changes)
        console.print(f"  best      {label}: {record.best.title}", soft_wrap=True, markup=False)
        if noise := noise_warning(record.best):
            console.print(f"  [yellow]warning[/yellow]   {noise}", soft_wrap=True)
        console.print(f"  in full   {record.best_command}", soft_wrap=True)
    if record.registration:
        console.print(f"  registry  {record.registration}", soft_wrap=True, highlight=False)
    console.print(f"  report    {record.folder}/{REPORT}", soft_wrap=True)
    if record.state == "stopped":
        console.print(f"  resume    {record.command}", soft_wrap=True)


def noise_warning(best: TrialRecord) -> str:
    """A warning if the best trial is not clearly better than the degraded pictures; else empty."""
    known = best.gain()
    if known is None or known[1]:
        return ""
    error = f"±{2 * best.gain_error:.2f}" if best.gain_error is not None else "unknown"
    return (
        f"the best trial gains {known[0]:+.2f} dB over the degraded pictures "
        f"({best.input_psnr:.2f} dB), which is not above noise ({error} dB): train longer "
        "(--samples) before you compare trials"
    )
