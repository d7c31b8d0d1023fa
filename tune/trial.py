"""One trial: a training run of `distributed.launch` inside an actor of Ray Tune.

The actor holds no weights and takes no CPU; the workers of its run do. It starts the run in a
thread and reports each validation to Tune as soon as a checkpoint holds it. To end a trial it asks
the run to stop, which leaves a checkpoint and a complete MLflow run.
"""

import contextlib
import dataclasses
import io
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.tune import Trainable
from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.config import TrainConfig
from distributed.guard import cause_of
from distributed.launch import Outcome, launch
from distributed.lease import exclusive
from measnet.config import replace_dotted, to_dict
from measnet.errors import last_line
from shards.storage import exists, is_remote, join, local_path, read, write

SPEC = "trial"
"""Key of a trial in Tune's configuration; its value has `name`, `changes` and known `costs`."""
CONSOLE = "console.log"
"""File of a trial: what its run prints."""
POLL_S = 0.5
"""Seconds between two checks for a validation."""
STOP_S = 600.0
"""Seconds that a stop may take at most; usually the run's own limit ends it earlier."""
TRIES = 5
"""Times that a checkpoint is looked for while its run replaces it by the next one."""
LOCK_WAIT_S = 60.0
"""Seconds to wait for a trial's last actor, which may still write a checkpoint."""


class Trial(Trainable):
    """A run that Tune can watch, stop and pause; with PBT it can take over other weights."""

    def setup(
        self,
        config: dict[str, Any],
        base: TrainConfig,
        search: str,
        stop_file: str,
        latency: bool,
    ) -> None:
        """Note what to run; the first `step` starts it.

        Args:
            config: of this trial, see `SPEC`.
            base: configuration that all trials of the search have in common.
            search: name of the search.
            stop_file: the search makes this file to stop all trials.
            latency: whether the latency is a cost of the search.
        """
        named = dataclasses.replace(base, name=self.trial_name)
        self._config = replace_dotted(named, config[SPEC]["changes"])
        self._costs: dict[str, float] = config[SPEC]["costs"]
        self._search, self._stop_file, self._latency = search, stop_file, latency
        self._donor: dict[str, Any] | None = None
        self._took_over: dict[str, Any] | None = None
        self._reported = 0
        self._stop_requests: list[str] = []
        self._thread: threading.Thread | None = None
        self._ended: Outcome | BaseException | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next validation or the end.

        A failure is a result too, with its `cause` and its `reason`. The first result after the
        trial took over weights says `took_over`.
        """
        try:
            result = self._next_result()
        except Exception as error:  # the search continues and shows the reason
            result = self._failure(cause_of(error), f"{type(error).__name__}: {last_line(error)}")
        if self._took_over:
            result["took_over"], self._took_over = self._took_over, None
        return result

    def cleanup(self) -> None:
        """Tune stops, pauses or ends the trial: the run writes a last checkpoint and ends."""
        self._stop("stopped by the search")

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Name the run's own newest checkpoint; nothing is copied."""
        there = checkpoints.listed(self._config.folder)
        name = there[-1].name if there else ""
        return {"folder": self._config.folder, "name": name, "costs": self._costs}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Resume from its own checkpoint, or take over the weights of another trial (PBT)."""
        if checkpoint:
            self._costs = checkpoint["costs"]  # the weights decide the network, and so its cost
            if checkpoint["folder"] != self._config.folder:
                self._donor = checkpoint

    def _next_result(self) -> dict[str, Any]:
        if self._donor is not None:  # even if the search stops: the values have changed already
            with exclusive(self._config.folder, wait_s=LOCK_WAIT_S):
                taken = take_over(self._donor["folder"], self._donor["name"], self._config)
            donor = self._donor["folder"].rpartition("/")[2]
            self._took_over, self._donor = {"from": donor, "samples": taken.samples}, None
        if self._thread is None and not self._search_stops():
            self._start()
        while True:
            if self._search_stops():
                self._stop("the search was stopped")
                return {"interrupted": True, "done": True}
            alive = self._running  # asked first, because an ended run has written all validations
            state = checkpoints.newest_state(self._config.folder)
            curve = state.validations if state else []
            for samples, psnr in curve:
                if samples > self._reported:
                    self._reported = samples
                    if math.isfinite(psnr):
                        return {"costs": self._costs, "samples": samples, "psnr": psnr}
                    self._stop("diverged")
                    return self._failure(
                        "diverged", f"the validation's PSNR is {psnr} at {samples:,} samples"
                    )
            if not alive:
                return self._result_at_end(curve)
            time.sleep(POLL_S)

    def _result_at_end(self, curve: list[tuple[int, float]]) -> dict[str, Any]:
        if isinstance(self._ended, BaseException):
            raise self._ended
        outcome = self._ended
        assert outcome is not None
        if outcome.status not in ("finished", "already finished"):
            return self._failure(outcome.cause or "other", outcome.reason or outcome.status)
        result = {"costs": self._costs, "samples": outcome.samples, "done": True}
        return result | ({"psnr": curve[-1][1]} if curve else {})

    def _failure(self, cause: str, reason: str) -> dict[str, Any]:
        return {"cause": cause, "reason": reason, "samples": self._reported, "done": True}

    def _start(self) -> None:
        state = checkpoints.newest_state(self._config.folder)
        # The search has read these from the checkpoint itself.
        self._reported = state.validations[-1][0] if state and state.validations else 0
        self._costs = self._costs or self._count_costs()
        self._thread = threading.Thread(target=self._run, name="launch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with console_log(self._config.folder) as log:
                self._ended = launch(
                    self._config,
                    console=Console(file=log, width=120, no_color=True),
                    tags={
                        "measnet.kind": "trial",
                        "measnet.search": self._search,
                        "measnet.trial": self.trial_name,
                    },
                    stop_requests=self._stop_requests,
                    export=False,
                    wait_s=LOCK_WAIT_S,
                )
        except BaseException as error:
            self._ended = error

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _search_stops(self) -> bool:
        return os.path.exists(self._stop_file)

    def _stop(self, why: str) -> None:
        if self._thread is not None and self._running:
            self._stop_requests.append(why)
            self._thread.join(STOP_S)

    def _count_costs(self) -> dict[str, float]:
        from measnet.complexity import latency_ms, network_cost

        costs = network_cost(self._config.model)
        if self._latency:
            scaling = self._config.scaling
            gpu = scaling.device == "gpu"
            timed = ray.remote(latency_ms).options(
                num_cpus=scaling.cpus_per_worker,
                num_gpus=int(gpu),
                scheduling_strategy="DEFAULT",  # not in the trial's placement group: it has no CPU
            )
            costs["latency"] = ray.get(timed.remote(self._config.model, "cuda" if gpu else "cpu"))
        return costs


@contextlib.contextmanager
def console_log(folder: str) -> Iterator[TextIO]:
    """The file for what a trial's run prints; in a store it appears when the run ends."""
    if not is_remote(folder):
        path = Path(local_path(folder)) / CONSOLE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            yield log
        return
    text = io.StringIO()
    try:
        yield text
    finally:
        before = read(join(folder, CONSOLE)) if exists(join(folder, CONSOLE)) else b""
        write(join(folder, CONSOLE), before + text.getvalue().encode())


