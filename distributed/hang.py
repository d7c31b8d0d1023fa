"""Decides whether training hangs: whether all ranks wait for each other and none makes progress.

In a hung collective every process lives and answers Ray's health check. What shows the hang is
that no rank makes progress. A rank that waits for a slow rank must not count as hung, so the
decision looks at all ranks at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from distributed.config import ScalingConfig

Phase = Literal["start", "data", "step", "validation", "checkpoint", "end"]
"""What a rank does: it sets up the run, waits for a batch, computes a step (with all of its
collectives), validates, writes a checkpoint, or ends the run."""

STEPS_OF_PATIENCE = 3
"""A step may last this many usual steps longer than `scaling.health_timeout_s`."""

SHOWN = 8
"""Most ranks that a message names."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What one rank does at present."""

    phase: Phase = "start"
    step: int = 0
    """Step that it works on, from 1; 0 before the first."""
    idle_s: float = 0.0
    """Seconds since it made progress: a new phase, a micro-batch, a validated picture."""
    silent_s: float = 0.0
    """Seconds since its process was heard."""
    step_s: float | None = None
    """Median seconds of its recent steps; None until it has made enough of them since its start."""
    where: str = ""
    """Line of code that its training thread is at; empty while that is of no interest."""


def find_hang(activities: Mapping[int, Activity], world: int, patience: ScalingConfig) -> str:
    """Why the run counts as hung, in words; empty where it does not.

    It hangs if every rank is over its limit:

    * inside a step, `step_limit`;
    * in any other phase `collective_timeout_s`: data may be slow, a network may have to be
      compiled, a picture may be large;
    * a rank whose process is not heard at all, `health_timeout_s`: something in it stops all of
      its threads.

    Args:
        activities: rank -> what it does, of the ranks heard so far.
        world: number of ranks.
        patience: the limits.
    """
    ranks = [activities[rank] for rank in range(world) if rank in activities]
    if len(ranks) < world:
        return ""  # one that was never heard is still being started
    step_s = step_limit(ranks, patience)
    limits = set()
    for rank in ranks:
        name, limit_s, spent_s = "not heard", patience.health_timeout_s, rank.silent_s
        if spent_s <= limit_s:
            name, spent_s = rank.phase, rank.idle_s
            limit_s = step_s if name == "step" else patience.collective_timeout_s
        if spent_s <= limit_s:
            return ""
        limits.add(f"{name} {limit_s:.0f} s")
    return (
        f"hung: no rank makes progress; {describe(activities, world, patience)}. Limits: "
        f"{', '.join(sorted(limits))} (scaling.health_timeout_s, scaling.collective_timeout_s). "
        "Ending the workers; others start from the last checkpoint"
    )


def step_limit(ranks: Iterable[Activity], patience: ScalingConfig) -> float:
    """Seconds without progress that a step may take.

    The first steps after a start may compile and tune: they may take `collective_timeout_s`, as
    long as nothing was measured on some rank.
    """
    measured = [rank.step_s for rank in ranks]
    known = [seconds for seconds in measured if seconds is not None]
    if len(known) < len(measured):
        return patience.collective_timeout_s
    return patience.health_timeout_s + STEPS_OF_PATIENCE * max(known)


def describe(activities: Mapping[int, Activity], world: int, patience: ScalingConfig) -> str:
    """`rank 1: in step 120 for 43 s (distributed/session.py:316)`, the first `SHOWN` ranks."""
    told = [f"rank {rank}: {_words(activities[rank], patience)}" for rank in range(world)]
    more = [f"and {world - SHOWN} more"] if world > SHOWN else []
    return ", ".join(told[:SHOWN] + more)


def _words(rank: Activity, patience: ScalingConfig) -> str:
    if rank.silent_s > patience.health_timeout_s:
        return f"not heard for {rank.silent_s:.0f} s"
    at = {
        "start": "setting up the run",
        "data": f"waiting for the data of step {rank.step}",
        "step": f"in step {rank.step}",
        "validation": f"validating after step {rank.step}",
        "checkpoint": f"writing a checkpoint after step {rank.step}",
        "end": "ending the run",
    }[rank.phase]
    where = f" ({rank.where})" if rank.where else ""
    return f"{at} for {rank.idle_s:.0f} s{where}"
