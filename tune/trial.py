"""One trial: a full training run of `distributed.launch`, inside one of Ray Tune's actors.

The actor holds no weights and takes no CPU: the run's own workers do. It starts the run in a
thread, hands each validation to Tune, and when Tune has seen enough it asks the run to stop, which
leaves a checkpoint and an MLflow run that is complete. So nothing has to be killed, and nothing is
lost.
"""

import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import UserCallback
from ray.util.queue import Empty, Queue
from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.config import TrainConfig
from distributed.launch import GRACE_S, Outcome, launch
from measnet.config import from_dict, to_dict
from shards.storage import open_folder, read_json, write_json
from tune import costs
from tune.owner import ownership
from tune.space import apply

SPEC = "spec"
"""Key of a trial's configuration in Tune, below which all of it lies."""
OWNER_WAIT_S = 2 * GRACE_S + 30
"""Tune starts a trial again while its last actor is still writing a checkpoint."""
COSTS = "costs.json"
FAILURE = "failure.json"
STOPPED_BY_SEARCH = "stopped by the search"


class Mail(UserCallback):
    """Ray Train's side: puts each validation into the trial's letter box, once it is saved."""

    def __init__(self, box: Queue) -> None:
        """Deliver to `box`."""
        self._box = box

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Pass on what rank 0 reported, where it holds a validation."""
        if "psnr" in metrics[0]:
            self._box.put(dict(metrics[0]))


class Trial(tune.Trainable):
    """A run that Tune can watch, stop, pause, and have take over another's weights."""

    def setup(self, config: dict[str, Any]) -> None:
        """Only note what to run; `step` starts it."""
        config = config[SPEC]
        base = from_dict(TrainConfig, {**config["base"], "name": self.trial_name})
        self._config = apply(base, config["changes"])
        self._options = config["options"]
        self._costs: dict[str, float] = {}
        self._requests: list[str] = []
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._box: Queue | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next validation, or the end.

        Raises:
            RuntimeError: the run diverged or failed; the message is the reason, and is left in the
                trial's folder for the search.
        """
        try:
            return self._step()
        except Exception as error:
            fs, root = open_folder(self._config.folder)
            fs.makedirs(root, exist_ok=True)  # it may have failed before the run made its folder
            write_json(fs, f"{root}/{FAILURE}", {"reason": str(error)[:1000]})
            raise

    def _step(self) -> dict[str, Any]:
        if self._thread is None and self._search_stops():
            return {"interrupted": True, "done": True}
        self._start()
        while True:
            alive = self._running.is_alive()
            try:
                told = self._letter_box.get(timeout=0.5)
            except Empty:
                if not alive:
                    return self._end()
                if self._search_stops():
                    self._stop("the search was stopped")
                    return {"interrupted": True, "done": True}
                continue
            if not math.isfinite(told["psnr"]):
                self._stop("diverged")
                raise RuntimeError(
                    f"diverged: the validation's PSNR is {told['psnr']} at "
                    f"{told['samples']:,} samples"
                )
            return {**self._costs, "samples": told["samples"], "psnr": told["psnr"]}

    def cleanup(self) -> None:
        """Tune stops, pauses or ends the trial: have the run write a last checkpoint and end."""
        self._stop(STOPPED_BY_SEARCH)
        if self._box is not None:
            self._box.shutdown(force=True)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Point at the run's own newest checkpoint; nothing is copied."""
        newest = checkpoints.newest_whole(self._config.folder)
        return {"folder": self._config.folder, "name": newest.name if newest else ""}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from the own checkpoint, or take over the weights of another trial (PBT)."""
        if checkpoint and checkpoint["folder"] != self._config.folder:
            with ownership(self._config.folder, wait_s=OWNER_WAIT_S):
                take_over(checkpoint["folder"], checkpoint["name"], self._config)

    # ---- parts -----------------------------------------------------------------------------------

    @property
    def _running(self) -> threading.Thread:
        assert self._thread is not None
        return self._thread

    @property
    def _letter_box(self) -> Queue:
        assert self._box is not None
        return self._box

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._costs = self._count()
        self._box = Queue(actor_options={"num_cpus": 0})
        self._thread = threading.Thread(target=self._run, name="launch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _, root = open_folder(self._config.folder)
        local = Path(root) if Path(root).is_absolute() else Path.cwd()
        local.mkdir(parents=True, exist_ok=True)
        try:
            with (
                ownership(self._config.folder, wait_s=OWNER_WAIT_S),
                (local / "console.log").open("a") as log,
            ):
                self._outcome = launch(
                    self._config,
                    console=Console(file=log, width=120, no_color=True),
                    callbacks=[Mail(self._letter_box)],
                    tags=self._options["tags"] | {"measnet.trial": self.trial_name},
                    stop_requests=self._requests,
                    export=False,
                )
        except BaseException as error:
            self._error = error

    def _end(self) -> dict[str, Any]:
        if self._error is not None:
            raise RuntimeError(f"{type(self._error).__name__}: {self._error}") from self._error
        outcome = self._outcome
        assert outcome is not None
        if outcome.status not in ("finished", "already finished"):
            raise RuntimeError(reason(outcome.reason or outcome.status))
        told = outcome.validation or read_outcome(self._config.folder).get("validation") or {}
        psnr = told.get("psnr")
        result = {"samples": outcome.samples, "done": True, **self._costs}
        return result if psnr is None else {**result, "psnr": psnr}

    def _search_stops(self) -> bool:
        return os.path.exists(self._options["stop_file"])

    def _stop(self, why: str) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        self._requests.append(why)
        self._thread.join(GRACE_S + 15)

    def _count(self) -> dict[str, float]:
        """The costs of this network, counted once per trial and network."""
        fs, root = open_folder(self._config.folder)
        path, model = f"{root}/{COSTS}", to_dict(self._config.model)
        if fs.exists(path):
            known = read_json(fs, path)
            if known["model"] == json.loads(json.dumps(model)):
                return dict(known["costs"])
        counted = costs.count(self._config.model)
        if self._options["cost"] == "latency":
            use_gpu = self._options["gpu"]
            timed = ray.remote(costs.latency_ms).options(
                num_cpus=self._options["cpus"],
                num_gpus=1 if use_gpu else 0,
                scheduling_strategy="DEFAULT",  # not in the trial's own room, which holds no CPU
            )
            device = "cuda" if use_gpu else "cpu"
            counted["latency"] = ray.get(timed.remote(self._config.model, device))
        fs.makedirs(root, exist_ok=True)
        write_json(fs, path, {"model": model, "costs": counted})
        return counted


def reason(text: str) -> str:
    """Why a run ended, with the words by which a search sorts it."""
    if "updates in a row were skipped" in text:
        return f"diverged: {text}"
    if "OutOfMemory" in text or "out of memory" in text:
        return f"out of memory: {text}"
    return text


def read_outcome(folder: str) -> dict[str, Any]:
    """What the last launch of a run said at its end; empty where it had no time to."""
    fs, root = open_folder(folder)
    try:
        return dict(read_json(fs, f"{root}/outcome.json"))
    except (OSError, ValueError):
        return {}


def take_failure(folder: str) -> str:
    """Why the trial failed, in one line; empty where its process had no time to say."""
    fs, root = open_folder(folder)
    path = f"{root}/{FAILURE}"
    if not fs.exists(path):
        return ""
    lines = str(read_json(fs, path)["reason"]).strip().splitlines()
    fs.rm(path)
    return lines[-1] if lines else ""


def take_over(donor: str, name: str, config: TrainConfig) -> None:
    """Put a checkpoint of another run in the place of this run's own, under this run's recipe.

    Where that checkpoint has been pruned meanwhile, the donor's newest one is taken.

    Raises:
        ValueError: the donor holds no whole checkpoint.
    """
    whole = [c for c in checkpoints.listed(donor) if c.name == name and c.problem() is None]
    found = whole[0] if whole else checkpoints.newest_whole(donor)
    if found is None:
        raise ValueError(f"{donor} holds no whole checkpoint to take over")
    own = checkpoints.listed(config.folder)
    state = found.state()
    changed: dict[str, Any] = {"config": to_dict(config), "best": None, "finished": False}
    if own:
        changed["mlflow_run_id"] = own[-1].state().mlflow_run_id
    snapshot = checkpoints.Snapshot(
        dataclasses.replace(state, **changed),
        *(found.tensors(k) for k in ("weights", "ema", "optimizer")),
    )
    snapshot.write(config.folder)
    for checkpoint in own:
        checkpoint.remove()
