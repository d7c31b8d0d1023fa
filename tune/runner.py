"""Runs the trials of a search under Ray Tune, and writes what happens into the record.

Ray Tune starts, stops and pauses trials. Its own files are not used: the record is written at every
event, and the next launch builds searcher and scheduler again from it.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.tune import (
    Callback,
    PlacementGroupFactory,
    RunConfig,
    TuneConfig,
    Tuner,
    grid_search,
    with_parameters,
    with_resources,
)
from ray.tune import FailureConfig as TuneFailureConfig
from ray.tune.search import Searcher
from rich.markup import escape

from distributed.cluster import ray_storage
from distributed.progress import free_resources
from tune.capacity import Capacity
from tune.config import SearchConfig
from tune.record import SearchRecord, TrialRecord
from tune.results import prune_losers, refresh
from tune.sampler import next_changes
from tune.schedulers import make_scheduler
from tune.space import Space, describe
from tune.trial import SPEC, Trial

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass
class Search:
    """A running search."""

    config: SearchConfig
    space: Space
    record: SearchRecord
    total: int
    """Trials in all."""
    console: "Console"
    capacity: Capacity
    stop_file: Path
    """This file is created when the user stops the search."""

    def __post_init__(self) -> None:
        """Queue the trials that an earlier launch left unfinished."""
        self._waiting = [trial for trial in self.record.trials if trial.state == "waiting"]

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune pickles what it was given, but the record is the state."""
        return {}

    def next_trial(self) -> TrialRecord | None:
        """An unfinished trial of an earlier launch, else a new one, which enters the record."""
        if self._waiting:
            return self._waiting.pop(0)
        record, number = self.record, len(self.record.trials)
        if number >= self.total:
            return None
        name = f"{record.name}-{number:03d}"
        trial = TrialRecord(
            number=number,
            name=name,
            changes=next_changes(self.space, record.trials, self.config),
            label=self.space.points[number].label if self.space.points else "",
            folder=f"{record.folder}/trials/{name}",
        )
        record.trials.append(trial)
        record.save()
        return trial

    def trial_arguments(self) -> dict[str, Any]:
        """Arguments of `Trial.setup` that all trials have in common."""
        base, capacity = self.config.base(), self.capacity
        device: Literal["gpu", "cpu"] = "gpu" if capacity.gpu else "cpu"
        scaling = dataclasses.replace(base.scaling, cpus_per_worker=capacity.cpus, device=device)
        return {
            "base": dataclasses.replace(base, scaling=scaling),
            "search": self.record.name,
            "stop_file": str(self.stop_file),
            "latency": self.config.cost == "latency",
        }

    def show(self, trial: TrialRecord, text: str) -> None:
        """Print a line about a trial; `text` may have rich's markup."""
        label = escape(trial.label or describe(trial.changes))
        self.console.print(f"{trial.number:3d}  {label}  {text}", soft_wrap=True)


class TrialSource(Searcher):
    """Gives Ray Tune the trials of a search one by one."""

    def __init__(self, search: Search) -> None:
        """Take the trials from this search."""
        super().__init__(metric="psnr", mode="max")
        self._search = search

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, or `FINISHED`."""
        stopped = self._search.stop_file.exists()
        trial = None if stopped else self._search.next_trial()
        return Searcher.FINISHED if trial is None else {SPEC: _spec(trial)}

    def on_trial_complete(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing; `EventWriter` writes it into the record."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing, since the record is the state."""


