"""Sends runs to MLflow; training never waits for it.

Metrics go to a JSON-lines file first (`distributed.run_log`); a background thread sends the file to
MLflow in batches. If MLflow does not answer, training continues, and the rest is sent later: by the
thread, by a resumed run, or by `finish` in the driver. A tag of the MLflow run says how much of the
file it has, so each point is sent once. A point is sent only when the run's storage has it, so a
run that resumes on another node knows all points that were sent.

A training run has a key in its folder, and its MLflow run has this key as a tag. So a run that is
resumed, retried or moved continues the same MLflow run.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock
from PIL import Image

from distributed.config import TrackingConfig, TrainConfig, flat_fields, to_yaml
from distributed.environment import SystemMetrics, code_version, installed_packages
from distributed.run_log import EVENTS, METRICS, RunLog, complete_lines, read, records
from measnet.errors import typed
from shards.storage import open_folder, write_whole

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

KEY_TAG = "measnet.key"
KEY_FILE = "tracking.key"
SENT_TAG = "measnet.sent"
"""Tag of a run: so many bytes of `metrics.jsonl` were sent."""
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag of an experiment whose runs train models; others are shown as traces of agents."""
UI = "http://127.0.0.1:5000"  # of `mlflow ui`
EVERY_S, STORE_EVERY_S = 2.0, 30.0
"""Seconds between two batches of metrics, for runs in a folder and in an object store."""
SYSTEM_EVERY_S = 10.0  # between two points of the system's metrics
_BATCH, _PARAMS = 1000, 100
"""MLflow's limits for metrics and parameters in one request."""

