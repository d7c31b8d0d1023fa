"""From a configuration to a run on Ray: checks first, then a cluster, then workers, watched to the
end.

Everything a user can get wrong is found before Ray starts. Ray Train restarts lost workers; the
command itself, given again, goes on from the last whole checkpoint.
"""

import dataclasses
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.checkpoint import Checkpoint
from distributed.config import TrainConfig, as_metrics, to_yaml
from shards.manifest import Manifest
from shards.manifest import read as read_manifest
from shards.order import Plan
from shards.storage import absolute, open_folder, write_json, write_whole

GRACE_S = 12.0
"""Seconds that a run asked to stop may take to end by itself before it is ended."""

FREE_TO_CHANGE = ("name", "storage", "scaling.", "every.", "guard.", "tracking.", "engine.")
"""Fields that may differ when a run goes on: they do not change what is learnt beyond rounding."""

FREE_DATA_FIELDS = ("train", "validation", "loader_workers", "prefetch", "cache_dir", "cache_gib")
"""Fields of `data` that may differ when a run goes on; the shards' fingerprint is compared
instead."""


MODEL = "model.safetensors"
"""File of a finished run: the averaged weights, with the configuration inside."""

PLACEMENT_S = 2.0
"""Seconds to wait for the workers of a range: what Ray has set apart for them is there at once, or
its node is lost, and as many workers as are left have to be asked for."""

LEAVE_S = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
"""Environment variable: how long the workers' process group may take its leave. A hung worker never
does, and Ray would wait 30 s before it replaces it."""

LOCAL_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""What a Ray of this machine alone runs with, unless the caller's environment says otherwise.

