"""Runs a configuration on Ray: checks it, starts a cluster and the workers, and watches them.

Mistakes of the user are reported before Ray starts. Ray Train restarts lost workers; the same
command resumes from the last complete checkpoint.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.checkpoint import Checkpoint
from distributed.cluster import (
    GPU_ENVIRONMENT,
    cpus_per_worker,
    is_local,
    ray_cluster,
    ray_storage,
    starts_its_own_ray,
)
from distributed.config import TrainConfig, changed_fields, to_yaml
from distributed.decisions import training_device
from distributed.goodput import Goodput, Work, recording
from distributed.initial import check_architecture
from distributed.lease import DEAD_S, InUseError, Lease, exclusive
from distributed.run_log import join_parts
from distributed.stopping import on_signal, platform_limit, stop_limit
from measnet.errors import last_line
from measnet.hardware import Machine, this_machine
from measnet.hub import SMALL
from shards import patience
from shards.manifest import Manifest
from shards.manifest import read as read_manifest
from shards.order import Plan
from shards.storage import absolute, is_remote, local_copy, open_folder, write_json, write_whole
from shards.wording import counted

MODEL = "model.safetensors"
"""File of a finished run: the averaged weights, with the configuration inside."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    """`finished`, `stopped`, `failed`, or `already finished`."""
    folder: str
    """Folder or URI of the run."""
    reason: str = ""
    """Why it stopped or failed, in one line."""
    cause: str = ""
    """Why it failed, as a `distributed.guard.Cause`."""
    samples: int = 0
    """Samples that the run has consumed so far."""
    mlflow_run_id: str = ""
    """MLflow's id of the run."""
    tracking_uri: str = ""
    """The MLflow server or database."""
    seconds: float = 0.0
    """Duration of this launch."""
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation's report."""
    goodput: Goodput | None = None
    """What the time of all launches was spent on."""

    @property
    def exit_code(self) -> int:
        """0 if the run is finished, 130 if the user stopped it, 1 if it failed."""
        return {"finished": 0, "already finished": 0, "stopped": 130}.get(self.status, 1)


def resolve(config: TrainConfig) -> TrainConfig:
    """The same configuration with absolute paths, because workers run in other folders."""
    data = dataclasses.replace(
        config.data,
        train=absolute(config.data.train),
        validation=absolute(config.data.validation),
        cache_dir=_of_each_node(config.data.cache_dir),
    )
    init = config.init
    if init and not (init == SMALL and not Path(SMALL).exists()):
        init = absolute(init)
    return dataclasses.replace(config, storage=absolute(config.storage), init=init, data=data)


def _of_each_node(folder: str) -> str:
    """Absolute, except in the home of each node's user, `~`."""
    return folder if folder.startswith("~") else absolute(folder)


def check(config: TrainConfig) -> tuple[Manifest, Plan]:
    """Read the manifests, and check that they fit the configuration.

    Raises:
        ValueError: shards are missing, damaged or lack a task of the configuration; or `init` is of
            another architecture.
        OSError: there are no weights at `init`.
    """
    manifest = read_manifest(config.data.train, config.data.cache_dir)
    plan = Plan.from_manifest(manifest, config.data.repeats, config.seed, config.data.order)
    read_manifest(config.data.validation)
    if config.init and checkpoints.newest_complete(config.folder) is None:
        check_architecture(config.init, config.model)

    from shards.stream import TrainStream  # imports torch, so only after the manifests

    TrainStream(config.data, config.seed)  # checks that every shard of the manifest is there
    return manifest, plan


def check_resume(config: TrainConfig, plan: Plan) -> Checkpoint | None:
    """The checkpoint from which the run continues; None for a new one.

    Raises:
        ValueError: a run of the same name was started with another recipe or on other data.
    """
    newest = checkpoints.newest_complete(config.folder)
    if newest is not None:
        state = newest.state()
        if changed := changed_fields(state.config, config):
            raise ValueError(
                f"{config.folder} was started with {'; '.join(changed)}. "
                "Use those values to resume it, or another --name to start a new run"
            )
        plan.refuse_changed(state.plan)
    return newest


