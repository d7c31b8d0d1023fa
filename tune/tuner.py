"""Ray Tune's part of a search: proposals in, events out.

Tune schedules, stops and pauses trials. What it would keep of its own in pickles is not used: the
record is written at every event, and a search that goes on hands the schedulers what they saw.
"""

import dataclasses
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from distributed.launch import ray_storage
from distributed.monitor import free_resources
from measnet.config import to_dict
from tune.conclude import prune_losers, refresh
from tune.config import SearchConfig
from tune.propose import propose
from tune.record import Record, Row
from tune.resources import Room
from tune.space import Changes, Space, describe
from tune.trial import SPEC, Trial, take_failure

if TYPE_CHECKING:
    from rich.console import Console

HEAD = "node:__internal_head__"


def trial_resources(parallel: int) -> dict[str, float]:
    """What a trial takes: its part of the head node, where its small files lie, and no CPU, or
    trials would hold what their own workers wait for.

    A thousandth of the head node per trial stays free, or Ray Train's own helpers would not start,
    and the trial would wait for them for ever.
    """
    return {HEAD: max(1, int(10_000 * (1 - 0.002 * parallel) / parallel)) / 10_000}


@dataclasses.dataclass
class Live:
    """What the parts of a running search share."""

    config: SearchConfig
    space: Space
    record: Record
    total: int
    console: "Console"
    room: Room
    stop_file: Path
    signals: int = 0

    def say(self, row: Row, text: str) -> None:
        """A line about a trial."""
        label = row.label or describe(row.changes)
        self.console.print(f"{row.number:3d}  {label}  {text}", soft_wrap=True)


def trial_spec(live: Live, row: Row) -> dict[str, Any]:
    """All that a trial's actor needs to know, as plain data."""
    base, room = live.config.base(), live.room
    scaling = dataclasses.replace(
        base.scaling, cpus_per_worker=room.cpus, device="gpu" if room.gpu else "cpu"
    )
    return {
        "name": row.name,
        "base": to_dict(dataclasses.replace(base, scaling=scaling)),
        "changes": row.changes,
        "options": {
            "cost": live.config.cost,
            "cpus": room.cpus,
            "gpu": room.gpu,
            "stop_file": str(live.stop_file),
            "tags": {"measnet.kind": "trial", "measnet.search": live.record.name},
        },
    }


class Proposals(Searcher):
    """Waiting trials first, then new ones, in the order of their numbers."""

    def __init__(self, live: Live) -> None:
        """Propose for this search."""
        super().__init__(metric="psnr", mode="max")
        self._live = live
        self._waiting = [row for row in live.record.rows if row.state == "waiting"]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the record is the state."""
        return {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Known already."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, or that there is none."""
        row = None if self._live.signals else self.next_row()
        return Searcher.FINISHED if row is None else {SPEC: trial_spec(self._live, row)}

    def next_row(self) -> Row | None:
        """The next trial; a new one is entered into the record."""
        if self._waiting:
            return self._waiting.pop(0)
        return self._new_row() if len(self._live.record.rows) < self._live.total else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The record tells."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the record is the state."""

    def _new_row(self) -> Row:
        record, number = self._live.record, len(self._live.record.rows)
        name = f"{record.name}-{number:03d}"
        row = Row(
            number=number,
            name=name,
            changes=propose(self._live.space, record.rows, self._live.config),
            label=self._live.space.points[number].label if self._live.space.points else "",
            folder=f"{record.folder}/trials/{name}",
        )
        record.rows.append(row)
        record.save()
        return row


