"""What a run's time was spent on: the share that made progress which was kept.

Every start of the workers is an attempt. An attempt that ends in a failure loses the steps behind
its last checkpoint, and the next one makes them again.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shards.storage import finite, open_folder, read_json, write_json

FOLDER = "log/launches"
"""Folder of a run: a file per launch."""
KEEP_S = 10.0
"""Seconds between two writes of the launch that runs."""

log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One start of the workers, as rank 0 reported it."""

    first: int
    """Samples of the checkpoint from which it started."""
    last: int
    """Samples that it reached."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that rank 0 spent in each phase, see `distributed.hang.Phase`."""


class Work(NamedTuple):
    """What the workers of a launch have done so far."""

    attempts: list[Attempt]
    """One per start of the workers."""
    checkpoint_s: float
    """How long the last checkpoint took to write; 0 before the first."""
    step_s: float
    """How long a step usually takes; 0 before it is known."""


@dataclass
class Launch:
    """One command, from its start to its end."""

    seconds: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True)
class Goodput:
    """Of all launches of a run. Times are rank 0's seconds."""

    share: float
    """Seconds of steps that were kept, of all seconds; in [0, 1]."""
    samples_kept: int
    samples_repeated: int
    """Samples trained on again, because the steps were lost."""
    restarts: int
    seconds: float
    """Of all launches."""
    wait_nodes_s: float
    """Without workers: until Ray has placed and started them."""
    wait_data_s: float
    """For a batch."""
    wait_storage_s: float
    """For checkpoints to be written."""

    def __str__(self) -> str:
        """For the terminal."""
        return (
            f"{self.share:.0%} of {self.seconds:.0f} s: {self.samples_kept:,} samples kept, "
            f"{self.samples_repeated:,} repeated; waited {self.wait_nodes_s:.0f} s for nodes, "
            f"{self.wait_data_s:.0f} s for data, {self.wait_storage_s:.0f} s for storage"
        )

    def metrics(self) -> dict[str, float]:
        """For MLflow."""
        return {f"goodput/{name}": float(v) for name, v in dataclasses.asdict(self).items()}


def goodput(launches: Sequence[Launch]) -> Goodput:
    """Add up all launches of a run, in order."""
    attempts = [attempt for launch in launches for attempt in launch.attempts]
    seconds = sum(launch.seconds for launch in launches)
    spent: dict[str, float] = {}
    kept, repeated, useful_s = 0, 0, 0.0
    for number, attempt in enumerate(attempts):
        for phase, duration in attempt.seconds.items():
            spent[phase] = spent.get(phase, 0.0) + duration
        later = [other.first for other in attempts[number + 1 :]]
        # A killed command may not have reported its last steps, but the next attempt starts there.
        reached = max([attempt.last, *later[:1]])
        made = reached - attempt.first
        stays = max(0, min([reached, *later]) - attempt.first)
        kept, repeated = kept + stays, repeated + made - stays
        useful_s += attempt.seconds.get("step", 0.0) * stays / made if made else 0.0
    return Goodput(
        share=useful_s / seconds if seconds else 0.0,
        samples_kept=kept,
        samples_repeated=repeated,
        restarts=max(0, len(attempts) - 1),
        seconds=seconds,
        wait_nodes_s=max(0.0, seconds - sum(spent.values())),
        wait_data_s=spent.get("data", 0.0),
        wait_storage_s=spent.get("checkpoint", 0.0) + spent.get("end", 0.0),
    )


class Launches:
    """The launches of a run, in its storage; for its owner."""

    def __init__(self, run: str) -> None:
        """Read the earlier ones."""
        self._fs, root = open_folder(run)
        self._folder, self._earlier = f"{root}/{FOLDER}", list[Launch]()
        while self._fs.exists(self._path):  # not listed: some stores list new files late
            self._earlier.append(_launch(read_json(self._fs, self._path)))

    @property
    def _path(self) -> str:
        return f"{self._folder}/{len(self._earlier):05d}.json"

    def keep(self, launch: Launch) -> Goodput:
        """Write the launch of this command, again and again; the sum so far."""
        self._fs.makedirs(self._folder, exist_ok=True)
        write_json(self._fs, self._path, finite(dataclasses.asdict(launch)))
        return goodput([*self._earlier, launch])


@contextmanager
def recording(
    run: str, since: float, attempts: Callable[[], list[Attempt]]
) -> Iterator[Callable[[], Goodput]]:
    """Inside the block, write the launch to the storage every `KEEP_S` seconds.

    Args:
        run: folder or URI of the run.
        since: `time.monotonic()` at the start of the command.
        attempts: asks for them; called in another thread.

    Yields:
        A function that writes the launch once more and returns the sum of all launches.
    """
    launches, launch, ended = Launches(run), Launch(), threading.Event()
    lock = threading.Lock()

    def keep() -> Goodput:
        with lock:
            launch.attempts = attempts()
            launch.seconds = time.monotonic() - since
            return launches.keep(launch)

    def work() -> None:
        while not ended.wait(KEEP_S):
            try:
                keep()
            except OSError as error:  # these numbers are not worth a run
                log.warning("the time spent could not be written: %s", error)

    thread = threading.Thread(target=work, name="goodput", daemon=True)
    thread.start()
    try:
        yield keep
    finally:
        ended.set()


def _launch(data: dict[str, Any]) -> Launch:
    return Launch(data["seconds"], [Attempt(**attempt) for attempt in data["attempts"]])
