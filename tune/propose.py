"""Which trial comes next: a pure function of the space, the seed and the trials so far.

Optuna's study is built anew from the record each time. That costs milliseconds, and a search that
was killed and goes on proposes what it would have proposed.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune.record import Row, is_number
from tune.space import Changes, Space

if TYPE_CHECKING:
    import optuna

    from distributed.config import TrainConfig
    from tune.config import SearchConfig


def propose(space: Space, rows: Sequence[Row], config: "SearchConfig") -> Changes:
    """The values of trial number `len(rows)`."""
    base = config.base()
    number = len(rows)
    if space.points:
        return dict(space.points[number].changes)
    if number == 0:
        return space.first(base)
    sampler = _sampler(config, number)
    study = build_study(space, rows, base, cost=config.cost, sampler=sampler)
    for _ in range(20):  # points that were tried already teach nothing
        changes = space.suggest(study.ask(), base)
        if all(changes != row.changes for row in rows):
            break
    return changes


def build_study(
    space: Space,
    rows: Sequence[Row],
    base: "TrainConfig",
    *,
    cost: str,
    sampler: Any = None,
    whole: bool = False,
) -> "optuna.Study":
    """What Optuna would know after these trials.

    Stopped trials count as pruned at their last figure; beside a cost, where Optuna knows no
    pruning, as ended with it. `whole` draws each K from its full range, for what compares ranges.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize"] if cost == "none" else ["maximize", "minimize"], sampler=sampler
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in rows:
            study.add_trial(_trial(space, row, base, cost, whole))
    return study


def _trial(space: Space, row: Row, base: "TrainConfig", cost: str, whole: bool) -> Any:
    from optuna.trial import TrialState, create_trial

    seen = {samples: psnr for samples, psnr in row.curve if is_number(psnr)}
    values: list[float] | None = None
    state = TrialState.FAIL
    if row.state in ("waiting", "running"):
        state = TrialState.RUNNING
    elif row.state == "stopped" and cost == "none" and seen:
        state = TrialState.PRUNED
    elif row.state != "failed" and is_number(row.psnr):
        values = [float(row.psnr or 0.0)]
        if cost != "none":
            values.append(float(row.costs.get(cost, float("nan"))))
        state = TrialState.COMPLETE if all(map(is_number, values)) else TrialState.FAIL
        values = values if state == TrialState.COMPLETE else None
    return create_trial(
        state=state,
        params=row.changes,
        distributions=space.distributions(row.changes, base, whole=whole),
        values=values,
        intermediate_values=seen,
    )


def _sampler(config: "SearchConfig", number: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    # A seed per trial: no generator's state has to be kept.
    seed = int(np.random.SeedSequence((config.search_seed, number)).generate_state(1)[0])
    if config.algorithm == "random":
        return RandomSampler(seed=seed)
    startup = max(4, min(10, config.trials // 3))
    return TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