class EventWriter(Callback):
    """Writes what happens to the trials into the record, and shows it."""

    def __init__(self, search: Search) -> None:
        """Watch this search."""
        self._search = search
        self._since: dict[str, float] = {}

    def on_trial_start(self, *, trial: Any, **_info: Any) -> None:
        """A trial starts; with PBT it may have the values and weights of a better one."""
        entry = self._entry(trial)
        entry.changes = dict(trial.config[SPEC]["changes"])
        if entry.state == "waiting":
            resumed = f"resumes at {entry.samples:,} samples" if entry.samples else "starts"
            self._search.show(entry, resumed)
        entry.state = "running"
        self._since[entry.name] = time.monotonic()
        self._search.record.save()

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_info: Any) -> None:
        """A trial was validated, or has ended."""
        entry = self._entry(trial)
        entry.costs |= result.get("costs", {})
        if taken := result.get("took_over"):
            entry.inherited.append(taken | {"changes": entry.changes})
            self._search.show(entry, "took over {from} at {samples:,} samples".format(**taken))
        known = len(entry.curve)
        refresh(entry)
        if len(entry.curve) > known:
            self._search.show(entry, f"{entry.samples:,} samples  {entry.title}")
        self._search.record.save()

    def on_trial_complete(self, *, trial: Any, **_info: Any) -> None:
        """A trial ran to its end, failed, or was stopped by the scheduler or by the user."""
        entry, result, config = self._entry(trial), trial.last_result, self._search.config
        refresh(entry)
        if result.get("interrupted"):
            entry.state = "waiting"
        elif cause := result.get("cause"):
            self._failed(entry, cause, result["reason"])
        elif entry.samples >= config.budget:
            entry.state = "finished"
            self._search.show(entry, f"finished with {entry.title}")
        else:
            entry.state = "stopped"
            entry.reason = (
                f"ASHA: not among the best 1/{config.reduction} at {entry.samples:,} samples"
            )
            self._search.show(entry, f"stopped at {entry.samples:,} samples with {entry.title}")
        self._end(entry)

    def on_trial_error(self, *, trial: Any, **_info: Any) -> None:
        """A trial's process was lost; the search continues."""
        entry = self._entry(trial)
        refresh(entry)
        self._failed(entry, "worker lost", f"the trial's process was lost; {free_resources()}")
        self._end(entry)

    def _entry(self, trial: Any) -> TrialRecord:
        return self._search.record.trial(str(trial))

    def _failed(self, entry: TrialRecord, cause: str, reason: str) -> None:
        entry.state, entry.cause = "failed", cause
        entry.reason = reason if cause == "other" else f"{cause}: {reason}"
        # Messages of libraries may contain [brackets].
        self._search.show(entry, f"[red]failed[/red]: {escape(entry.reason)}")

    def _end(self, entry: TrialRecord) -> None:
        entry.seconds += time.monotonic() - self._since.pop(entry.name, time.monotonic())
        record, config = self._search.record, self._search.config
        if config.scheduler != "pbt":  # with PBT a running trial may still take over weights
            prune_losers(record, config.keep)
        record.save()


def make_tuner(search: Search, node: str) -> Tuner:
    """Ray Tune's tuner for the trials that are left; they run on `node`, a resource of Ray."""
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are shown in one line
    config, record = search.config, search.record
    if config.scheduler == "pbt" and not config.fixed:  # PBT must know all trials at the start
        specs = [_spec(trial) for trial in iter(search.next_trial, None)]
        trials: dict[str, Any] = {"num_samples": 1}
        param_space: dict[str, Any] = {SPEC: grid_search(specs)}
    else:
        trials = {
            "search_alg": TrialSource(search),
            "num_samples": search.total - sum(trial.ended for trial in record.trials),
            "max_concurrent_trials": search.capacity.parallel,
        }
        param_space = {}
    share = trial_share(search.capacity.parallel)
    return Tuner(
        with_resources(
            with_parameters(Trial, **search.trial_arguments()),
            PlacementGroupFactory([{node: share}]),
        ),
        param_space=param_space,
        tune_config=TuneConfig(
            scheduler=make_scheduler(config, search.space, record),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            **trials,
        ),
        run_config=RunConfig(
            name="tune",
            **ray_storage(record.folder),
            callbacks=[EventWriter(search)],
            failure_config=TuneFailureConfig(max_failures=0),
            verbose=0,
        ),
    )


def trial_share(parallel: int) -> float:
    """Part of the node's own resource for one trial, so that `parallel` trials fit.

    A trial takes no CPU; otherwise it would hold CPUs that its own workers wait for. Ray
    counts in steps of 1/10,000.
    """
    return (10_000 // parallel) / 10_000


def _spec(trial: TrialRecord) -> dict[str, Any]:
    return {"name": trial.name, "changes": trial.changes, "costs": trial.costs}


def _name(trial: Any) -> str:
    return str(trial.config[SPEC]["name"])
