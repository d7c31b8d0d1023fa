"""Progress of a run: the workers report to an actor, and the command on the terminal shows it.

Workers may run on other machines, and what they print arrives late and with a prefix. So rank 0
sends its progress to a small actor; the command that started the run reads the actor and draws the
bar. All ranks send what they are doing, so that the actor notices a hang. In its answer the actor
asks the workers to stop.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distributed.config import ScalingConfig
from distributed.goodput import Attempt, Work
from distributed.hang import Activity, Phase, find_hang

POLL_INTERVAL_S = 0.5
"""Seconds between two messages of a worker."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of progress where the output is a file or a job's log."""

FIRST_STEPS, RECENT_STEPS = 3, 32
"""The first steps of a worker are not timed, because they may compile and tune kernels. The step
time is the median of the most recent steps after them."""

PAUSE_S = 5.0
"""Seconds without progress that one round of a reporter adds at most. A longer round means that the
process was paused, for example with its container; this is not a hang."""

WHERE_AFTER_S = 5.0
"""Seconds without progress after which a rank also reports the line of code that it executes."""

PAUSES = {
    "validation": ("last validation", "speed/validate_s"),
    "checkpoint": ("last checkpoint", "speed/save_s"),
}
"""Phases between two steps -> how the line of progress names them, and the metric."""

HUNG = 70
"""Exit code of a worker that ends itself because the run hangs."""

PACKAGES = Path(__file__).resolve().parent.parent
OWN = ("distributed", "measnet", "shards")
"""Packages whose code is shown as the place where a rank waits."""


@dataclass(frozen=True)
class Message:
    """What a worker sends to the actor, twice a second."""

    worker: str
    """Id of the process; a restarted rank has a new one."""
    rank: int
    world: int
    activity: Activity
    progress: dict[str, Any] | None = None
    """Progress of the run; only rank 0 sends it. None: nothing to report."""
    attempt: Attempt | None = None
    """What this start of the workers has done so far; only rank 0 sends it."""


@dataclass(frozen=True)
class Answer:
    """The actor's answer to a message."""

    stop: str = ""
    """Why the workers should write a checkpoint and stop; empty: they should not stop."""
    hang: str = ""
    """Why the run counts as hung; then this worker ends itself. Empty: the run is not hung."""


class Monitor:
    """The actor: holds the latest progress, the lines to show, and the reason to stop."""

    def __init__(self, limits: ScalingConfig) -> None:
        """Start without messages; `limits` has the limits for a hang."""
        self._limits = limits
        self._least_limit_s = min(limits.health_timeout_s, limits.collective_timeout_s)
        self._progress: dict[str, Any] = {}
        self._lines: list[str] = []
        self._stop = ""
        self._heard = time.monotonic()
        self._ranks: dict[int, tuple[Message, float]] = {}
        self._hung: dict[str, str] = {}
        self._attempts: dict[str, Attempt] = {}

    def exchange(self, message: Message) -> Answer:
        """Receive a worker's message; returns what the worker has to do."""
        now = time.monotonic()
        self._progress = message.progress or self._progress
        self._heard = now
        self._ranks[message.rank] = message, now
        if message.attempt is not None:
            self._attempts[message.worker] = message.attempt
        if message.worker not in self._hung and message.activity.idle_s > self._least_limit_s:
            self._look_for_hang(message.world, now)
        return Answer(self._stop, self._hung.get(message.worker, ""))

    def _look_for_hang(self, world: int, now: float) -> None:
        activities = {}
        for rank, (message, heard) in self._ranks.items():
            activity, silent_s = message.activity, now - heard
            idle_s = activity.idle_s + silent_s
            activities[rank] = replace(activity, idle_s=idle_s, silent_s=silent_s)
        reason = find_hang(activities, world, self._limits)
        if reason:
            self._lines.append(reason)
            # All of these workers end, even one that has just continued, because Ray restarts the
            # whole group. The new workers have new ids.
            self._hung |= {message.worker: reason for message, _ in self._ranks.values()}

    def say(self, line: str) -> None:
        """Add a line to show on the terminal."""
        self._lines.append(line)

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and stop after the current step."""
        self._stop = self._stop or reason

    def work(self) -> Work:
        """See `Work`."""
        steps = [message.activity.step_s or 0.0 for message, _ in self._ranks.values()]
        checkpoint_s = float(self._progress.get("checkpoint_s", 0.0))
        return Work(list(self._attempts.values()), checkpoint_s, max(steps, default=0.0))

    def read(self, shown: int) -> tuple[dict[str, Any], list[str], float]:
        """Progress, the lines after the first `shown`, seconds since the last worker's message."""
        return self._progress, self._lines[shown:], time.monotonic() - self._heard