class Events(tune.Callback):
    """Writes what happens into the record, and shows it."""

    def __init__(self, live: Live) -> None:
        """Watch this search."""
        self._live = live
        self._since: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the record is the state."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its actor lives; after PBT took over another's weights, with other values."""
        row = self._row(trial)
        changes = trial.config[SPEC]["changes"]
        if changes != row.changes:
            row.inherited.append({"samples": row.samples, "changes": dict(changes)})
            row.changes = dict(changes)
            self._live.say(row, f"took over better weights at {row.samples:,} samples")
        elif row.state == "waiting":
            self._live.say(row, "starts" if not row.samples else f"goes on at {row.samples:,}")
        row.state = "running"
        self._since[row.name] = time.monotonic()
        self._live.record.save()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation."""
        row = self._row(trial)
        self._take(row, result)
        self._live.record.save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It ran to its end, or was stopped by the scheduler or by the user."""
        row, live = self._row(trial), self._live
        if trial.last_result.get("interrupted"):
            row.state = "waiting"
        elif row.samples >= live.config.budget:
            row.state = "finished"
            live.say(row, f"finished with {_db(row)}")
        else:
            row.state = "stopped"
            row.reason = (
                f"ASHA: not among the best 1/{live.config.reduction} at {row.samples:,} samples"
            )
            live.say(row, f"stopped at {row.samples:,} samples with {_db(row)}")
        self._end(row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It failed; the search goes on."""
        row = self._row(trial)
        row.state = "failed"
        row.reason = take_failure(row.folder) or f"its process was lost; {free_resources()}"
        self._live.say(row, f"[red]failed[/red]: {row.reason}")
        self._end(row)

    def _row(self, trial: Any) -> Row:
        return self._live.record.row(str(trial))

    def _take(self, row: Row, result: dict[str, Any]) -> None:
        row.costs |= {
            k: result[k] for k in ("parameters", "multiply_adds", "latency") if k in result
        }
        if "psnr" in result and row.validated(int(result["samples"]), float(result["psnr"])):
            self._live.say(row, f"{row.samples:,} samples  {_db(row)}")
        row.samples = max(row.samples, int(result.get("samples", 0)))

    def _end(self, row: Row) -> None:
        row.seconds += time.monotonic() - self._since.pop(row.name, time.monotonic())
        refresh(row)
        self._live.record.save()
        if self._live.config.scheduler != "pbt":  # whose losers' weights are nobody's any more
            prune_losers(self._live.record, self._live.config.keep)
        self._live.record.save()


def make_tuner(live: Live) -> tune.Tuner:
    """A tuner for the trials that are left."""
    config, record = live.config, live.record
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the record, and MLflow, hold it all
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may end before it has figures
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told in one line
    proposals = Proposals(live)
    if config.scheduler == "pbt" and not config.fixed:  # PBT wants to know its whole population
        specs = [trial_spec(live, row) for row in iter(proposals.next_row, None)]
        trials: dict[str, Any] = {"num_samples": 1}
        space: dict[str, Any] = {SPEC: tune.grid_search(specs)}
    else:
        left = live.total - sum(row.ended for row in record.rows)
        trials = {
            "search_alg": proposals,
            "num_samples": left,
            "max_concurrent_trials": live.room.parallel,
        }
        space = {}
    return tune.Tuner(
        tune.with_resources(
            Trial, tune.PlacementGroupFactory([trial_resources(live.room.parallel)])
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(config, live.space, record),
            **trials,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            **ray_storage(record.folder),
            callbacks=[Events(live)],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )


class Asha(ASHAScheduler):
    """Ray's ASHA by samples, with the memory of the record, that spares trial 0.

    Trial 0 runs to the end, for without the paper's point there is nothing to compare with.
    """

    def __init__(self, config: SearchConfig, record: Record) -> None:
        """Take in what trials of earlier launches did."""
        super().__init__(
            time_attr="samples",
            metric="psnr",
            mode="max",
            max_t=config.budget,
            grace_period=config.least,
            reduction_factor=config.reduction,
        )
        self._spared = record.rows[0].name if record.rows else f"{record.name}-000"
        self._known = {row.name: list(row.curve) for row in record.rows if row.state != "failed"}
        for row in record.rows:
            if row.ended and row.state != "failed":
                self.on_trial_add(None, _Ended(row.name))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Give a trial that goes on its place in the rungs that it has passed."""
        super().on_trial_add(tune_controller, trial)
        for samples, psnr in self._known.get(str(trial), []):
            result = {"samples": samples, "psnr": psnr}
            super().on_trial_result(tune_controller, trial, result)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop what lags, but not trial 0."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return TrialScheduler.CONTINUE if str(trial) == self._spared else decision


class _Ended:
    """Stands for a trial of an earlier launch."""

    def __init__(self, name: str) -> None:
        self.trial_id = self.name = name

    def __str__(self) -> str:
        return self.name


def make_scheduler(config: SearchConfig, space: Space, record: Record) -> Any:
    """The scheduler, told of the trials that ended in earlier launches."""
    if config.fixed:
        return FIFOScheduler()
    if config.scheduler == "asha":
        return Asha(config, record)
    if config.scheduler == "pbt":
        ranges = {p.field: p for p in space.parameters if p.field.startswith("recipe.")}
        return PopulationBasedTraining(
            time_attr="samples",
            metric="psnr",
            mode="max",
            perturbation_interval=config.interval,
            custom_explore_fn=lambda trial_config: explore(trial_config, ranges),
        )
    return FIFOScheduler()


def explore(trial_config: dict[str, Any], ranges: dict[str, Any]) -> dict[str, Any]:
    """PBT: the better trial's values, those of the recipe varied by a fifth up or down.

    What shapes the network comes with the weights and stays.
    """
    spec = trial_config[SPEC]
    changes: Changes = dict(spec["changes"])
    for field, parameter in ranges.items():
        if parameter.choices:
            changes[field] = random.choice(parameter.choices)
        else:
            value = parameter.clip(changes[field] * random.choice((0.8, 1.25)))
            changes[field] = type(changes[field])(value)
    return {SPEC: {**spec, "changes": changes}}


def _name(trial: Any) -> str:
    return str(trial.config[SPEC]["name"])


def _db(row: Row) -> str:
    return "no figure" if row.psnr is None else f"{row.psnr:.2f} dB"
