"""`search.json`: the state of a search, written after each event.

A killed search resumes from this file, and the report is made from it. The states of Optuna and
Ray Tune are not stored; they are built again from this file.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.storage import finite, open_folder, read_json, write_json
from tune.space import Changes

FILE = "search.json"
VERSION = 2

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class TrialRecord:
    """One trial."""

    number: int
    """Counts from 0; 0 is the paper's point."""
    name: str
    """Name of its folder in `trials/`, and of its run in MLflow."""
    changes: Changes
    """Dotted field -> value."""
    label: str = ""
    """Row of a fixed list, such as `full` of the ablation."""
    state: State = "waiting"
    reason: str = ""
    """Why it was stopped or failed, in one line."""
    cause: str = ""
    """Why it failed, as a `distributed.guard.Cause`."""
    samples: int = 0
    """Samples it was trained on so far."""
    psnr: float | None = None
    """PSNR of the last validation in dB, mean over tasks."""
    input_psnr: float | None = None
    """PSNR of the degraded pictures of that validation in dB, mean over tasks."""
    gain_error: float | None = None
    """Standard error in dB of the mean gain over the pictures of that validation."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Task -> PSNR of the last validation in dB."""
    costs: dict[str, float] = field(default_factory=dict)
    """`parameters`, `multiply_adds` (256x256), and `latency` in ms if it is the cost."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(samples, PSNR) of each validation."""
    inherited: list[dict[str, Any]] = field(default_factory=list)
    """PBT: each time that it took over weights: `from` which trial, at how many `samples`, and its
    `changes` after that."""
    routing: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Task -> expert library -> mean share per expert."""
    choice_worth: float | None = None
    """What the learned choice of experts is worth in dB, mean over tasks, by `distributed.evaluate
    --routing fixed` of the trial's folder; None: not measured."""
    seconds: float = 0.0
    """Time of all its launches."""
    folder: str = ""
    mlflow_run_id: str = ""

    @property
    def ended(self) -> bool:
        """Whether it finished, was stopped, or failed."""
        return self.state in ("finished", "stopped", "failed")

    @property
    def title(self) -> str:
        """PSNR as text."""
        return "no validation" if self.psnr is None else f"{self.psnr:.2f} dB"

    def gain(self) -> tuple[float, bool] | None:
        """PSNR gained over the degraded pictures in dB, and whether that is more than noise.

        Noise is twice the standard error of the mean gain over the validation pictures. With one
        picture it is unknown, and the gain counts as noise.
        """
        if not (is_number(self.psnr) and is_number(self.input_psnr)):
            return None
        gain = float(self.psnr or 0) - float(self.input_psnr or 0)
        return gain, is_number(self.gain_error) and gain > 2 * float(self.gain_error or 0)


@dataclass
class SearchRecord:
    """The search and its trials."""

    name: str
    config: dict[str, Any]
    """`tune.config.SearchConfig` as plain data."""
    command: str
    """The command that resumes it."""
    budget: int
    """Samples of a trial that runs to its end."""
    cost: str
    """The second objective, or `none`."""
    trials: list[TrialRecord] = field(default_factory=list)
    state: Literal["running", "finished", "stopped"] = "running"
    front: list[int] = field(default_factory=list)
    """Numbers of the finished trials on the Pareto front of PSNR and cost, cheapest first."""
    champion: int | None = None
    """Number of the finished trial with the best PSNR."""
    best_command: str = ""
    """Trains the champion at full length."""
    registered: list[str] = field(default_factory=list)
    """Name of the trial that this search registered in MLflow, and the model it became."""
    registration: str = ""
    """Whether the champion was registered in MLflow, and why."""
    validation_data: str = ""
    """Fingerprint of the validation shards."""
    space: dict[str, Any] | None = None
    """What is searched, as `Space.as_dict`; None in records of earlier versions."""
    pruned: list[str] = field(default_factory=list)
    """Names of trials whose checkpoints were deleted."""
    seconds: float = 0.0
    """Time of all launches of the search."""
    mlflow_run_id: str = ""
    folder: str = ""
    version: int = VERSION

    def trial(self, name: str) -> TrialRecord:
        """The trial of this name."""
        return next(trial for trial in self.trials if trial.name == name)

    @property
    def finished(self) -> list[TrialRecord]:
        """Trials that ran to the end and were validated there."""
        return [t for t in self.trials if t.state == "finished" and is_number(t.psnr)]

    @property
    def best(self) -> TrialRecord | None:
        """The champion."""
        return None if self.champion is None else self.trials[self.champion]

    @property
    def samples(self) -> int:
        """Samples that all trials were trained on."""
        return sum(trial.samples for trial in self.trials)

    @property
    def counts(self) -> str:
        """Number of trials in each state, as text."""
        states = [trial.state for trial in self.trials]
        return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "no trial yet"

    def rank(self) -> None:
        """Find the front and the champion among the trials that ran to the end."""
        self.front = [trial.number for trial in front(self.finished, self.cost)]
        best = max(self.finished, key=lambda t: (t.psnr or 0.0, -t.number), default=None)
        self.champion = None if best is None else best.number

    def kept(self, count: int) -> set[int]:
        """Numbers of the trials whose checkpoints stay: the front, then the best, `count` in all
        if the front is not larger."""
        ordered = sorted(
            self.finished, key=lambda t: (t.number not in self.front, -(t.psnr or 0.0))
        )
        return {trial.number for trial in ordered[: max(count, len(self.front))]}

    def save(self) -> None:
        """Write the file; a reader never sees a half-written one."""
        self.rank()
        fs, root = open_folder(self.folder)
        fs.makedirs(root, exist_ok=True)
        write_json(fs, f"{root}/{FILE}", finite(dataclasses.asdict(self)))


def load(folder: str) -> SearchRecord | None:
    """The record of the search in `folder`; None if there is none.

    Raises:
        ValueError: a file that this version cannot read.
    """
    fs, root = open_folder(folder)
    path = f"{root}/{FILE}"
    if not fs.exists(path):
        return None
    try:
        data = read_json(fs, path)
        if data.get("version") != VERSION:
            raise ValueError(f"its version is {data.get('version')}, not {VERSION}")
        trials = [_trial(trial) for trial in data.pop("trials")]
        for trial in trials:  # the search may have been moved
            trial.folder = f"{folder}/trials/{trial.name}"
        return SearchRecord(trials=trials, **(data | {"folder": folder}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def front(trials: list[TrialRecord], cost: str) -> list[TrialRecord]:
    """The Pareto front of PSNR (high) and cost (low), cheapest first; with cost `none` the best
    trial only."""
    known = [t for t in trials if cost == "none" or is_number(t.costs.get(cost))]
    price = {t.number: 0.0 if cost == "none" else t.costs[cost] for t in known}

    def beats(a: TrialRecord, b: TrialRecord) -> bool:
        better = (a.psnr or 0.0, -price[a.number]), (b.psnr or 0.0, -price[b.number])
        return all(x >= y for x, y in zip(*better, strict=True)) and better[0] != better[1]

    kept = [b for b in known if not any(beats(a, b) for a in known)]
    return sorted(kept, key=lambda t: (price[t.number], t.number))


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _trial(data: dict[str, Any]) -> TrialRecord:
    data["curve"] = [(int(s), math.nan if p is None else float(p)) for s, p in data["curve"]]
    return TrialRecord(**data)
