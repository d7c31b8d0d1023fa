"""Search: `python -m tune.search [PRESET | --config FILE.yaml] [--option value ...]`.

Each trial is a full training run of `distributed.launch` under Ray Tune. The state of the search is
in STORAGE/NAME/search.json; the same command resumes the search from it.
"""

import dataclasses
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.config import changed_fields
from distributed.lease import exclusive
from shards.wording import counted
from tune.config import SearchConfig, parse
from tune.record import SearchRecord, load
from tune.space import Space, build, symbol

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search of the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(arguments)
    from rich.console import Console

    command = f"python -m tune.search {shlex.join(arguments)}".strip()
    try:
        record = search(config, command, console=Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return {"finished": 0, "stopped": 130}.get(record.state, 1)


def search(config: SearchConfig, command: str = "", *, console: "Console") -> SearchRecord:
    """Run a search to its end, or until it is stopped, and write its report.

    Raises:
        ValueError: ranges, shards or resources that do not work, or a search of the same name that
            was started with other values.
    """
    from distributed.cluster import ray_cluster
    from distributed.launch import check
    from distributed.mlflow_tracker import tracking_uri
    from tune.results import open_summary, write_results

    config = _with_absolute_paths(config, tracking_uri(config.train.tracking))
    space = build(config.space, config.vary, config.base())
    with exclusive(config.folder):
        record = _open_record(config, command, space)
        started = time.monotonic()
        total = len(space.points) or config.trials
        left = total - sum(trial.ended for trial in record.trials)
        if left > 0:
            from distributed.internals import ray_tune

            check(config.base())
            if warning := ray_tune.configure():
                console.print(f"[yellow]warning[/yellow]: {warning}")
            open_summary(config, record)  # one process creates the database, before there are many
            console.print(
                f"[bold]{record.name}[/bold]: {_plan_line(config, space, left)}", soft_wrap=True
            )
            with ray_cluster(config.base(), console):
                record.state = "running"
                _run_trials(config, space, record, total, console)
        else:
            console.print(f"{record.folder} is finished: {counted(len(record.trials), 'trial')}")
        ended = sum(trial.ended for trial in record.trials)
        record.state = "finished" if ended >= total else "stopped"
        record.seconds += time.monotonic() - started
        write_results(config, record, console)
    return record


def _with_absolute_paths(config: SearchConfig, uri: str) -> SearchConfig:
    from distributed.launch import resolve

    train = resolve(config.train)
    tracking = dataclasses.replace(train.tracking, uri=uri)
    return dataclasses.replace(config, train=dataclasses.replace(train, tracking=tracking))


def _open_record(config: SearchConfig, command: str, space: Space) -> SearchRecord:
    """The record of the folder, or a new one.

    Raises:
        ValueError: the folder's search has other values, so its trials would not be comparable.
    """
    from measnet.config import to_dict
    from shards.manifest import read as read_manifest
    from tune.results import refresh

    record = load(config.folder)
    data = read_manifest(config.train.data.validation).fingerprint
    if record is None:
        return SearchRecord(
            name=config.train.name,
            config=to_dict(config),
            command=command,
            budget=config.budget,
            cost=config.cost,
            validation_data=data,
            space=space.as_dict(),
            folder=config.folder,
        )
    fixed = {"train.every.validation_pictures"}
    changed = changed_fields(record.config, config, fixed=fixed)
    if data != record.validation_data:
        changed.append(f"other validation pictures ({config.train.data.validation})")
    if record.space not in (None, space.as_dict()):
        changed.append(f"other ranges ({', '.join((*config.space, *config.vary))})")
    record.space = space.as_dict()
    if changed:
        raise ValueError(
            f"{config.folder} was started with {'; '.join(changed)}. "
            "Use those values to resume it, or another --name to start a new search"
        )
    for trial in record.trials:
        if trial.state == "running" or (trial.state == "failed" and config.retry_failed):
            trial.state, trial.reason, trial.cause = "waiting", "", ""
        if trial.state == "waiting":
            refresh(trial)
    record.config, record.command = to_dict(config), command or record.command
    return record


def _plan_line(config: SearchConfig, space: Space, left: int) -> str:
    what = (
        f"{len(space.points)} fixed points"
        if space.points
        else ", ".join(symbol(p.field) for p in space.parameters)
    )
    cost = "" if config.cost == "none" else f", {config.cost} down"
    how = "all to the end" if config.fixed else f"{config.algorithm}, {config.scheduler}"
    return f"{left} trials to go, {config.budget:,} samples each, over {what}; PSNR up{cost}; {how}"


def _run_trials(
    config: SearchConfig, space: Space, record: SearchRecord, total: int, console: "Console"
) -> None:
    """Let Ray Tune run what is left, until the end or a signal."""
    import ray

    from distributed.cluster import is_local, wait_for_resources
    from distributed.internals import ray_tune
    from distributed.stopping import on_signal
    from tune.capacity import needed, plan_capacity
    from tune.runner import Search, make_tuner

    signals: list[str] = []
    if not is_local():
        workers, wanted = needed(config)
        with on_signal(signals.append):
            wait_for_resources(
                workers, wanted, config.train.scaling, console, lambda: bool(signals)
            )
    if signals:
        return
    capacity = plan_capacity(config, [n["Resources"] for n in ray.nodes() if n["Alive"]])
    console.print(capacity.describe())
    with tempfile.TemporaryDirectory(prefix="measnet-search-") as folder:
        stop_file = Path(folder) / "stop"
        running = Search(config, space, record, total, console, capacity, stop_file)
        tuner = make_tuner(running, ray_tune.this_node())
        failed: list[BaseException] = []

        def run() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failed.append(error)

        def stop(name: str) -> None:
            """The first signal lets the trials write a checkpoint; the second does not wait."""
            signals.append(name)
            stop_file.touch()
            line = f"{name}: trials write a last checkpoint; repeat it to end at once\n"
            os.write(1, line.encode())  # not the console: the interrupted code may hold its lock

        # In a thread of its own, because Ray Tune handles Ctrl-C differently in a main thread.
        thread = threading.Thread(target=run, name="tune", daemon=True)
        with on_signal(stop):
            thread.start()
            while thread.is_alive() and len(signals) < 2:
                thread.join(0.3)
        record.save()
        if failed:
            raise failed[0]


if __name__ == "__main__":
    sys.exit(main())
