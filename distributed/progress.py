"""Between the workers and the person who watches: progress and words one way, the wish to stop the
other.

Workers run on other machines and their prints arrive late and prefixed; so rank 0 tells a small
actor where the run stands, and the command that started it reads the actor and draws the bar. All
ranks tell the actor what they do, so that it notices a hang.
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distributed.config import ScalingConfig
from distributed.hang import Activity, Phase, find_hang

POLL_INTERVAL_S = 0.5
"""Seconds between two messages of a worker."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of progress where the output is a file or a job's log."""

FIRST_STEPS, RECENT_STEPS = 3, 32
"""Steps of a worker that are not measured, for they may compile and tune; and how many of the
latest ones are."""

PAUSE_S = 5.0
"""Most seconds that one round of a reporter counts as spent without progress. A longer one says
that the process itself was paused, with its container for instance, and no hang."""

WHERE_AFTER_S = 5.0
"""Seconds without progress after which a rank also tells the line of code that it is at."""

HUNG = 70
"""Exit code of a worker that ends itself because the run hangs."""

PACKAGES = Path(__file__).resolve().parent.parent
OWN = ("distributed", "measnet", "shards")
"""Packages whose line of code says the most about where a rank is."""


@dataclass(frozen=True)
class Message:
    """What a worker tells the actor, twice a second."""

    worker: str
    """Identity of the process: a restarted rank has another one."""
    rank: int
    world: int
    activity: Activity
    progress: dict[str, Any] | None = None
    """Where the run stands; None if unchanged, or not this rank's task to tell."""


@dataclass(frozen=True)
class Answer:
    """What the actor answers."""

    stop: str = ""
    """Why to write a checkpoint and end; empty while nobody has asked."""
    hang: str = ""
    """Why the run counts as hung, so that this worker has to end itself; empty while it does
    not."""


class Monitor:
    """The actor's side: holds the latest progress, the lines to show, and the reason to stop."""

    def __init__(self, patience: ScalingConfig) -> None:
        """Nothing is known yet; `patience` says when a run counts as hung."""
        self._patience = patience
        self._least_limit_s = min(patience.health_timeout_s, patience.collective_timeout_s)
        self._progress: dict[str, Any] = {}
        self._lines: list[str] = []
        self._stop = ""
        self._heard = time.monotonic()
        self._ranks: dict[int, tuple[Message, float]] = {}
        self._hung: dict[str, str] = {}

    def exchange(self, message: Message) -> Answer:
        """Take what a worker tells; answers what it has to do."""
        now = time.monotonic()
        self._progress = message.progress or self._progress
        self._heard = now
        self._ranks[message.rank] = message, now
        if message.worker not in self._hung and message.activity.idle_s > self._least_limit_s:
            self._look_for_hang(message.world, now)
        return Answer(self._stop, self._hung.get(message.worker, ""))

    def _look_for_hang(self, world: int, now: float) -> None:
        activities = {}
        for rank, (message, heard) in self._ranks.items():
            told, silent = message.activity, now - heard
            activities[rank] = replace(told, idle_s=told.idle_s + silent, silent_s=silent)
        reason = find_hang(activities, world, self._patience)
        if reason:
            self._lines.append(reason)
            # Each of these workers ends, also one that goes on at this very moment: its group is
            # restarted as a whole. Workers that come later are others.
            self._hung |= {message.worker: reason for message, _ in self._ranks.values()}

    def say(self, line: str) -> None:
        """Take a line for the person who watches."""
        self._lines.append(line)

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and end after the present step."""
        self._stop = self._stop or reason

    def read(self, shown: int) -> tuple[dict[str, Any], list[str], float]:
        """Progress, the lines after the first `shown`, seconds since a worker was last heard."""
        return self._progress, self._lines[shown:], time.monotonic() - self._heard


def start_monitor(patience: ScalingConfig) -> Any:
    """Start the actor; it ends with the process that started it.

    It lives on that process's node: on another one it could die with a node while the run goes on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Monitor).remote(patience)