def start_monitor(limits: ScalingConfig) -> Any:
    """Start the actor; it ends with the process that started it.

    It runs on that process's node. On another node it could be lost while the run continues.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Monitor).remote(limits)


class Reporter:
    """The reporter of a worker: a thread sends its progress to the actor twice a second.

    It is a thread so that a long step, validation or compilation does not look like a lost worker,
    and so that the training loop never waits for the actor. If the actor reports a hang, this
    thread ends the process: the training thread cannot, because it waits in a collective. Ray then
    sees a dead worker and restarts all workers.
    """

    def __init__(
        self, monitor: Any, rank: int, world: int, *, on_hang: Callable[[str], object]
    ) -> None:
        """Start the thread; call this in the thread that trains.

        Args:
            monitor: the actor.
            rank: this worker's rank; rank 0 also sends progress and lines to show.
            world: number of ranks.
            on_hang: called with the reason, just before the process ends because of a hang.
        """
        self._monitor, self._rank, self._world = monitor, rank, world
        self._on_hang, self._trains = on_hang, threading.get_ident()
        self._worker = uuid.uuid4().hex
        self._progress: dict[str, Any] = {}
        self._phase: Phase = "start"
        self._attempt: Attempt | None = None
        self._spent: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._entered = time.monotonic()
        self._step, self._marks = 0, 0
        self._step_ended: float | None = None
        self._steps = 0
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step_s: float | None = None
        self._closed = threading.Event()
        self.stop_reason = ""
        """Why this worker should stop; empty: it should not stop."""
        self._thread = threading.Thread(target=self._talk, name="reporter", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Record the phase that begins now, and its step (from 1) if the step is a new one."""
        now = time.monotonic()
        took = now - self._entered
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + took
        if self._phase in PAUSES:
            self._pauses[PAUSES[self._phase][1]] = took
        self._phase, self._entered = phase, now
        self._step = self._step if step is None else step
        self._marks += 1

    def made_progress(self) -> None:
        """Record that a part of the current phase is done."""
        self._marks += 1

    def expect_compilation(self) -> None:
        """The next steps may compile and tune again, as the first ones did."""
        self._steps, self._step_s = 0, None
        self._step_seconds.clear()
        self._marks += 1

    def step_made(self) -> None:
        """Record that a step is done, and how long it took."""
        now = time.monotonic()
        self._marks += 1
        self._steps += 1
        if self._step_ended is not None and self._steps > FIRST_STEPS:
            self._step_seconds.append(now - self._step_ended)
            self._step_s = statistics.median(self._step_seconds)
        self._step_ended = now

    def update(self, progress: dict[str, Any]) -> None:
        """Record the progress of the run; the thread sends it."""
        self._progress = self._pauses | progress
        if self._attempt is not None:
            self._attempt.last = progress["samples"]

    def start_at(self, samples: int) -> None:
        """Record from which checkpoint this worker starts."""
        self._attempt = Attempt(samples, samples)

    def say(self, line: str, *, from_any_rank: bool = False) -> None:
        """Show a line on the terminal; by default only rank 0 does."""
        if self._rank == 0 or from_any_rank:
            self._monitor.say.remote(line)

    def close(self) -> None:
        """Send the last progress and end the thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _talk(self) -> None:
        last, marks, idle_s, before = False, 0, 0.0, time.monotonic()
        while not last:
            last = self._closed.wait(POLL_INTERVAL_S)
            now = time.monotonic()
            idle_s = 0.0 if marks != self._marks else idle_s + min(now - before, PAUSE_S)
            marks, before = self._marks, now
            pending = self._monitor.exchange.remote(self._message(idle_s))
            try:
                answer = ray.get(pending, timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue  # the machine that shows the run is busy
            except ray.exceptions.RayError:
                return  # the command that started the run has ended, and Ray ends its workers
            self.stop_reason = answer.stop or self.stop_reason
            if answer.hang:
                self._end(answer.hang)

    def _message(self, idle_s: float) -> Message:
        activity = Activity(
            phase=self._phase,
            step=self._step,
            idle_s=idle_s,
            step_s=self._step_s,
            where=where(self._trains) if idle_s > WHERE_AFTER_S else "",
        )
        message = Message(self._worker, self._rank, self._world, activity)
        if self._rank > 0 or self._attempt is None:
            return message
        spent = dict(self._spent)
        spent[self._phase] = spent.get(self._phase, 0.0) + time.monotonic() - self._entered
        attempt = replace(self._attempt, seconds=spent)
        return replace(message, progress=self._progress, attempt=attempt)

    def _end(self, reason: str) -> None:
        """End this process; the stacks of all threads go to the worker's log in Ray."""
        try:
            # In a thread, because it writes to a disk, and the disk may be what hangs.
            threading.Thread(target=self._on_hang, args=(reason,), daemon=True).start()
            faulthandler.dump_traceback(file=2)
            time.sleep(2 * POLL_INTERVAL_S)  # show the line before Ray reports lost workers
        finally:
            os._exit(HUNG)  # no clean-up: it would wait for the thread that hangs


