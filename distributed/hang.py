"""Decides whether training hangs: whether no rank makes progress.

In a hung collective every process is alive and answers Ray's health check; the only sign is that
no rank makes progress. A rank that waits for a slow rank is not hung, so the decision needs the
state of all ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from distributed.config import ScalingConfig

Phase = Literal["start", "data", "step", "validation", "checkpoint", "end"]
"""What a rank does: set up the run, wait for a batch, compute a step (with all its collectives),
validate, write a checkpoint, or end the run."""

STEPS_OF_PATIENCE = 3
"""A step may last this many usual steps longer than `scaling.health_timeout_s`."""

SHOWN = 8
"""Most ranks that a message names."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What one rank does now."""

    phase: Phase = "start"
    step: int = 0
    """Step that it works on, from 1; 0 before the first."""
    idle_s: float = 0.0
    """Seconds since it made progress: a new phase, a micro-batch, a validated picture."""
    silent_s: float = 0.0
    """Seconds since the last message from its process."""
    step_s: float | None = None
    """Median seconds of its recent steps; None until there are enough since its start."""
    where: str = ""
    """Line of code that its training thread executes; empty if not looked up."""


def find_hang(activities: Mapping[int, Activity], world: int, limits: ScalingConfig) -> str:
    """Why the run counts as hung, as a message; empty if it is not hung.

    The run is hung if every rank is over its limit:

    * in a step: `step_limit`;
    * in any other phase: `collective_timeout_s`, because data may be slow, the network may have to
      be compiled, a picture may be large;
    * no message from its process: `health_timeout_s`, because all of its threads are blocked.

    Args:
        activities: rank -> what it does, for the ranks that have sent a message.
        world: number of ranks.
        limits: how long each activity may take.
    """
    ranks = [activities[rank] for rank in range(world) if rank in activities]
    if len(ranks) < world:
        return ""  # a rank without a message is still starting
    step_s = step_limit(ranks, limits)
    passed = set()
    for rank in ranks:
        name, limit_s, spent_s = "not heard", limits.health_timeout_s, rank.silent_s
        if spent_s <= limit_s:
            name, spent_s = rank.phase, rank.idle_s
            limit_s = step_s if name == "step" else limits.collective_timeout_s
        if spent_s <= limit_s:
            return ""
        passed.add(f"{name} {limit_s:.0f} s")
    return (
        f"hung: no rank makes progress; {describe(activities, world, limits)}. Limits: "
        f"{', '.join(sorted(passed))} (scaling.health_timeout_s, scaling.collective_timeout_s). "
        "Ending the workers; new ones start from the last checkpoint"
    )


def step_limit(ranks: Iterable[Activity], limits: ScalingConfig) -> float:
    """Seconds without progress that a step may take.

    The first steps after a start may compile and tune, so the limit is `collective_timeout_s` until
    every rank has measured its steps.
    """
    measured = [rank.step_s for rank in ranks]
    known = [seconds for seconds in measured if seconds is not None]
    if len(known) < len(measured):
        return limits.collective_timeout_s
    return limits.health_timeout_s + STEPS_OF_PATIENCE * max(known)


def describe(activities: Mapping[int, Activity], world: int, limits: ScalingConfig) -> str:
    """`rank 1: in step 120 for 43 s (distributed/session.py:316)`, the first `SHOWN` ranks."""
    lines = [f"rank {rank}: {_words(activities[rank], limits)}" for rank in range(world)]
    more = [f"and {world - SHOWN} more"] if world > SHOWN else []
    return ", ".join(lines[:SHOWN] + more)


def _words(rank: Activity, limits: ScalingConfig) -> str:
    if rank.silent_s > limits.health_timeout_s:
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