def take_over(donor: str, name: str, config: TrainConfig) -> checkpoints.Checkpoint:
    """Replace the checkpoints of the run `config` by one of another run; its recipe stays.

    If that checkpoint was pruned meanwhile, use the donor's newest one.

    Raises:
        ValueError: the donor has no complete checkpoint.
    """
    for _ in range(TRIES):
        named = [c for c in checkpoints.listed(donor) if c.name == name and c.problem() is None]
        found = named[0] if named else checkpoints.newest_complete(donor)
        if found is None:
            raise ValueError(f"{donor} has no complete checkpoint to take over")
        with contextlib.suppress(FileNotFoundError):  # the donor has just replaced it
            state = found.state()
            tensors = [found.tensors(kind) for kind in ("weights", "ema", "optimizer")]
            break
    else:
        raise ValueError(f"{donor} replaced each of {TRIES} checkpoints while it was read")
    own = checkpoints.listed(config.folder)
    changed: dict[str, Any] = {"config": to_dict(config), "best": None, "finished": False}
    if own:
        changed["mlflow_run_id"] = own[-1].state().mlflow_run_id
    taken = checkpoints.Snapshot(
        dataclasses.replace(state, **changed),
        *tensors,
    ).write(config.folder)
    for checkpoint in own:
        checkpoint.remove()
    return taken