def where(thread: int) -> str:
    """The innermost line of this project that a thread executes; empty if there is none.

    For example `distributed/session.py:316, _agree_on_checkpoint`.
    """
    frame = sys._current_frames().get(thread)
    for entry in reversed(traceback.extract_stack(frame) if frame else []):
        path = Path(entry.filename)
        if path.is_relative_to(PACKAGES) and path.relative_to(PACKAGES).parts[0] in OWN:
            return f"{path.relative_to(PACKAGES)}:{entry.lineno}, {entry.name}"
    return ""


class Display:
    """Shows lines, and below them a progress bar. If the output is not a terminal, it prints a line
    of progress every `PLAIN_INTERVAL_S` instead."""

    def __init__(
        self, monitor: Any, console: Console, total: int, limits: ScalingConfig, wanted: str
    ) -> None:
        """Show a run of `total` samples; `wanted`: the resources of its workers, as text."""
        self._monitor, self._console, self._total = monitor, console, total
        self._limits, self._wanted = limits, wanted
        self._shown = 0
        self._plain_at = time.monotonic() + PLAIN_INTERVAL_S
        self._silent_s = 0.0
        self._heard = time.monotonic()
        self._complain_after_s = limits.start_timeout_s
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def run_until(self, finished: Callable[[], bool]) -> None:
        """Show the run until `finished()`, or until no worker has sent a message for too long."""
        task = self._bar.add_task("train", total=self._total, text="starting workers")
        with self._bar:
            while not finished() and not self.given_up:
                self._refresh(task, plain=self._due())
                time.sleep(POLL_INTERVAL_S)
            self._refresh(task, plain=True)

    @property
    def given_up(self) -> bool:
        """Whether no worker has sent a message for longer than `scaling.give_up_s`."""
        return self._silent_s > self._limits.give_up_s

    def _due(self) -> bool:
        now = time.monotonic()
        if now < self._plain_at:
            return False
        self._plain_at = now + PLAIN_INTERVAL_S
        return True

    def _refresh(self, task: TaskID, *, plain: bool) -> None:
        try:
            progress, lines, self._silent_s = ray.get(
                self._monitor.read.remote(self._shown), timeout=5
            )
        except (ray.exceptions.RayError, TimeoutError):
            self._silent_s = time.monotonic() - self._heard
            return  # if the actor is lost, the run itself fails and says why
        self._heard = time.monotonic() - self._silent_s
        self._shown += len(lines)
        for line in lines:
            self._print(line)
        if progress:
            text = progress_line(progress, self._total)
            self._bar.update(task, completed=progress["samples"], text=text)
            heard = self._silent_s < self._limits.start_timeout_s
            if plain and heard and not self._console.is_terminal:
                self._print(text)
        if self._silent_s > self._complain_after_s:
            self._complain_after_s += self._limits.start_timeout_s
            self._print(
                f"no message from a worker for {self._silent_s:.0f} s; "
                + waiting_line("the run", self._wanted, self._silent_s, self._limits)
            )
        elif self._silent_s < self._limits.start_timeout_s:
            self._complain_after_s = self._limits.start_timeout_s

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def waiting_line(who: str, wanted: str, waited_s: float, limits: ScalingConfig) -> str:
    """What is waited for, what the cluster has, and when `who` gives up."""
    left = max(0.0, limits.give_up_s - waited_s)
    return (
        f"waiting for {wanted}; the cluster has {free_resources()}; {who} fails in {left:.0f} s "
        "(scaling.give_up_s)"
    )


def free_resources() -> str:
    """Free and total CPUs and GPUs of the cluster, as text."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind)]
    there = " and ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s free" for kind in kinds)
    return there or "no CPUs and no GPUs"


def progress_line(progress: dict[str, Any], total: int) -> str:
    """One line: samples, speed, loss, learning rate, the parts of a step, time left."""
    rate = progress["speed/samples_per_s"]
    left = (total - progress["samples"]) / rate if rate > 0 else float("inf")
    peak = progress.get("speed/peak_share")
    return (
        f"{progress['samples']:,}/{total:,} samples  {rate:.1f}/s"
        + ("" if peak is None else f" ({peak:.0%} of the card's peak)")
        + f"  loss {progress['train/loss']:.4f}  lr {progress['train/learning_rate']:.2e}  "
        f"{', '.join(_parts(progress))}  left {_duration(left)}"
    )


def _parts(progress: dict[str, Any]) -> Iterator[str]:
    """The times of a step's parts, and how long the last validation and checkpoint took."""
    apart = "speed/forward_s" in progress
    names = ("forward", "backward") if apart else ("forward_backward",)
    for name in (*names, "update"):
        shown = "passes" if name == "forward_backward" else name
        yield f"{shown} {_seconds(progress[f'speed/{name}_s'])}"
    yield f"data wait {progress['speed/data_wait']:.0%}"
    for shown, name in PAUSES.values():
        if name in progress:
            yield f"{shown} {_seconds(progress[name])}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
