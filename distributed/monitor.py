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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distributed.config import ScalingConfig

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
        self._heard = time.monotonic()

    def exchange(self, progress: dict[str, Any] | None) -> str:
        """Take where the run stands, if told; returns the reason to stop, empty where none is."""
        self._progress = progress or self._progress
        self._heard = time.monotonic()
        return self._stop

    def say(self, line: str) -> None:
        """Take a line for the person who watches."""
        self._lines.append(line)

    def request_stop(self, reason: str) -> None:
        """Ask the workers to write a checkpoint and end after the present step."""
        self._stop = self._stop or reason

    def read(self, shown: int) -> tuple[dict[str, Any], list[str], float]:
        """Progress, the lines after the first `shown`, seconds since a worker was last heard."""
        return self._progress, self._lines[shown:], time.monotonic() - self._heard


def start_monitor() -> Any:
    """Start the actor; it ends with the process that started it.

    It lives on that process's node: on another one it could die with a node while the run goes on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Monitor).remote()


class Reporter:
    """A worker's side: a thread tells the actor twice a second that it lives, and where it stands.

    In a thread, so that a long step, validation or compilation is not taken for a lost worker, and
    so that the loop never waits for the actor.
    """

    def __init__(self, monitor: Any, *, speaks: bool) -> None:
        """Talk to this actor; only the rank that `speaks` shows anything, all ask whether to
        stop."""
        self._monitor, self._speaks = monitor, speaks
        self._progress: dict[str, Any] = {}
        self._closed = threading.Event()
        self.stop_reason = ""
        """Why to stop; empty while nobody has asked."""
        self._thread = threading.Thread(target=self._talk, name="reporter", daemon=True)
        self._thread.start()

    def update(self, progress: dict[str, Any]) -> None:
        """Note where the run stands; the thread sends it."""
        self._progress = progress

    def say(self, line: str, *, from_any_rank: bool = False) -> None:
        """Show a line to the person who watches."""
        if self._speaks or from_any_rank:
            self._monitor.say.remote(line)

    def close(self) -> None:
        """Send the last progress and end the thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _talk(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(POLL_INTERVAL_S)
            told = self._monitor.exchange.remote(self._progress if self._speaks else None)
            try:
                self.stop_reason = ray.get(told, timeout=30) or self.stop_reason
            except ray.exceptions.RayError:
                return  # whoever started the run has gone, and Ray ends its workers


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
