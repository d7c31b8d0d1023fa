"""When a trial is stopped, and what it takes over: Ray Tune's schedulers for a search."""

import random
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from tune.config import SearchConfig
from tune.record import SearchRecord
from tune.space import Changes, Parameter, Space
from tune.trial import SPEC


def make_scheduler(config: SearchConfig, space: Space, record: SearchRecord) -> TrialScheduler:
    """The scheduler that the configuration asks for; it knows the trials of earlier launches."""
    if config.fixed or config.scheduler == "none":
        return FIFOScheduler()
    if config.scheduler == "asha":
        return ResumableAsha(config, record)
    ranges = {p.field: p for p in space.parameters if p.field.startswith("recipe.")}
    return PopulationBasedTraining(
        time_attr="samples",
        metric="psnr",
        mode="max",
        perturbation_interval=config.interval,
        custom_explore_fn=lambda trial_config: explore(trial_config, ranges),
    )


class ResumableAsha(ASHAScheduler):
    """Ray's ASHA by samples, which knows earlier trials and never stops trial 0.

    Trial 0 runs to the end because all others are compared with the paper's point.
    """

    def __init__(self, config: SearchConfig, record: SearchRecord) -> None:
        """Enter the trials that ended in earlier launches into the rungs."""
        super().__init__(
            time_attr="samples",
            metric="psnr",
            mode="max",
            max_t=config.budget,
            grace_period=config.first_rung,
            reduction_factor=config.reduction,
        )
        self._never_stopped = record.trials[0].name if record.trials else f"{record.name}-000"
        self._curves = {t.name: list(t.curve) for t in record.trials if t.state != "failed"}
        for trial in record.trials:
            if trial.ended and trial.state != "failed":
                ended = Trial(record.name, trial_id=trial.name, stub=True)  # it does not run
                super().on_trial_add(None, ended)
                self._replay(None, ended, trial.name)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial that resumes into the rungs that it has passed."""
        super().on_trial_add(tune_controller, trial)
        self._replay(tune_controller, trial, str(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop a trial that is not among the best at its rung, but not trial 0."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return TrialScheduler.CONTINUE if str(trial) == self._never_stopped else decision

    def _replay(self, tune_controller: Any, trial: Any, name: str) -> None:
        for samples, psnr in self._curves.get(name, []):
            result = {"samples": samples, "psnr": psnr}
            super().on_trial_result(tune_controller, trial, result)


def explore(trial_config: dict[str, Any], ranges: Mapping[str, Parameter]) -> dict[str, Any]:
    """PBT: the values of the better trial; those of the recipe are multiplied by 0.8 or 1.25.

    Values that shape the network stay, because they belong to the weights.
    """
    spec = trial_config[SPEC]
    changes: Changes = dict(spec["changes"])
    for field, parameter in ranges.items():
        if parameter.choices:
            changes[field] = random.choice(parameter.choices)
        else:
            value = changes[field] * random.choice((0.8, 1.25))
            value = min(max(value, parameter.low), parameter.high)
            changes[field] = type(changes[field])(value)
    return {SPEC: {**spec, "changes": changes}}
