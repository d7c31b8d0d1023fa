"""How long a run may take to stop: to end its step and to write a last checkpoint."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from distributed.internals.ray_train import JOB, JOB_STOP_DEFAULT_S, JOB_STOP_S

FIRST_S = 30.0
"""Seconds for a last checkpoint if none was written yet."""
STEPS = 2
"""A stop waits for the current step; twice, because ranks may be one step apart."""
CHECKPOINTS = 2
"""The last checkpoint may have to wait until the one before is written."""
MARGIN_S = 10.0
"""Seconds to gather tensors from the workers and to end them."""
RESERVE_S = 2.0
"""Seconds of the platform's time that are left to this command to end itself."""


class StopLimit(NamedTuple):
    """How long a run may take to stop."""

    seconds: float
    """After so many seconds its workers are ended."""
    reason: str
    """Where the number comes from."""
    warning: str = ""
    """Set if it is too short for a last checkpoint: what is lost, and what to change."""


def platform_limit(
    configured_s: float, environment: Mapping[str, str] = os.environ
) -> float | None:
    """Seconds that the platform gives after a stop request, before it kills this command.

    Args:
        configured_s: `scaling.stop_grace_s`; 0: not configured.
        environment: of this process.

    Returns:
        None if the platform sets no limit, or none is known.
    """
    if configured_s:
        return configured_s
    if JOB in environment:
        return float(environment.get(JOB_STOP_S, JOB_STOP_DEFAULT_S))
    return None


def stop_limit(checkpoint_s: float, step_s: float, platform_s: float | None) -> StopLimit:
    """The limit of one stop.

    Args:
        checkpoint_s: how long the last checkpoint took; 0 before the first.
        step_s: how long a step usually takes; 0 before it is known.
        platform_s: from `platform_limit`.
    """
    needed = max(FIRST_S, MARGIN_S + STEPS * step_s + CHECKPOINTS * checkpoint_s)
    took = f"the last checkpoint took {checkpoint_s:.0f} s" if checkpoint_s else "no checkpoint yet"
    if platform_s is None:
        return StopLimit(needed, took)
    given = max(0.0, platform_s - RESERVE_S)
    reason = f"the platform gives {platform_s:.0f} s"
    likely = MARGIN_S + step_s + checkpoint_s
    if given >= likely:
        return StopLimit(given, reason)
    return StopLimit(
        given,
        reason,
        f"the platform ends this command after {platform_s:.0f} s, and a last checkpoint needs "
        f"about {likely:.0f} s ({took}); the steps since the last one may be lost. Raise "
        f"{JOB_STOP_S} on the head, or on Kubernetes terminationGracePeriodSeconds and "
        "--scaling.stop-grace-s",
    )


@contextmanager
def on_signal(handle: Callable[[str], object]) -> Iterator[None]:
    """Inside the block, call `handle` with the name of SIGINT or SIGTERM instead of raising.

    Does nothing outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: Any) -> None:
        handle("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