Threads that wait for work stay awake for a fraction of a millisecond: from one operation to the
next, yet not so long that the loader and other workers miss the core. Memory of one step stays for
the next: given back, its pages would have to be zeroed for each step again (malloc's limits; all
three, for one alone would switch off the others' adjustment). Nobody announces that one's
own machine will be taken away, and the watcher for it is a process."""

_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
"""What people need to see comes through the monitor; Ray keeps the workers' own logs."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    """`finished`, `stopped`, `failed`, or `already finished`."""
    folder: str
    """Folder or URI of the run."""
    reason: str = ""
    """Why it stopped or failed, in one line."""
    samples: int = 0
    """Samples consumed by the run so far."""
    mlflow_run_id: str = ""
    """Where MLflow keeps it."""
    tracking_uri: str = ""
    """The MLflow server or database."""
    seconds: float = 0.0
    """Duration of this launch."""
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation's report."""

    @property
    def exit_code(self) -> int:
        """0 where the run is finished; 130 where the user stopped it; 1 where it failed."""
        return {"finished": 0, "already finished": 0, "stopped": 130}.get(self.status, 1)


def resolve(config: TrainConfig) -> TrainConfig:
    """The same configuration with absolute places: workers run in folders of their own."""
    data = dataclasses.replace(
        config.data,
        train=absolute(config.data.train),
        validation=absolute(config.data.validation),
        cache_dir=absolute(config.data.cache_dir),
    )
    return dataclasses.replace(config, storage=absolute(config.storage), data=data)


def check(config: TrainConfig) -> tuple[Manifest, Plan, Checkpoint | None]:
    """Read the manifests and the run's last checkpoint, and see that they fit the configuration.

    Raises:
        ValueError: shards that are missing, damaged or without a task that is asked for; a run of
            the same name that was started with another recipe or on other data.
    """
    manifest = read_manifest(config.data.train)
    plan = Plan.from_manifest(manifest, config.data.repeats, config.seed, config.data.order)
    read_manifest(config.data.validation)

    from shards.stream import TrainStream  # brings torch: not before the manifests are there

    TrainStream(config.data, config.seed)  # sees that every shard of the manifest is there
    found = checkpoints.newest_whole(config.folder)
    if found is not None:
        state = found.state()
        changed = _changes(state.config, config)
        if changed:
            raise ValueError(
                f"{config.folder} was started with {'; '.join(changed)}. "
                "Take those values to go on with it, or another --name to start a new run"
            )
        plan.refuse_changed(state.plan)
    return manifest, plan, found


def _changes(old: dict[str, Any], new: TrainConfig) -> list[str]:
    free_data = tuple(f"data.{name}" for name in FREE_DATA_FIELDS)
    before, after = _flat(old), as_metrics(new)
    return [
        f"{name} {before[name]} (now {value})"
        for name, value in after.items()
        if not name.startswith(FREE_TO_CHANGE)
        and name not in free_data
        and name in before
        and before[name] != value
    ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat


def launch(
    config: TrainConfig,
    *,
    console: Console | None = None,
    callbacks: Sequence[Any] = (),
    tags: Mapping[str, str] | None = None,
    stop_requests: list[str] | None = None,
    export: bool = True,
) -> Outcome:
    """Run a configuration to its end, and say how it ended.

    Args:
        config: what to run.
        console: where to show what happens.
        callbacks: Ray Train callbacks, called in its controller.
        tags: of the run in MLflow.
        stop_requests: who appends a reason stops the run as Ctrl-C does: after a last checkpoint;
            a second one ends it at once.
        export: whether a finished run leaves model.safetensors and a model in MLflow.

    Raises:
        ValueError: see `check`.
    """
    console = console or Console(soft_wrap=True)
    config = resolve(config)
    started = time.monotonic()
    manifest, plan, found = check(config)
    if found is not None and found.state().finished:
        return _already_finished(config, found, console, export=export)
    _show_plan(console, config, manifest, plan)

    from distributed import tracking

    fs, root = open_folder(config.folder)
    fs.makedirs(root, exist_ok=True)
    write_whole(fs, f"{root}/config.yaml", to_yaml(config).encode())
    run = tracking.prepare(
        config.tracking, name=config.name, key=tracking.run_key(config.folder), tags=tags
    )
    local_folder = Path(root) if "file" in fs.protocol else _scratch(run.key)
    _describe(run, config, manifest)

    try:
        with ray_cluster(config, console):
            requests = [] if stop_requests is None else stop_requests
            ended = _fit(config, run, local_folder, console, callbacks, requests)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        tracking.finish(run, "KILLED" if stopped else "FAILED", local_folder)
        raise
    outcome = dataclasses.replace(
        ended, seconds=time.monotonic() - started, tracking_uri=run.uri, mlflow_run_id=run.id
    )
    status = {"finished": "FINISHED", "stopped": "KILLED"}.get(outcome.status, "FAILED")
    run = tracking.finish(run, status, local_folder)  # type: ignore[arg-type]
    if outcome.status == "finished" and export:
        _export(config, run)
    write_json(fs, f"{root}/outcome.json", dataclasses.asdict(outcome))
    return outcome


def _already_finished(
    config: TrainConfig, found: Checkpoint, console: Console, *, export: bool
) -> Outcome:
    """Say so; and do what comes after training, where the command was ended just before it."""
    from distributed import tracking

    key = tracking.run_key(config.folder)
    fs, root = open_folder(config.folder)
    if export and not fs.exists(f"{root}/{MODEL}"):
        run = tracking.prepare(config.tracking, name=config.name, key=key)
        _export(config, run)
        tracking.finish(run, "FINISHED", Path(root) if "file" in fs.protocol else _scratch(key))
    console.print(
        f"{config.folder} is finished: {found.samples:,} samples. "
        f"Next: python -m distributed.evaluate {config.folder} {config.data.validation}"
    )
    return Outcome("already finished", config.folder, samples=found.samples)


def _fit(
    config: TrainConfig,
    run: Any,
    local_folder: Path,
    console: Console,
    callbacks: Sequence[Any],
    signals: list[str],
) -> Outcome:
    """Start the workers and watch them; a signal asks them to stop, a second one ends them."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from distributed.elastic import CountBeforeStart, NodeWatch
    from distributed.monitor import Display, start_monitor
    from distributed.trainer import ShardTrainer
    from distributed.worker import train_loop
    from measnet.config import to_dict

    monitor = start_monitor()
    scaling, (low, high) = config.scaling, config.scaling.bounds
    use_gpu = scaling.device == "gpu" or (
        scaling.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    cpus = _cpus_per_worker(config, local=not os.environ.get("RAY_ADDRESS"), use_gpu=use_gpu)
    wanted = f"{scaling.workers} workers of {cpus} CPUs" + (" and 1 GPU" if use_gpu else "")
    _forget_listed_checkpoints(config)
    trainer = ShardTrainer(
        train_loop,
        train_loop_config={
            "config": to_dict(config),
            "monitor": monitor,
            "tracking": run,
            "tracking_folder": str(local_folder),
        },
        torch_config=TorchConfig(timeout_s=int(scaling.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=(low, high) if scaling.elastic else high,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.name,
            **ray_storage(config.storage),
            # Waiting for workers is limited by the display, which can tell what is missing.
            failure_config=FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=-1
            ),
            callbacks=[*callbacks, *([CountBeforeStart()] if scaling.elastic else [])],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["result"] = trainer.fit()
        except BaseException as error:
            ended["error"] = error

    # In a thread of its own: Ray's handler of Ctrl-C, set in a main thread, would drop the last
    # steps.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    asked_at = 0.0
    nodes = NodeWatch()

    def over() -> bool:
        nonlocal asked_at
        if scaling.elastic:
            nodes.look()
        if signals and not asked_at:
            asked_at = time.monotonic()
            monitor.request_stop.remote(signals[0])
            console.print(f"{signals[0]}: writing a last checkpoint; once more ends at once")
        late = asked_at and time.monotonic() - asked_at > GRACE_S
        return not thread.is_alive() or bool(late) or len(signals) > 1

    total = config.recipe.steps * config.recipe.global_batch
    with on_signal(signals.append):
        thread.start()
        display = Display(monitor, console, total, scaling, wanted)
        display.run_until(over)
    if display.given_up:
        ended["error"] = TimeoutError(
            f"no worker was heard for {scaling.give_up_s:.0f} s (scaling.give_up_s) while "
            f"{wanted} were asked for"
        )
    return _outcome(config, ended, signals)


def _outcome(config: TrainConfig, ended: dict[str, Any], signals: list[str]) -> Outcome:
    if "error" in ended or "result" not in ended:  # failed, or ended before any answer
        newest = checkpoints.newest_whole(config.folder)
        samples = newest.samples if newest else 0
        if "error" in ended:
            return Outcome("failed", config.folder, _one_line(ended["error"]), samples)
        return Outcome("stopped", config.folder, signals[0] if signals else "", samples)
    told = ended["result"].return_value
    status = "finished" if told["finished"] else "stopped"
    return Outcome(
        status, config.folder, told["stop_reason"], told["samples"], validation=told["validation"]
    )


@contextmanager
def on_signal(tell: Callable[[str], object]) -> Iterator[None]:
    """Within it Ctrl-C and termination are told by name instead of raised; in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: Any) -> None:
        tell("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_cluster(config: TrainConfig, console: Console) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one of this machine alone for the time
    inside.

    The local one listens on 127.0.0.1 only and answers nobody without its token, which lives in
    this process's environment.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing phones home
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints each line twice
    # How often Ray Train looks at its workers: the lower, the sooner a lost one is replaced.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault(LEAVE_S, "5")
    patience = config.scaling.start_timeout_s
    if config.scaling.elastic:
        patience = min(patience, PLACEMENT_S)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    elsewhere = os.environ.get("RAY_ADDRESS")
    if not elsewhere and "ray" not in sys.modules:
        _require_token()
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scaling.health_timeout_s)
    import ray

    if ray.is_initialized():
        yield
        return
    if elsewhere:
        console.print(f"connecting to the Ray cluster at {elsewhere}")
        ray.init(runtime_env={"env_vars": {LEAVE_S: os.environ[LEAVE_S]}}, **_QUIET)
    else:
        # More workers than cores is slow, not wrong: how else to try a cluster's run at home?
        wanted = config.scaling.bounds[1] * _cpus_per_worker(config, local=True, use_gpu=False)
        start_local_ray(num_cpus=max(os.cpu_count() or 1, wanted))
    try:
        yield
    finally:
        ray.shutdown()


def _cpus_per_worker(config: TrainConfig, *, local: bool, use_gpu: bool) -> int:
    """As configured; else this machine's cores in equal parts, or what a cluster's node spares."""
    if config.scaling.cpus_per_worker:
        return config.scaling.cpus_per_worker
    if local:
        return max(1, (os.cpu_count() or 1) // config.scaling.bounds[1])
    return 4 if use_gpu else 1


def _require_token() -> None:
    """Have the local Ray answer this process's children only; Ray reads this once, at its
    import."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_local_ray(**options: Any) -> None:
    """Start Ray on this machine alone, bound to 127.0.0.1, its cores for the training steps."""
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray._private import services

    # Ray would put the machine's outward address in the place of 127.0.0.1, and listen there.
    outward = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    # Ray Train's helpers ask the cluster that RAY_ADDRESS names, else any that they find on this
    # machine; another one does not know this run, and they would take its workers for orphans.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pinned = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    os.environ.update(pinned)
    try:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            **_QUIET,
            **options,
        )
    finally:
        services.resolve_ip_for_localhost = outward
        for name in pinned:  # for Ray's own processes only
            del os.environ[name]


def ray_storage(storage: str) -> dict[str, Any]:
    """Where Ray keeps its own files of a run, as arguments of its RunConfig."""
    if "://" not in storage:
        return {"storage_path": storage}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = open_folder(storage)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _forget_listed_checkpoints(config: TrainConfig) -> None:
    """Remove Ray's own list of an earlier launch's checkpoints.

    Ours are found by looking at the folder and verified; Ray refuses to start where its list names
    one that has gone.
    """
    fs, root = open_folder(config.folder)
    snapshot = f"{root}/checkpoint_manager_snapshot.json"
    if fs.exists(snapshot):
        fs.rm(snapshot)


def _show_plan(console: Console, config: TrainConfig, manifest: Manifest, plan: Plan) -> None:
    epochs = config.recipe.samples / plan.epoch_samples
    console.print(
        f"[bold]{config.name}[/bold]: {config.recipe.samples:,} samples = {config.recipe.steps:,} "
        f"steps of {config.recipe.global_batch} = {epochs:.1f} epochs of {plan.epoch_samples:,}, "
        f"workers {config.scaling.workers}",
        highlight=False,
    )


def _describe(run: Any, config: TrainConfig, manifest: Manifest) -> None:
    from distributed import tracking

    validation = read_manifest(config.data.validation)
    tracking.describe(
        run,
        config,
        manifests={
            "training": (config.data.train, manifest.fingerprint),
            "validation": (config.data.validation, validation.fingerprint),
        },
        cost=_cost(config),
    )


def _cost(config: TrainConfig) -> dict[str, float]:
    from measnet.complexity import count
    from measnet.network import MEASNet

    counted = count(MEASNet(config.model))
    return {
        "parameters": counted.total_parameters,
        "multiply_adds_256x256": counted.total_multiply_adds,
    }


def _export(config: TrainConfig, run: Any) -> None:
    """The averaged weights of the end, as a file of their own and as a model in MLflow."""
    from distributed import tracking

    newest = checkpoints.newest_whole(config.folder)
    if newest is None:
        return
    fs, root = open_folder(config.folder)
    newest.export(fs, f"{root}/{MODEL}")  # where it is missing, the same command makes it
    if "file" in fs.protocol:
        tracking.log_model(run, Path(root) / MODEL)


def _scratch(key: str) -> Path:
    """A folder on this machine for a run whose storage is not a folder."""
    return Path.home() / ".cache" / "measnet" / key


def _one_line(error: BaseException) -> str:
    """The cause of a failure: the last line of what the first worker that failed raised."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
