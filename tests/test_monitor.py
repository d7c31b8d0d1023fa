"""When a run counts as hung; a run that hangs in a collective is restarted and continues."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed.config import ScalingConfig
from distributed.hang import Activity, describe, find_hang
from distributed.progress import FIRST_STEPS, Message, Monitor, Reporter, start_monitor, where
from distributed.scoring import score
from measnet.config import tiny
from measnet.network import MEASNet
from measnet.tiling import Tiling
from tests.chaos import BATCH, STEPS, Run, difference, final_state

PATIENCE = ScalingConfig(health_timeout_s=30.0, collective_timeout_s=600.0)


def step(idle_s: float, *, step_s: float | None = 2.0, silent_s: float = 0.0) -> Activity:
    return Activity(phase="step", step=120, idle_s=idle_s, step_s=step_s, silent_s=silent_s)


def other(phase: str, idle_s: float, silent_s: float = 0.0) -> Activity:
    return Activity(phase=phase, step=120, idle_s=idle_s, silent_s=silent_s, step_s=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "hangs"),
    [
        # One worker: its step is over the limit of 30 s + 3 x 2 s, or not.
        ([step(35.9)], False),
        ([step(36.1)], True),
        # All ranks wait in a collective.
        ([step(40), step(41)], True),
        ([step(40), step(3)], False),
        # The slowest usual step counts.
        ([step(40, step_s=2.0), step(40, step_s=10.0)], False),
        ([step(61, step_s=2.0), step(61, step_s=10.0)], True),
        # Nothing measured yet: the first steps may compile.
        ([step(200, step_s=None), step(200, step_s=None)], False),
        ([step(200), step(200, step_s=None)], False),
        ([step(601, step_s=None), step(601, step_s=None)], True),
        # Rank 0 waits for a rank that does something slow, but allowed.
        ([step(60), other("data", 60)], False),
        ([step(60), other("start", 60)], False),
        ([step(300), other("checkpoint", 300)], False),
        ([other("validation", 300), other("validation", 2)], False),
        ([step(601), other("data", 601)], True),
        ([other("start", 599), other("start", 601)], False),
        ([other("start", 601), other("start", 601)], True),
        # A process that is not heard: stopped, or its interpreter is blocked.
        ([step(40), step(31, silent_s=31)], True),
        ([step(40), other("data", 31, silent_s=31)], True),
        ([step(40), other("data", 29, silent_s=29)], False),
        ([step(20), step(31, silent_s=31)], False),
    ],
)
def test_a_run_hangs_only_if_no_rank_may_still_be_working(
    ranks: list[Activity], hangs: bool
) -> None:
    for order in (ranks, ranks[::-1]):
        assert bool(find_hang(dict(enumerate(order)), len(order), PATIENCE)) == hangs


def test_a_rank_that_was_never_heard_is_being_started() -> None:
    assert not find_hang({0: step(1000)}, 2, PATIENCE)
    assert find_hang({0: step(1000), 1: step(1000), 2: other("start", 1)}, 2, PATIENCE)


def test_the_message_names_ranks_phases_and_limits() -> None:
    ranks = {
        0: Activity(phase="step", step=120, idle_s=43.2, step_s=2.0, where="distributed/x.py:9"),
        1: other("start", 45, silent_s=44.8),
    }
    message = find_hang(ranks, 2, PATIENCE)
    assert "rank 0: in step 120 for 43 s (distributed/x.py:9)" in message
    assert "rank 1: not heard for 45 s" in message
    assert "not heard 30 s, step 36 s (scaling.health_timeout_s" in message
    many = describe({rank: step(40) for rank in range(64)}, 64, PATIENCE)
    assert "rank 7: in step 120" in many and "rank 8" not in many and many.endswith("and 56 more")


def test_the_monitor_ends_the_workers_of_a_hang_and_no_later_ones() -> None:
    monitor = Monitor(ScalingConfig(health_timeout_s=0.2, collective_timeout_s=600.0))
    stuck = step(9.0)
    assert not monitor.exchange(Message("a", 0, 2, stuck)).hang  # rank 1 was not heard yet
    assert monitor.exchange(Message("b", 1, 2, stuck)).hang
    assert monitor.exchange(Message("a", 0, 2, step(0.0))).hang  # ends with its group
    new = Activity()
    assert not monitor.exchange(Message("c", 0, 1, new)).hang  # fewer workers than before
    assert not monitor.exchange(Message("c", 0, 2, new)).hang
    assert not monitor.exchange(Message("d", 1, 2, new)).hang
    assert sum("hung" in line for line in monitor.read(0)[1]) == 1


def test_a_silent_rank_counts_from_when_it_was_last_heard() -> None:
    monitor = Monitor(ScalingConfig(health_timeout_s=0.3, collective_timeout_s=600.0))
    monitor.exchange(Message("b", 1, 2, other("data", 0.0)))
    assert not monitor.exchange(Message("a", 0, 2, step(40))).hang
    time.sleep(0.4)
    assert "rank 1: not heard" in monitor.exchange(Message("a", 0, 2, step(40))).hang


def test_where_names_the_innermost_line_of_this_project() -> None:
    ready, go_on = threading.Event(), threading.Event()

    def blocked() -> Iterator[Any]:
        ready.set()
        go_on.wait()
        yield from ()

    tiling = Tiling(at_once=10**6)
    thread = threading.Thread(target=lambda: list(score(MEASNet(tiny()), blocked(), tiling)))
    thread.start()
    assert ready.wait(timeout=30)
    assert re.fullmatch(r"distributed/scoring\.py:\d+, ahead", where(thread.ident or 0))
    go_on.set()
    thread.join()
    assert where(thread.ident or 0) == ""


class Survivor(Reporter):
    """Keeps the reason, and does not end the process, because that runs the test."""

    reason = ""

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._closed.set()


def test_a_rank_that_waits_for_another_ones_data_is_left_alone(ray_local: None) -> None:
    patience = ScalingConfig(health_timeout_s=1.5, collective_timeout_s=60.0)
    monitor = start_monitor(patience)
    ranks = [Survivor(monitor, rank, 2, on_hang=print) for rank in (0, 1)]
    for rank in ranks:
        for made in range(FIRST_STEPS + 2):
            rank.enter("step", made + 1)
            rank.step_made()
        rank.enter("step", FIRST_STEPS + 3)
    ranks[1].enter("data")
    time.sleep(4)
    assert [rank.reason for rank in ranks] == ["", ""]
    ranks[1].enter("step")
    began = time.monotonic()
    while not all(rank.reason for rank in ranks) and time.monotonic() - began < 20:
        time.sleep(0.05)
    assert time.monotonic() - began > patience.health_timeout_s
    assert all("rank 1: in step 6 for 2 s" in rank.reason for rank in ranks)
    assert "rank 0: in step 6 for " in ranks[0].reason
    for rank in ranks:
        rank.close()


@pytest.mark.slow
def test_a_run_that_hangs_in_a_collective_is_restarted_and_ends_the_same(
    packed: Path, tmp_path: Path
) -> None:
    limit_s = 10.0  # scaling.health_timeout_s of these runs
    environment = {"RAY_AUTH_MODE": "disabled"}
    for name in ("undisturbed", "hung"):
        (tmp_path / name).mkdir()
    assert Run(tmp_path / "undisturbed", packed, environment).end() == 0
    run = Run(tmp_path / "hung", packed, environment, module="tests.hanging")
    log = tmp_path / "hung" / "log.txt"
    assert run.wait_for_step(12)
    run.hang.touch()
    assert run.wait_for(lambda: not run.hang.exists())
    began, made = time.monotonic(), len(run.consumed())
    assert run.wait_for(lambda: "hung: no rank makes progress" in log.read_text())
    found_s = time.monotonic() - began
    assert run.wait_for_lines(made + 1)
    print(f"hang found after {found_s:.1f} s, next step after {time.monotonic() - began:.1f} s")
    assert run.end() == 0, log.read_text()
    # A usual step here takes below a second; a few seconds are for a machine that others use too.
    assert limit_s <= found_s < limit_s + 3 * 1.0 + 7.0
    line = next(line for line in log.read_text().splitlines() if line.startswith("hung:"))
    assert "rank 0: in step" in line and "rank 1: in step" in line and "tests" not in line
    assert line in (run.folder / "events.log").read_text()
    expected = final_state(tmp_path / "undisturbed")
    assert difference(expected, final_state(tmp_path / "hung")) == ""
    assert expected["samples"] == STEPS * BATCH
