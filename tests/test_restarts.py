"""When a run that fails is started again, and how long it may take to stop."""

import pickle
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from distributed.goodput import Attempt, Launch, Launches, goodput
from distributed.guard import cause_of
from distributed.internals.ray_train import JOB, JOB_STOP_S
from distributed.restarts import EndWithoutProgress, NoProgressError, RestartBudget
from distributed.stopping import platform_limit, stop_limit
from tests.test_checkpoint import write


@pytest.mark.parametrize(
    ("limit", "newest", "ends_at"),
    [
        (3, [0, 0, 0, 0], 4),
        (3, [0, 0, 0, 8, 8, 8, 8], 7),  # a checkpoint refills the budget
        (1, [8 * n for n in range(1, 200)], None),  # each restart makes progress
        (0, [8], 1),
        (-1, [0] * 50, None),
        (2, [8, 8, 4, 4], 3),  # going back to an older checkpoint is no progress
    ],
)
def test_restarts_are_limited_only_without_progress(
    limit: int, newest: list[int], ends_at: int | None
) -> None:
    budget = RestartBudget(limit, 0)
    ends = [number for number, samples in enumerate(newest, 1) if budget.is_spent(samples)]
    assert (ends[0] if ends else None) == ends_at


def test_the_end_names_the_cause_and_reaches_the_driver(tmp_path: Path) -> None:
    write(tmp_path, 8)
    watch = EndWithoutProgress(str(tmp_path), 1, 8)
    failures: dict[int, Exception] = {0: MemoryError("no memory")}
    watch.after_exception(None, failures)
    write(tmp_path, 16)
    watch.after_exception(None, failures)
    with pytest.raises(NoProgressError, match="1 restarts in a row made no new checkpoint") as end:
        watch.after_exception(None, failures)
    sent = pickle.loads(pickle.dumps(end.value))
    assert str(sent) == str(end.value) and cause_of(sent) == "out of memory"


def test_a_node_that_is_taken_away_with_notice_does_not_count(tmp_path: Path) -> None:
    watch = EndWithoutProgress(str(tmp_path), 0, 0)
    watch.after_exception(None, {1: RayActorError(preempted=True), 0: ConnectionError()})
    with pytest.raises(NoProgressError):
        watch.after_exception(None, {1: RayActorError()})


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (0, {}, None),
        (0, {JOB_STOP_S: "30"}, None),  # not in a job
        (0, {JOB: "{}"}, 3.0),
        (0, {JOB: "{}", JOB_STOP_S: "30"}, 30.0),
        (120, {JOB: "{}", JOB_STOP_S: "30"}, 120.0),
    ],
)
def test_what_the_platform_gives(
    configured: float, environment: dict[str, str], expected: float | None
) -> None:
    assert platform_limit(configured, environment) == expected


@pytest.mark.parametrize(
    ("checkpoint_s", "step_s", "platform_s", "seconds", "warns"),
    [
        (0, 0, None, 30, False),
        (4, 1, None, 30, False),
        (60, 5, None, 140, False),  # 460 MB to a slow store
        (4, 1, 30, 28, False),
        (60, 5, 120, 118, False),
        (60, 5, 30, 28, True),
        (4, 1, 3, 1, True),  # Ray's own value
        (0, 0, 1, 0, True),
    ],
)
def test_a_stop_may_take_as_long_as_checkpoints_take(
    checkpoint_s: float, step_s: float, platform_s: float | None, seconds: float, warns: bool
) -> None:
    limit = stop_limit(checkpoint_s, step_s, platform_s)
    assert limit.seconds == seconds
    assert bool(limit.warning) == warns
    if warns:
        assert f"after {platform_s} s" in limit.warning and JOB_STOP_S in limit.warning


def attempt(first: int, last: int, step: float = 0.0, **others: float) -> Attempt:
    return Attempt(first, last, {"step": step, **others})


@pytest.mark.parametrize(
    ("launches", "kept", "repeated", "useful_s"),
    [
        ([], 0, 0, 0.0),
        ([Launch(100, [attempt(0, 80, 80)])], 80, 0, 80.0),
        # The second attempt starts at the checkpoint at 40: half of the first was lost.
        ([Launch(100, [attempt(0, 80, 40), attempt(40, 80, 20)])], 80, 40, 40.0),
        # The same over two commands.
        ([Launch(50, [attempt(0, 80, 40)]), Launch(50, [attempt(40, 80, 20)])], 80, 40, 40.0),
        # The third goes back behind the start of the second.
        ([Launch(90, [attempt(0, 40, 40), attempt(30, 40, 9), attempt(20, 40, 20)])], 40, 30, 40.0),
        # A killed command did not tell that it reached 40.
        ([Launch(50, [attempt(0, 30, 40)]), Launch(50, [attempt(40, 80, 40)])], 80, 0, 80.0),
        # It failed before the first step.
        ([Launch(10, [attempt(0, 0)]), Launch(90, [attempt(0, 80, 80)])], 80, 0, 80.0),
    ],
)
def test_goodput(launches: list[Launch], kept: int, repeated: int, useful_s: float) -> None:
    found = goodput(launches)
    assert (found.samples_kept, found.samples_repeated) == (kept, repeated)
    assert found.share * found.seconds == pytest.approx(useful_s)


def test_waits_add_up_over_launches(tmp_path: Path) -> None:
    first = Launch(20, [attempt(0, 8, 5, start=3, data=2, checkpoint=1, end=1)])
    assert Launches(str(tmp_path)).keep(first).wait_nodes_s == 8
    again = Launches(str(tmp_path))
    again.keep(Launch(1, []))
    found = again.keep(Launch(10, [attempt(8, 16, 5, data=1)]))  # written over
    assert (found.seconds, found.restarts) == (30, 1)
    assert (found.wait_nodes_s, found.wait_data_s, found.wait_storage_s) == (12, 3, 2)
    assert found.metrics()["goodput/samples_kept"] == 16
    assert str(found).startswith("33% of 30 s: 16 samples kept, 0 repeated")