Status = Literal["FINISHED", "KILLED", "FAILED"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Where a training run is recorded; plain strings, so that it can be sent to the workers."""

    uri: str
    """Tracking server or database."""
    experiment: str
    """Name of the experiment."""
    name: str
    """Name shown in MLflow."""
    key: str
    """Identity of the training run, from its folder."""
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tags of the MLflow run when it is created."""
    id: str = ""
    """MLflow's run id; empty until MLflow has answered for the first time."""


def run_key(folder: str) -> str:
    """The key of the run in this folder or URI; created at the first call."""
    fs, root = open_folder(folder)
    path = f"{root}/{KEY_FILE}"
    if fs.exists(path):
        return bytes(fs.cat_file(path)).decode().strip()
    key = secrets.token_hex(16)
    write_whole(fs, path, f"{key}\n".encode())
    return key


def tracking_uri(tracking: TrackingConfig) -> str:
    """The server or database: as configured, else MLFLOW_TRACKING_URI, else ./mlflow.db.

    A relative SQLite path becomes absolute, because each worker has its own working folder.

    Raises:
        ValueError: a kind of store that MLflow no longer supports.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if "://" not in uri or uri.startswith("file:"):
        raise ValueError(
            f"tracking.uri is {uri!r}, but MLflow no longer supports plain folders; "
            "use sqlite:///FILE.db or the http:// address of a server"
        )
    return uri


def prepare(
    tracking: TrackingConfig, *, name: str, key: str, tags: Mapping[str, str] | None = None
) -> Run:
    """Open the store and the run; called once, by the driver, before any worker starts.

    A SQLite database is created here, by one driver at a time: several at once damage it. If MLflow
    does not answer, the run's id stays empty and the workers' tracker tries again later.

    Raises:
        ValueError: a tracking URI that cannot be used.
    """
    run = Run(
        uri=tracking_uri(tracking),
        experiment=tracking.experiment,
        name=name,
        key=key,
        tags=dict(tags or {}),
    )
    try:
        return open_run(run, create_database=True)
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        log.warning(
            "MLflow at %s does not answer (%s); %s keeps the metrics, they are sent later",
            run.uri,
            typed(error),
            METRICS,
        )
        return run


def describe(
    run: Run,
    config: TrainConfig,
    *,
    manifests: Mapping[str, tuple[str, str]],
    cost: Mapping[str, float],
) -> bool:
    """Record parameters, configuration, data, code, packages and cost of a run.

    Parameters cannot change in MLflow. If a resumed run has another value (such as more workers),
    it goes into the tag `resumed.NAME`.

    Args:
        run: from `prepare`.
        config: of the training run.
        manifests: `training` and `validation` -> (URI, fingerprint) of their shards.
        cost: from `measnet.complexity.network_cost`; becomes metrics `cost/NAME` and cost.json.

    Returns:
        Whether MLflow accepted it.
    """

    def send(client: "MlflowClient", run: Run) -> None:
        _send_params(client, run.id, {k: str(v) for k, v in flat_fields(config).items()})
        _send_data(client, run.id, manifests)
        for tag, value in code_version().items():
            client.set_tag(run.id, tag, value)
        client.log_text(run.id, to_yaml(config), "config.yaml")
        client.log_text(run.id, installed_packages(), "requirements.txt")
        if cost:
            client.log_dict(run.id, dict(cost), "cost.json")
            names = {f"cost/{name}": float(value) for name, value in cost.items()}
            _send_metrics(client, run.id, [{"time": 0, "step": 0, "metrics": names}])

    return attempt(run, "the description of the run", send)


def log_artifacts(run: Run, path: Path, folder: str = "") -> bool:
    """Store a file, or all files of a folder, under `folder`; whether MLflow accepted it."""

    def send(client: "MlflowClient", run: Run) -> None:
        _send_artifact(client, run.id, path, folder)

    return attempt(run, f"{path.name}", send)


def finish(run: Run, status: Status, folder: str | Path | None = None) -> Run:
    """Send what the workers could not send, and set the run's status; called by the driver.

    Args:
        run: from `prepare`.
        status: FINISHED, KILLED (stopped by the user) or FAILED.
        folder: folder or URI of the training run, for its metrics and events; None: only the
            status is sent.

    Returns:
        The run, with its id if MLflow answered.
    """
    state = {"run": run}

    def send(client: "MlflowClient", run: Run) -> None:
        state["run"] = run
        if folder is not None:
            lines = read(str(folder), METRICS)
            points = records(lines[_sent(client, run.id) :])
            _send_metrics(client, run.id, points, lines.rfind(b"\n") + 1)
            if events := read(str(folder), EVENTS):
                client.log_text(run.id, events.decode(errors="replace"), EVENTS)
        client.set_terminated(run.id, status)

    attempt(run, f"the end of the run ({status})", send)
    return state["run"]


def annotate(
    run: Run,
    tags: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
    step: int = 0,
) -> bool:
    """Set tags, and metrics at `step`, of a run that may have ended; whether MLflow accepted."""

    def send(client: "MlflowClient", run: Run) -> None:
        for name, value in tags.items():
            client.set_tag(run.id, name, value)
        if metrics:
            now = int(time.time() * 1000)
            _send_metrics(client, run.id, [{"time": now, "step": step, "metrics": dict(metrics)}])

    return attempt(run, "tags and figures", send)


def run_page(uri: str, run_id: str) -> str:
    """Address of a run's page; for a database, the address while `mlflow ui` runs on this machine.

    MLflow 3 opens every experiment in a view for traces of language models, which is empty here.
    The page of a run shows its curves and files.
    """
    return f"{uri.rstrip('/') if uri.startswith('http') else UI}/#/runs/{run_id}"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The points of a run in a folder or URI, without an incomplete last line."""
    return records(read(str(folder), METRICS))


RESUMED_S = 60.0
"""Seconds until a resumed run sends to MLflow. Importing MLflow takes seconds of the worker's time;
after a lost worker the run trains first."""
_Artifact = tuple[Path, str, int | None]  # path, folder, None; or of a picture path, key, step


class Tracker:
    """Records the metrics of one training run; rank 0 has one.

    `metrics` and `artifact` return at once and raise no errors of MLflow. A point that is in the
    file already, as after a restart from an earlier checkpoint, is not recorded again: each metric
    has one value per step.
    """

    def __init__(
        self,
        run_log: RunLog,
        run: Run | None,
        *,
        every_s: float | None = None,
        retry_s: float = 15.0,
        first_s: float | None = None,
        card: "torch.device | None" = None,
    ):
        """Continue the file of an earlier attempt, if there is one.

        Args:
            run_log: has the file, `metrics.jsonl`.
            run: from `prepare`; None: only the file is written.
            every_s: seconds between two batches; None: `EVERY_S`, or `STORE_EVERY_S` if the run is
                in an object store, where each batch is an object.
            retry_s: seconds to the next attempt if MLflow did not answer.
            first_s: seconds to the first batch, if not `every_s`.
            card: the GPU of this process, whose load is recorded too.
        """
        self._log, self._path = run_log, run_log.folder / METRICS
        self._last: dict[str, int] = {}
        data, end = complete_lines(self._path, 0)
        for record in records(data):
            self._last.update(dict.fromkeys(record["metrics"], record["step"]))
        self._system_step = self._last.get("system/cpu_utilization_percentage", -1)
        self._file = self._path.open("ab", buffering=0)
        self._file.truncate(end)  # removes half a line of a killed writer
        self._run, self._sent = run, -1
        default_s = STORE_EVERY_S if run_log.in_store else EVERY_S
        self._every_s, self._retry_s = every_s or default_s, retry_s
        self._first_s = self._every_s if first_s is None else first_s
        self._artifacts: queue.SimpleQueue[_Artifact] = queue.SimpleQueue()
        self._waiting: list[_Artifact] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._system, self._system_at = SystemMetrics(card), 0.0
        self.problem: str | None = None
        """Why MLflow did not accept the last batch; None if it did."""
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> bool:
        """Record `values` after `step` samples; False if all were recorded before a restart."""
        with self._lock:
            new = {
                name: float(value)
                for name, value in values.items()
                if step > self._last.get(name, -1)
            }
            if not new:
                return False
            self._last.update(dict.fromkeys(new, step))
            record = {"time": int(time.time() * 1000), "step": int(step), "metrics": new}
            self._file.write(json.dumps(record).encode() + b"\n")
        return True

    def artifact(self, path: Path, folder: str = "") -> None:
        """Send a file, or all files of a folder, to `folder` later; they must exist until then."""
        self._artifacts.put((path, folder, None))

    def picture(self, path: Path, key: str, step: int) -> None:
        """Send a picture later; MLflow shows those of one `key` with a slider over the steps."""
        self._artifacts.put((path, key, step))

    def close(self, deadline_s: float = 5.0) -> bool:
        """Send the rest within `deadline_s` seconds; whether MLflow has everything."""
        self._stop.set()
        self._thread.join(deadline_s)
        done = not self._thread.is_alive() and self.problem is None
        self._file.close()
        return done or self._run is None

    def _work(self) -> None:
        wait = self._first_s
        while not self._stop.wait(wait):
            wait = self._every_s if self._send() else self._retry_s
        self._send()

    def _send(self) -> bool:
        """Send one batch; False if MLflow did not accept it."""
        try:
            self._sample_system()
            kept = self._log.keep_lines(METRICS)
            if self._run is None:
                return True
            self._run = open_run(self._run)
            client = client_of(self._run)
            if self._sent < 0:  # an earlier attempt may have sent a part
                self._sent = _sent(client, self._run.id)
            data, end = complete_lines(self._path, self._sent, kept)
            _send_metrics(client, self._run.id, records(data), end)
            self._sent = end
            self._send_artifacts(client, self._run.id)
        except Exception as error:  # no error of MLflow may stop training
            if self.problem is None:
                log.warning("MLflow did not accept a batch, trying again later: %s", typed(error))
            self.problem = typed(error)
            return False
        self.problem = None
        return True

    def _send_artifacts(self, client: "MlflowClient", run_id: str) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.append(self._artifacts.get_nowait())
        while self._waiting:
            path, folder, step = self._waiting[0]
            if not path.exists():
                log.warning("%s was deleted before it was sent to MLflow", path)
            elif step is None:
                _send_artifact(client, run_id, path, folder)
            else:
                with Image.open(path) as picture:
                    client.log_image(run_id, picture, key=folder, step=step, synchronous=True)
            self._waiting.pop(0)

    def _sample_system(self) -> None:
        now = time.monotonic()
        if now - self._system_at >= SYSTEM_EVERY_S:
            self._system_at = now
            self._system_step += 1
            self.metrics(self._system.read(), self._system_step)


def _configure() -> None:
    """Before MLflow is imported: no telemetry, and short waits for a server without an answer."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def client_of(run: Run) -> "MlflowClient":
    """A client of the run's server or database."""
    _configure()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # many lines about a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(run.uri)


def open_run(run: Run, *, create_database: bool = False) -> Run:
    """Find or create the run of this key, and set it running; raises if MLflow does not answer."""
    if run.id:
        return run
    if not run.uri.startswith("sqlite:"):
        return _find_or_create(run)
    database = Path(run.uri.removeprefix("sqlite:///"))
    if not create_database and not database.exists():
        raise FileNotFoundError(f"{database} is not on this machine")
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=60):  # another driver may start just now
        return _find_or_create(run, str(database.parent / "mlruns" / run.experiment))


