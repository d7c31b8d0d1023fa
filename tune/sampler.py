"""Values of the next trial: a pure function of the space, the seed and the trials so far.

Optuna's study is built again from the record for each trial, which takes milliseconds. So a killed
search continues with the same trials as an uninterrupted one.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune.config import SearchConfig
from tune.record import TrialRecord, is_number
from tune.space import Changes, Space

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


def next_changes(space: Space, trials: Sequence[TrialRecord], config: SearchConfig) -> Changes:
    """The values of trial number `len(trials)`."""
    base, number = config.base(), len(trials)
    if space.points:
        return dict(space.points[number].changes)
    if number == 0:
        return space.first(base)
    study = build_study(space, trials, cost=config.cost, sampler=_optuna_sampler(config, number))
    for _ in range(20):  # do not train the same values twice
        changes = space.suggest(study, base)
        if all(changes != trial.changes for trial in trials):
            break
    return changes


def build_study(
    space: Space,
    trials: Sequence[TrialRecord],
    *,
    cost: str,
    sampler: Any = None,
) -> "optuna.Study":
    """An Optuna study that knows these trials.

    A stopped trial counts as pruned at its last PSNR. With a cost it counts as complete, because
    Optuna has no pruning for two objectives.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize"] if cost == "none" else ["maximize", "minimize"], sampler=sampler
    )
    ranges = space.distributions([trial.changes for trial in trials])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in trials:
            study.add_trial(_frozen_trial(trial, ranges, cost))
    return study


def _frozen_trial(
    trial: TrialRecord, ranges: "dict[str, BaseDistribution]", cost: str
) -> "optuna.trial.FrozenTrial":
    from optuna.trial import TrialState, create_trial

    curve = {samples: psnr for samples, psnr in trial.curve if is_number(psnr)}
    values: list[float] | None = None
    state = TrialState.FAIL
    if trial.state in ("waiting", "running"):
        state = TrialState.RUNNING
    elif trial.state == "stopped" and cost == "none" and curve:
        state = TrialState.PRUNED
    elif trial.state != "failed":
        figures = [trial.psnr] if cost == "none" else [trial.psnr, trial.costs.get(cost)]
        if all(map(is_number, figures)):
            state, values = TrialState.COMPLETE, [float(f) for f in figures if f is not None]
    return create_trial(
        state=state,
        params=trial.changes,
        distributions=ranges,
        values=values,
        intermediate_values=curve,
    )


def _optuna_sampler(config: SearchConfig, number: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    # A seed per trial, so that no generator's state has to be stored.
    seed = int(np.random.SeedSequence((config.search_seed, number)).generate_state(1)[0])
    if config.algorithm == "random":
        return RandomSampler(seed=seed)
    startup = max(4, min(10, config.trials // 3))
    return TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