class Reporter:
    """A worker's side: a thread tells the actor twice a second that it lives, and where it stands.

    In a thread, so that a long step, validation or compilation is not taken for a lost worker, and
    so that the loop never waits for the actor. The thread also ends the process where the actor
    says that the run hangs: the loop's own thread cannot, it waits in a collective. Ray sees a
    dead worker, and restarts all of them.
    """

    def __init__(
        self, monitor: Any, rank: int, world: int, *, on_hang: Callable[[str], object]
    ) -> None:
        """Talk to this actor; to be made in the thread that trains.

        Args:
            monitor: the actor.
            rank: this worker's rank; rank 0 also shows progress and lines.
            world: number of ranks.
            on_hang: called with the reason, just before the process ends because of a hang.
        """
        self._monitor, self._rank, self._world = monitor, rank, world
        self._on_hang, self._trains = on_hang, threading.get_ident()
        self._worker = uuid.uuid4().hex
        self._progress: dict[str, Any] = {}
        self._phase: Phase = "start"
        self._step, self._marks = 0, 0
        self._step_ended: float | None = None
        self._steps = 0
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step_s: float | None = None
        self._closed = threading.Event()
        self.stop_reason = ""
        """Why to stop; empty while nobody has asked."""
        self._thread = threading.Thread(target=self._talk, name="reporter", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank does from now on, and for which step (from 1) if that is another."""
        self._phase = phase
        self._step = self._step if step is None else step
        self._marks += 1

    def made_progress(self) -> None:
        """Note that a part of the present phase is done."""
        self._marks += 1

    def step_made(self) -> None:
        """Note that a step is done, and how long it took."""
        now = time.monotonic()
        self._marks += 1
        self._steps += 1
        if self._step_ended is not None and self._steps > FIRST_STEPS:
            self._step_seconds.append(now - self._step_ended)
            self._step_s = statistics.median(self._step_seconds)
        self._step_ended = now

    def update(self, progress: dict[str, Any]) -> None:
        """Note where the run stands; the thread sends it."""
        self._progress = progress

    def say(self, line: str, *, from_any_rank: bool = False) -> None:
        """Show a line to the person who watches."""
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
            told = self._monitor.exchange.remote(self._message(idle_s))
            try:
                answer = ray.get(told, timeout=30)
            except ray.exceptions.GetTimeoutError:
                continue  # the machine that shows the run is busy
            except ray.exceptions.RayError:
                return  # whoever started the run has gone, and Ray ends its workers
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
        progress = self._progress if self._rank == 0 else None
        return Message(self._worker, self._rank, self._world, activity, progress)

    def _end(self, reason: str) -> None:
        """End this process; Ray's log of the worker gets the stacks of all threads."""
        try:
            # In a thread, for the disk it writes to may be what hangs.
            threading.Thread(target=self._on_hang, args=(reason,), daemon=True).start()
            faulthandler.dump_traceback(file=2)
            time.sleep(2 * POLL_INTERVAL_S)  # the line is shown before Ray tells of lost workers
        finally:
            os._exit(HUNG)  # no clean-up: it would wait for the thread that hangs


def where(thread: int) -> str:
    """`distributed/session.py:316, _agree`: the innermost line of this project that a thread is at.

    Empty if the thread is at none.
    """
    frame = sys._current_frames().get(thread)
    for entry in reversed(traceback.extract_stack(frame) if frame else []):
        path = Path(entry.filename)
        if path.is_relative_to(PACKAGES) and path.relative_to(PACKAGES).parts[0] in OWN:
            return f"{path.relative_to(PACKAGES)}:{entry.lineno}, {entry.name}"
    return ""


class Display:
    """The watcher's side: lines, and below them a bar on a terminal or a line now and then
    elsewhere."""

    def __init__(
        self, monitor: Any, console: Console, total: int, patience: ScalingConfig, wanted: str
    ) -> None:
        """Show a run of `total` samples whose workers need `wanted`, resources in words."""
        self._monitor, self._console, self._total = monitor, console, total
        self._patience, self._wanted = patience, wanted
        self._shown = 0
        self._plain_at = time.monotonic() + PLAIN_INTERVAL_S
        self._silent_s = 0.0
        self._heard = time.monotonic()
        self._complain_after_s = patience.start_timeout_s
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
        """Show what happens until `finished` says so, or no worker was heard for too long."""
        task = self._bar.add_task("train", total=self._total, text="starting workers")
        with self._bar:
            while not finished() and not self.given_up:
                self._refresh(task, plain=self._due())
                time.sleep(POLL_INTERVAL_S)
            self._refresh(task, plain=True)

    @property
    def given_up(self) -> bool:
        """Whether no worker was heard for longer than the limit."""
        return self._silent_s > self._patience.give_up_s

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
            return  # the run itself says what happened to it
        self._heard = time.monotonic() - self._silent_s
        self._shown += len(lines)
        for line in lines:
            self._print(line)
        if progress:
            text = progress_line(progress, self._total)
            self._bar.update(task, completed=progress["samples"], text=text)
            heard = self._silent_s < self._patience.start_timeout_s
            if plain and heard and not self._console.is_terminal:
                self._print(text)
        if self._silent_s > self._complain_after_s:
            self._complain_after_s += self._patience.start_timeout_s
            left = self._patience.give_up_s - self._silent_s
            self._print(
                f"no worker was heard for {self._silent_s:.0f} s; waiting for {self._wanted}, the "
                f"cluster has {free_resources()}; giving up in {max(0.0, left):.0f} s"
            )
        elif self._silent_s < self._patience.start_timeout_s:
            self._complain_after_s = self._patience.start_timeout_s

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def free_resources() -> str:
    """Free and all CPUs and GPUs of the cluster, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if total.get(kind)]
    there = " and ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s free" for kind in kinds)
    return there or "neither CPUs nor GPUs"


def progress_line(progress: dict[str, Any], total: int) -> str:
    """One line: samples, speed, loss, learning rate, share of time spent waiting for data, time
    left."""
    rate = progress["speed/samples_per_s"]
    left = (total - progress["samples"]) / rate if rate > 0 else float("inf")
    return (
        f"{progress['samples']:,}/{total:,} samples  {rate:.1f}/s  "
        f"loss {progress['train/loss']:.4f}  "
        f"lr {progress['train/learning_rate']:.2e}  data wait {progress['speed/data_wait']:.0%}  "
        f"left {_duration(left)}"
    )


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
