"""Between the workers and the person who watches: progress and words one way, the wish to stop the
other.

Workers run on other machines and their prints arrive late and prefixed; so rank 0 tells a small
actor where the run stands, and the command that started it reads the actor and draws the bar.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

POLL_INTERVAL_S = 0.5
"""Seconds between two messages of a worker."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of progress where the output is a file or a job's log."""


class Monitor:
    """The actor's side: holds the latest progress, the lines to show, and the reason to stop."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._progress: dict[str, Any] = {}
        self._lines: list[str] = []
        self._stop = ""

    def exchange(self, progress: dict[str, Any] | None) -> str:
        """Take where the run stands, if told; returns the reason to stop, empty where there is
        none."""
        self._progress = progress or self._progress
        return self._stop

    def say(self, line: str) -> None:
        """Take a line for the person who watches."""
        self._lines.append(line)

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and end after the present step."""
        self._stop = self._stop or reason

    def read(self, shown: int) -> tuple[dict[str, Any], list[str]]:
        """The latest progress, and the lines after the first `shown`."""
        return self._progress, self._lines[shown:]


def start_monitor() -> Any:
    """Start the actor; it ends with the process that started it."""
    return ray.remote(num_cpus=0)(Monitor).remote()


class Reporter:
    """A worker's side: never waits for the actor, and learns in passing whether to stop."""

    def __init__(self, monitor: Any, *, speaks: bool) -> None:
        """Talk to this actor; only the rank that `speaks` shows anything, all ask whether to
        stop."""
        self._monitor, self._speaks = monitor, speaks
        self._progress: dict[str, Any] = {}
        self._pending: Any = None
        self._next = 0.0
        self.stop_reason = ""

    def update(self, progress: dict[str, Any]) -> None:
        """Note where the run stands; sent with the next poll."""
        self._progress = progress
        self.poll()

    def poll(self) -> None:
        """Twice a second: send the progress, and take the answer to the time before."""
        if time.monotonic() < self._next:
            return
        if self._pending is not None:
            if not ray.wait([self._pending], timeout=0)[0]:
                return
            self.stop_reason = ray.get(self._pending) or self.stop_reason
        self._pending = self._monitor.exchange.remote(self._progress if self._speaks else None)
        self._next = time.monotonic() + POLL_INTERVAL_S

    def say(self, line: str) -> None:
        """Show a line to the person who watches."""
        if self._speaks:
            self._monitor.say.remote(line)


class Display:
    """The watcher's side: lines, and below them a bar on a terminal or a line now and then
    elsewhere."""

    def __init__(self, monitor: Any, console: Console, total: int) -> None:
        """Show a run of `total` samples."""
        self._monitor, self._console, self._total = monitor, console, total
        self._shown = 0
        self._stopped = threading.Event()
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
        """Show what happens until `finished` says so."""
        task = self._bar.add_task("train", total=self._total, text="starting workers")
        with self._bar:
            since_plain = PLAIN_INTERVAL_S
            while not finished():
                self._refresh(task, plain=since_plain >= PLAIN_INTERVAL_S)
                since_plain = 0.0 if since_plain >= PLAIN_INTERVAL_S else since_plain + 0.5
                self._stopped.wait(0.5)
            self._refresh(task, plain=True)

    def _refresh(self, task: TaskID, *, plain: bool) -> None:
        try:
            progress, lines = ray.get(self._monitor.read.remote(self._shown), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return  # the run itself says what happened to it
        self._shown += len(lines)
        for line in lines:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        if progress:
            text = progress_line(progress, self._total)
            self._bar.update(task, completed=progress["samples"], text=text)
            if plain and not self._console.is_terminal:
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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
