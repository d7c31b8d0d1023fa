"""Search: `python -m tune.search [PRESET | --config FILE.yaml] [--option value ...]`.

Each trial is a full training run of `distributed.launch` under Ray Tune. Everything that is known
lies in STORAGE/NAME/search.json; the same command goes on from there.
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

from tune.config import SearchConfig, comparable, parse
from tune.owner import ownership
from tune.record import Record, load
from tune.space import Space, build

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the command line says; returns the exit code."""
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


def search(config: SearchConfig, command: str = "", *, console: "Console") -> Record:
    """Run a search to its end, or as far as it gets, and write its page.

    Raises:
        ValueError: a search that cannot be: ranges, shards, resources, or one of the same name
            that was started otherwise.
    """
    config = _resolve(config)
    space = build(config.space, config.vary, config.base())
    with ownership(config.folder):
        return _search(config, space, command, console)


def _search(config: SearchConfig, space: Space, command: str, console: "Console") -> Record:
    from distributed.launch import ray_cluster
    from tune.conclude import conclude, open_summary

    record = _open(config, space, command)
    started = time.monotonic()
    total = len(space.points) or config.trials
    if left := total - sum(row.ended for row in record.rows):
        _check_run(config)
        # A trial is several small processes, and Ray would warn of each that it starts.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        open_summary(config, record)  # one process creates the database, before there are several
        console.print(f"[bold]{record.name}[/bold]: {_summary(config, space, left)}")
        with ray_cluster(config.base(), console):
            record.state = "running"
            _run(config, space, record, total, console)
    else:
        console.print(f"{record.folder} is finished: {len(record.rows)} trials")
    record.state = "finished" if sum(r.ended for r in record.rows) >= total else "stopped"
    record.seconds += time.monotonic() - started
    conclude(config, space, record, console)
    return record


def _resolve(config: SearchConfig) -> SearchConfig:
    """Absolute places, for trials run in folders of their own."""
    from distributed.launch import resolve
    from distributed.mlflow_tracker import tracking_uri

    train = resolve(config.train)
    tracking = dataclasses.replace(train.tracking, uri=tracking_uri(train.tracking))
    return dataclasses.replace(config, train=dataclasses.replace(train, tracking=tracking))


def _check_run(config: SearchConfig) -> None:
    from distributed.launch import check

    check(config.base())


def _open(config: SearchConfig, space: Space, command: str) -> Record:
    """The record that is there, or a new one; refuses to mix different searches."""
    from measnet.config import from_dict, to_dict
    from tune.conclude import complete_curve

    record = load(config.folder)
    if record is None:
        return Record(
            name=config.train.name,
            config=to_dict(config),
            command=command,
            budget=config.budget,
            cost=config.cost,
            folder=config.folder,
            tracking_uri=config.train.tracking.uri,
        )
    before, now = comparable(from_dict(SearchConfig, record.config)), comparable(config)
    changed = [f"{k} {before[k]} (now {v})" for k, v in now.items() if before.get(k) != v]
    if changed:
        raise ValueError(
            f"{config.folder} was started with {'; '.join(changed)}. "
            "Take those values to go on with it, or another --name to start a new search"
        )
    for row in record.rows:
        if row.state == "running" or (row.state == "failed" and config.retry_failed):
            row.state, row.reason = "waiting", ""
        if row.state == "waiting":
            complete_curve(row)
    record.config, record.command = to_dict(config), command or record.command
    return record


def _summary(config: SearchConfig, space: Space, left: int) -> str:
    from tune.space import symbol

    what = (
        f"{len(space.points)} fixed points"
        if space.points
        else ", ".join(symbol(p.field) for p in space.parameters)
    )
    cost = "" if config.cost == "none" else f", {config.cost} down"
    return f"{left} trials to go, {config.budget:,} samples each, over {what}; PSNR up{cost}; " + (
        "all to the end" if config.fixed else f"{config.algorithm}, {config.scheduler}"
    )


def _run(
    config: SearchConfig, space: Space, record: Record, total: int, console: "Console"
) -> None:
    """Have Ray Tune run what is left, until the end or a signal."""
    import ray

    from distributed.launch import on_signal
    from tune.resources import fit
    from tune.tuner import Live, make_tuner

    room = fit(config, [n["Resources"] for n in ray.nodes() if n["Alive"]])
    console.print(room.describe())
    with tempfile.TemporaryDirectory(prefix="measnet-search-") as folder:
        live = Live(config, space, record, total, console, room, Path(folder) / "stop")
        tuner = make_tuner(live)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="tune", daemon=True)

        def stop(name: str) -> None:
            """The first has the trials write a checkpoint and end; a second one does not wait."""
            live.signals += 1
            live.stop_file.touch()
            # Not by the console, which may be locked by what was interrupted.
            line = f"{name}: trials write a last checkpoint; once more ends at once\n"
            os.write(1, line.encode())

        with on_signal(stop):
            thread.start()
            while thread.is_alive() and live.signals < 2:
                thread.join(0.3)
        record.save()
        if failed:
            raise failed[0]


if __name__ == "__main__":
    sys.exit(main())