def _find_or_create(run: Run, artifacts: str | None = None) -> Run:
    client = client_of(run)
    experiment = client.get_experiment_by_name(run.experiment)
    if experiment is None:
        tags = {KIND_TAG: KIND}
        experiment_id = client.create_experiment(run.experiment, artifacts, tags)
    else:
        experiment_id = experiment.experiment_id
        if KIND_TAG not in experiment.tags:
            client.set_experiment_tag(experiment_id, KIND_TAG, KIND)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{run.key}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {**run.tags, KEY_TAG: run.key}
        run_id = client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
    return dataclasses.replace(run, id=run_id)


def attempt(run: Run, what: str, send: Any) -> bool:
    """Call `send(client, run)`; a warning and False if MLflow does not answer."""
    try:
        run = open_run(run)
        send(client_of(run), run)
    except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' errors
        log.warning("MLflow at %s did not accept %s: %s", run.uri, what, typed(error))
        return False
    return True


def _sent(client: "MlflowClient", run_id: str) -> int:
    return int(client.get_run(run_id).data.tags.get(SENT_TAG, 0))


def _send_metrics(
    client: "MlflowClient", run_id: str, points: Sequence[Mapping[str, Any]], end: int | None = None
) -> None:
    """Send points; the last batch notes that they end at byte `end` of the file."""
    _configure()
    from mlflow.entities import Metric, RunTag

    metrics: list[Metric] = [
        Metric(name, value, point["time"], point["step"])
        for point in points
        for name, value in point["metrics"].items()
    ]
    for at in range(0, len(metrics), _BATCH):
        last = end is not None and at + _BATCH >= len(metrics)
        tags = [RunTag(SENT_TAG, str(end))] if last else []
        client.log_batch(run_id, metrics=metrics[at : at + _BATCH], tags=tags)


def _send_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(name, value[:6000]) for name, value in params.items() if name not in known]
    for at in range(0, len(new), _PARAMS):
        client.log_batch(run_id, params=new[at : at + _PARAMS])
    for name, value in params.items():
        if known.get(name, value[:6000]) != value[:6000]:
            client.set_tag(run_id, f"resumed.{name}", value)


def _send_data(
    client: "MlflowClient", run_id: str, manifests: Mapping[str, tuple[str, str]]
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for context, (uri, fingerprint) in manifests.items():
        client.set_tag(run_id, f"data.{context}.fingerprint", fingerprint)
        source = json.dumps({"uri": uri, "fingerprint": fingerprint})
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        dataset = Dataset(name, fingerprint[:36], "local", source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _send_artifact(client: "MlflowClient", run_id: str, path: Path, folder: str) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder or None)
    else:
        client.log_artifact(run_id, str(path), folder or None)