def launch(
    config: TrainConfig,
    *,
    console: Console | None = None,
    callbacks: Sequence[Any] = (),
    tags: Mapping[str, str] | None = None,
    stop_requests: list[str] | None = None,
    export: bool = True,
    wait_s: float = 0.0,
) -> Outcome:
    """Train, and return how the run ended.

    Args:
        config: of the run.
        console: for messages and progress.
        callbacks: Ray Train callbacks, called in its controller.
        tags: of the run in MLflow.
        stop_requests: append a reason to stop the run after a last checkpoint, as Ctrl-C does;
            append a second one to end it at once.
        export: whether a finished run writes model.safetensors and a model to MLflow.
        wait_s: seconds to wait for another command that trains this run.

    Raises:
        ValueError: see `check`, `check_resume` and `distributed.decisions.training_device`;
            `distributed.lease.InUseError` if another command trains this run.
    """
    console = console or Console(soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    patience.listen(say)
    config = resolve(config)
    manifest, plan = check(config)
    machine = this_machine() if starts_its_own_ray() else None
    known = checkpoints.newest_state(config.folder)
    if machine is not None and not (known and known.finished):
        training_device(config.scaling, len(machine.cards), machine)
        if machine.problem and config.scaling.device != "cpu":
            console.print(f"using no GPU: {machine.problem}", highlight=False, markup=False)

    with exclusive(config.folder, wait_s=wait_s, say=say) as lease:
        started = time.monotonic()
        newest = check_resume(config, plan)
        if newest is not None and newest.state().finished:
            return _already_finished(config, newest, console, export=export)
        _show_plan(console, config, plan)
        run, cost = _describe(config, manifest, tags)
        fit = _Fit(config, machine, run, lease, console, newest, cost, started)
        outcome = _train(fit, callbacks, [] if stop_requests is None else stop_requests)
        if outcome.status == "finished":
            join_parts(config.folder)
            if export:
                _export(config, dataclasses.replace(run, id=outcome.mlflow_run_id))
        fs, root = open_folder(config.folder)
        write_json(fs, f"{root}/outcome.json", dataclasses.asdict(outcome))
    return outcome


def _train(fit: "_Fit", callbacks: Sequence[Any], signals: list[str]) -> Outcome:
    """Start Ray and train; MLflow gets the end."""
    from distributed import mlflow_tracker

    run, folder = fit.tracking, fit.config.folder
    try:
        with ray_cluster(fit.config, fit.console):
            ended = fit.run(callbacks, signals)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        mlflow_tracker.finish(run, "KILLED" if stopped else "FAILED", folder)
        raise
    if ended.goodput is not None:
        mlflow_tracker.annotate(run, {}, ended.goodput.metrics(), ended.samples)
    status = {"finished": "FINISHED", "stopped": "KILLED"}.get(ended.status, "FAILED")
    run = mlflow_tracker.finish(run, status, folder)  # type: ignore[arg-type]
    seconds = time.monotonic() - fit.started
    return dataclasses.replace(ended, seconds=seconds, tracking_uri=run.uri, mlflow_run_id=run.id)


def _already_finished(
    config: TrainConfig, newest: Checkpoint, console: Console, *, export: bool
) -> Outcome:
    """Say that the run is finished; export the model if an earlier command was ended before."""
    from distributed import mlflow_tracker

    key = mlflow_tracker.run_key(config.folder)
    fs, root = open_folder(config.folder)
    if export and not fs.exists(f"{root}/{MODEL}"):
        run = mlflow_tracker.prepare(config.tracking, name=config.name, key=key)
        _export(config, run)
        mlflow_tracker.finish(run, "FINISHED", config.folder)
        join_parts(config.folder)
    out = f" --out {config.name}" if is_remote(config.folder) else ""
    console.print(
        f"{config.folder} is finished: {newest.samples:,} samples. "
        f"Next: python -m distributed.evaluate {config.folder} {config.data.validation}{out}"
    )
    return Outcome("already finished", config.folder, samples=newest.samples)


@dataclass
class _Fit:
    """Starts the workers and watches them."""

    config: TrainConfig
    machine: Machine | None
    tracking: Any
    """The run in MLflow."""
    lease: Lease
    console: Console
    newest: Checkpoint | None
    """From which it continues."""
    cost: Mapping[str, float]
    started: float
    """`time.monotonic()` at the start of the command."""

    def run(self, callbacks: Sequence[Any], signals: list[str]) -> Outcome:
        """Train; one signal asks the workers to stop, a second one ends them."""
        import ray
        from ray.train import ControllerError

        from distributed.internals.ray import NodeWatch, version_warning
        from distributed.progress import Display, start_monitor
        from distributed.restarts import NoProgressError

        config, console, scaling = self.config, self.console, self.config.scaling
        if warning := version_warning():
            console.print(f"[yellow]warning[/yellow]: {warning}")
        monitor = start_monitor(scaling)
        trainer, wanted = self._trainer(monitor, callbacks)
        ended: dict[str, Any] = {}

        def fit() -> None:
            try:
                ended["result"] = trainer.fit()
            except ControllerError as error:
                stuck = isinstance(error.controller_failure, NoProgressError)
                ended["error"] = error.controller_failure if stuck else error
            except BaseException as error:
                ended["error"] = error

        # In another thread: in the main thread Ray would handle Ctrl-C and drop the last steps.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        stop_by = math.inf
        nodes = NodeWatch()
        work = Work([], self._checkpoint_s, 0.0)

        def ask() -> Work:
            nonlocal work
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # the last is kept
                work = ray.get(monitor.work.remote(), timeout=5)
            return work

        def over() -> bool:
            nonlocal stop_by
            if scaling.elastic:
                nodes.look()
            if signals and stop_by == math.inf:
                monitor.request_stop.remote(signals[0])
                stop_by = time.monotonic() + self._stop_limit(signals[0], ask())
            late = time.monotonic() > stop_by
            return not thread.is_alive() or late or len(signals) > 1 or bool(self.lease.lost)

        total = config.recipe.steps * config.recipe.global_batch
        with (
            on_signal(signals.append),
            recording(config.folder, self.started, lambda: ask().attempts) as account,
        ):
            thread.start()
            display = Display(monitor, console, total, scaling, wanted)
            display.run_until(over)
            spent = account()
        if display.given_up:
            ended["error"] = TimeoutError(
                f"no message from a worker for {scaling.give_up_s:.0f} s (scaling.give_up_s); "
                f"the run needs {wanted}"
            )
        if self.lease.lost:
            ended["error"] = InUseError(
                f"this command did not reach the storage for {DEAD_S:.0f} s, and {self.lease.lost}"
            )
        return dataclasses.replace(_outcome(config, ended, signals), goodput=spent)

    @property
    def _checkpoint_s(self) -> float:
        """How long the newest checkpoint took to write; 0 if that is not known."""
        return float(self.newest.marker.get("seconds", 0.0)) if self.newest else 0.0

    def _stop_limit(self, signal: str, work: Work) -> float:
        """Seconds that the workers may take to stop; says so."""
        limit = stop_limit(
            work.checkpoint_s or self._checkpoint_s,
            work.step_s,
            platform_limit(self.config.scaling.stop_grace_s),
        )
        self.console.print(
            f"{signal}: writing a last checkpoint, for at most {limit.seconds:.0f} s "
            f"({limit.reason}); repeat it to end at once",
            highlight=False,
        )
        if limit.warning:
            self.console.print(f"[yellow]warning[/yellow]: {limit.warning}", highlight=False)
        return limit.seconds

    def _trainer(self, monitor: Any, callbacks: Sequence[Any]) -> tuple[Any, str]:
        """Ray's trainer; and the resources that it needs, as text."""
        import ray
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from distributed.environment import driver_process
        from distributed.internals.ray import RecountBeforeStart, ShardTrainer
        from distributed.internals.ray_train import forget_listed_checkpoints
        from distributed.restarts import EndWithoutProgress
        from distributed.worker import train_loop
        from measnet.config import to_dict

        config = self.config
        scaling, (low, high) = config.scaling, config.scaling.bounds
        device = training_device(scaling, ray.cluster_resources().get("GPU", 0), self.machine)
        use_gpu = device == "cuda"
        cpus = cpus_per_worker(config, local=is_local(), use_gpu=use_gpu)
        forget_listed_checkpoints(*open_folder(config.folder))
        samples = self.newest.samples if self.newest else 0
        trainer = ShardTrainer(
            train_loop,
            train_loop_config={
                "config": to_dict(config),
                "device": device,
                "monitor": monitor,
                "tracking": self.tracking,
                "owner": self.lease.owner.token,
                "driver_process": driver_process(),
                "multiply_adds": self.cost["multiply_adds"],
            },
            torch_config=TorchConfig(
                backend="nccl" if use_gpu else "gloo", timeout_s=int(scaling.collective_timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=(low, high) if scaling.elastic else high,
                use_gpu=use_gpu,
                elastic_resize_monitor_interval_s=scaling.resize_interval_s,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name=config.name,
                **ray_storage(config.storage),
                worker_runtime_env={"env_vars": GPU_ENVIRONMENT} if use_gpu else None,
                # `EndWithoutProgress` limits the restarts. The display limits the wait for
                # workers, because it can say what is missing.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[
                    *callbacks,
                    EndWithoutProgress(config.folder, scaling.max_failures, samples),
                    *([RecountBeforeStart()] if scaling.elastic else []),
                ],
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        each = counted(cpus, "CPU") + " and 1 GPU" * use_gpu
        workers = "1 worker" if scaling.workers == "1" else f"{scaling.workers} workers"
        return trainer, f"{workers} of {each}"


def _outcome(config: TrainConfig, ended: dict[str, Any], signals: list[str]) -> Outcome:
    if "error" in ended or "result" not in ended:  # failed, or ended without a result
        newest = checkpoints.newest_complete(config.folder)
        samples = newest.samples if newest else 0
        if "error" in ended:
            from distributed.guard import cause_of

            error = ended["error"]
            return Outcome(
                "failed", config.folder, _cause_in_a_line(error), cause_of(error), samples
            )
        return Outcome("stopped", config.folder, signals[0] if signals else "", samples=samples)
    result = ended["result"].return_value
    status = "finished" if result["finished"] else "stopped"
    return Outcome(
        status,
        config.folder,
        result["stop_reason"],
        samples=result["samples"],
        validation=result["validation"],
    )


def _show_plan(console: Console, config: TrainConfig, plan: Plan) -> None:
    epochs = config.recipe.samples / plan.epoch_samples
    stages = config.data.crop_stages(config.recipe.samples)
    crops = ", then ".join(f"{samples:,} of {side}" for samples, side in stages)
    console.print(
        f"[bold]{config.name}[/bold]: {config.recipe.samples:,} samples = {config.recipe.steps:,} "
        f"steps of {config.recipe.global_batch} = {epochs:.1f} epochs of {plan.epoch_samples:,}, "
        f"workers {config.scaling.workers}; crops: {crops}",
        highlight=False,
        soft_wrap=True,
    )


def _describe(
    config: TrainConfig, manifest: Manifest, tags: Mapping[str, str] | None
) -> tuple[Any, dict[str, float]]:
    """Write the configuration, and tell MLflow what the run is made of; the run in MLflow, and the
    network's cost."""
    from distributed import mlflow_tracker
    from measnet.complexity import network_cost

    fs, root = open_folder(config.folder)
    fs.makedirs(root, exist_ok=True)
    write_whole(fs, f"{root}/config.yaml", to_yaml(config).encode())
    run = mlflow_tracker.prepare(
        config.tracking, name=config.name, key=mlflow_tracker.run_key(config.folder), tags=tags
    )
    validation, cost = read_manifest(config.data.validation), network_cost(config.model)
    mlflow_tracker.describe(
        run,
        config,
        manifests={
            "training": (config.data.train, manifest.fingerprint),
            "validation": (config.data.validation, validation.fingerprint),
        },
        cost=cost,
    )
    return run, cost


def _export(config: TrainConfig, run: Any) -> None:
    """Write the final averaged weights to a file, and as a model to MLflow."""
    from distributed import mlflow_model

    newest = checkpoints.newest_complete(config.folder)
    if newest is None:
        return
    fs, root = open_folder(config.folder)
    newest.export(fs, f"{root}/{MODEL}")  # if this is interrupted, the same command writes it
    with local_copy(f"{config.folder}/{MODEL}") as weights:
        mlflow_model.log_model(run, weights)


def _cause_in_a_line(error: BaseException) -> str:
    """The cause of a failure: the last line of the first failed worker's exception."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    return last_line(cause)
