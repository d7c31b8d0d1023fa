import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distributed import environment, mlflow_model, mlflow_tracker
from distributed.config import TrackingConfig, flat_fields
from distributed.mlflow_tracker import Run, Tracker, finish, prepare, read_metrics, run_key
from distributed.presets import PRESETS
from distributed.run_log import RunLog


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests here: making one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    prepare(TrackingConfig(uri=uri), name="first", key="first")
    return uri


@pytest.fixture
def run(database: str, request: pytest.FixtureRequest) -> Run:
    return prepare(TrackingConfig(uri=database), name="demo", key=request.node.name)


def history(run: Run, name: str) -> list[tuple[int, float]]:
    return [
        (m.step, m.value) for m in mlflow_tracker.client_of(run).get_metric_history(run.id, name)
    ]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def frozen_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_metrics_reach_the_file_and_mlflow(tmp_path: Path, run: Run) -> None:
    tracker = Tracker(RunLog(str(tmp_path), 0), run, every_s=0.05)
    for step in range(8, 33, 8):
        tracker.metrics({"train/loss": 1 / step, "train/lr": 0.1}, step)
    assert tracker.close()
    expected = [(step, 1 / step) for step in range(8, 33, 8)]
    kept = [r for r in read_metrics(tmp_path) if "train/loss" in r["metrics"]]
    assert [(r["step"], r["metrics"]["train/loss"]) for r in kept] == expected
    assert history(run, "train/loss") == expected
    assert len(history(run, "system/cpu_utilization_percentage")) == 1


def test_the_first_batch_may_wait_and_the_end_does_not(tmp_path: Path, run: Run) -> None:
    tracker = Tracker(RunLog(str(tmp_path), 0), run, every_s=0.01, first_s=60)
    tracker.metrics({"train/loss": 0.5}, 8)
    time.sleep(0.3)
    assert history(run, "train/loss") == []
    start = time.monotonic()
    assert tracker.close(deadline_s=30)
    assert time.monotonic() - start < 30
    assert history(run, "train/loss") == [(8, 0.5)]


def test_replays_add_nothing(tmp_path: Path, run: Run) -> None:
    tracker = Tracker(RunLog(str(tmp_path), 0), run)
    tracker.metrics({"train/loss": 0.5}, 8)
    assert tracker.close()
    finish(run, "FINISHED", tmp_path)
    finish(run, "FINISHED", tmp_path)
    assert history(run, "train/loss") == [(8, 0.5)]


def test_each_point_is_sent_once(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def counting(client: MlflowClient, run_id: str, metrics: Any = (), **more: Any) -> None:
        sent.extend(m.step for m in metrics if m.key == "train/loss")
        log_batch(client, run_id, metrics=metrics, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counting)
    for step in (8, 16):  # the second attempt knows what the first one has sent
        tracker = Tracker(RunLog(str(tmp_path), 0), run)
        tracker.metrics({"train/loss": 0.5}, step)
        assert tracker.close()
    unsent = {"time": 1, "step": 24, "metrics": {"train/loss": 0.5}}
    with (tmp_path / "metrics.jsonl").open("a") as file:  # the worker was lost before it sent this
        file.write(json.dumps(unsent) + '\n{"time": 2, "st')
    for _ in range(2):
        finish(run, "FINISHED", tmp_path)
    assert sent == [8, 16, 24]
    assert sorted(step for step, _ in history(run, "train/loss")) == sent


def test_a_resumed_run_continues_the_same_mlflow_run(tmp_path: Path, run: Run) -> None:
    first = Tracker(RunLog(str(tmp_path), 0), run)
    for step in (8, 16, 24):
        first.metrics({"train/loss": step / 100}, step)
    assert first.close()
    finish(run, "FAILED", tmp_path)
    again = prepare(TrackingConfig(uri=run.uri), name="demo", key=run.key)
    assert again.id == run.id
    assert mlflow_tracker.client_of(run).get_run(run.id).info.status == "RUNNING"
    second = Tracker(
        RunLog(str(tmp_path), 0), again
    )  # from the checkpoint at 8: two steps are done again
    for step in (16, 24, 32):
        second.metrics({"train/loss": step / 100}, step)
    assert second.close()
    assert history(run, "train/loss") == [(8, 0.08), (16, 0.16), (24, 0.24), (32, 0.32)]


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    whole = json.dumps({"time": 1, "step": 8, "metrics": {"a": 1.0}}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"time": 2, "st')
    tracker = Tracker(RunLog(str(tmp_path), 0), None)
    tracker.metrics({"a": 2.0}, 16)
    assert tracker.close()
    points = [(r["step"], r["metrics"]["a"]) for r in read_metrics(tmp_path) if "a" in r["metrics"]]
    assert points == [(8, 1.0), (16, 2.0)]


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", "FAILED"])
def test_the_driver_sets_the_end(run: Run, status: mlflow_tracker.Status) -> None:
    assert finish(run, status).id == run.id
    assert mlflow_tracker.client_of(run).get_run(run.id).info.status == status


def test_what_a_killed_worker_kept_is_sent_by_the_driver(tmp_path: Path, run: Run) -> None:
    worker = Tracker(RunLog(str(tmp_path), 0), None)  # never sent anything
    worker.metrics({"train/loss": 0.25}, 8)
    worker.close()
    finish(run, "KILLED", tmp_path)
    assert history(run, "train/loss") == [(8, 0.25)]


def test_refused_connections_neither_stop_nor_slow_training(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    start = time.monotonic()
    run = prepare(TrackingConfig(uri=uri), name="demo", key="k")
    assert run.id == "" and time.monotonic() - start < 15
    tracker = Tracker(RunLog(str(tmp_path), 0), run, every_s=0.01, retry_s=0.01)
    slowest = 0.0
    for step in range(200):
        before = time.perf_counter()
        tracker.metrics({"train/loss": 1.0}, step)
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.002)
    assert slowest < 0.1
    assert not tracker.close(deadline_s=10)
    assert tracker.problem is not None
    assert sum("train/loss" in r["metrics"] for r in read_metrics(tmp_path)) == 200
    assert finish(run, "FAILED", tmp_path).id == ""


def test_a_frozen_server_does_not_hold_up_the_end(
    tmp_path: Path, frozen_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = Run(uri=frozen_server, experiment="measnet", name="demo", key="k")
    tracker = Tracker(RunLog(str(tmp_path), 0), run, every_s=0.01)
    tracker.metrics({"train/loss": 1.0}, 8)
    time.sleep(0.1)
    start = time.monotonic()
    assert not tracker.close(deadline_s=0.5)
    assert time.monotonic() - start < 1
    assert read_metrics(tmp_path)[0]["metrics"]["train/loss"] == 1.0


def test_a_store_that_comes_back_gets_everything(tmp_path: Path, database: str) -> None:
    """A worker on a node without the database file fails softly and catches up later."""
    there, away = Path(database.removeprefix("sqlite:///")), tmp_path / "mlflow.db"
    run = Run(uri=f"sqlite:///{away}", experiment="measnet", name="demo", key="back")
    tracker = Tracker(RunLog(str(tmp_path), 0), run, every_s=0.02, retry_s=0.02)
    tracker.metrics({"train/loss": 1.0}, 8)
    time.sleep(0.2)
    assert tracker.problem is not None and not away.exists()
    away.symlink_to(there)
    tracker.metrics({"train/loss": 0.5}, 16)
    assert tracker.close()
    opened = mlflow_tracker.open_run(run)
    assert history(opened, "train/loss") == [(8, 1.0), (16, 0.5)]


def test_describe_records_what_the_run_is_made_of(run: Run) -> None:
    config = PRESETS["demo"]()
    manifests = {"training": ("data/demo/train", "a" * 64), "validation": ("data/t", "b" * 64)}
    assert mlflow_tracker.describe(run, config, manifests=manifests, cost={"parameters": 1234})
    client = mlflow_tracker.client_of(run)
    found = client.get_run(run.id)
    assert found.data.params == {k: str(v) for k, v in flat_fields(config).items()}
    assert found.data.metrics["cost/parameters"] == 1234
    assert found.data.tags["data.training.fingerprint"] == "a" * 64
    assert found.data.tags["measnet.version"]
    assert {d.dataset.digest for d in found.inputs.dataset_inputs} == {"a" * 36, "b" * 36}
    names = {a.path for a in client.list_artifacts(run.id)}
    assert names == {"config.yaml", "requirements.txt", "cost.json"}
    changed = config.__class__(name="demo", seed=7)
    assert mlflow_tracker.describe(run, changed, manifests=manifests, cost={})
    again = client.get_run(run.id).data
    assert again.params["seed"] == "0" and again.tags["resumed.seed"] == "7"


def test_artifacts_go_through_the_background(tmp_path: Path, run: Run) -> None:
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "derain.png").write_bytes(b"png")
    tracker = Tracker(RunLog(str(tmp_path / "run"), 0), run)
    tracker.artifact(tmp_path / "grids", "samples/100")
    tracker.artifact(tmp_path / "nowhere.png")  # gone: said in the log, nothing else
    assert tracker.close()
    files = mlflow_tracker.client_of(run).list_artifacts(run.id, "samples/100")
    assert [f.path for f in files] == ["samples/100/derain.png"]
    assert mlflow_tracker.log_artifacts(run, tmp_path / "grids" / "derain.png", "end")


def test_pictures_of_one_key_have_a_step_each(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "grid.png"
    Image.new("RGB", (8, 6), "red").save(path)
    tracker = Tracker(RunLog(str(tmp_path / "run"), 0), run, every_s=0.05)
    for step in (8, 16):
        tracker.picture(path, "validation/derain", step)
    assert tracker.close()
    client = mlflow_tracker.client_of(run)
    names = [file.path for file in client.list_artifacts(run.id, "images")]
    for step in (8, 16):
        sent = [n for n in names if f"+step+{step}+" in n.replace("%", "+") and n.endswith(".png")]
        assert len(sent) == 1, names
    assert all("validation~derain" in name for name in names)


def test_key_stays_the_same(tmp_path: Path) -> None:
    key = run_key(str(tmp_path / "run"))
    assert run_key(str(tmp_path / "run")) == key != run_key(str(tmp_path / "other"))


def test_where_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_tracker.tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_tracker.tracking_uri(TrackingConfig()) == "http://127.0.0.1:5000"
    assert (
        mlflow_tracker.tracking_uri(TrackingConfig(uri="sqlite:////x/y.db")) == "sqlite:////x/y.db"
    )
    with pytest.raises(ValueError, match="no longer supports plain folders"):
        mlflow_tracker.tracking_uri(TrackingConfig(uri="./mlruns"))


PREPARE = """
import sys
from distributed.config import TrackingConfig
from distributed.mlflow_tracker import prepare
print(prepare(TrackingConfig(uri=sys.argv[1]), name="one", key=sys.argv[2]).id)
"""


@pytest.mark.slow  # each process imports MLflow
def test_drivers_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    commands = [[sys.executable, "-c", PREPARE, uri, key] for key in ("a", "b", "c")]
    drivers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for line in commands]
    ids = [driver.communicate()[0].strip() for driver in drivers]
    assert all(ids) and len(set(ids)) == 3


def test_nothing_phones_home() -> None:
    mlflow_tracker._configure()
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_the_exported_model_restores_without_a_pickle(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch

    from measnet.config import tiny
    from measnet.network import MEASNet

    model = MEASNet(tiny()).eval()
    model.save_pretrained(tmp_path / "model.safetensors")
    assert mlflow_model.log_model(run, tmp_path / "model.safetensors")
    from mlflow import pyfunc

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    folder = mlflow_tracker.client_of(run).download_artifacts(run.id, "model", str(tmp_path))
    assert not list(Path(folder).rglob("*.pkl"))
    loaded = pyfunc.load_model(f"runs:/{run.id}/model")
    for size in ((2, 20, 24, 3), (1, 33, 17, 3)):
        pictures = np.random.default_rng(0).random(size, np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pictures).permute(0, 3, 1, 2)).image.clamp(0, 1)
        restored = loaded.predict(pictures)
        assert np.allclose(restored, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)


ALONE = """
import ast, pathlib, sys
from mlflow import pyfunc
import numpy as np
model = pyfunc.load_model(sys.argv[1])
print(model.predict(np.zeros((2, 24, 40, 3), np.float32)).shape)
import measnet
print(pathlib.Path(measnet.__file__).parent)
names = set()
for name in [name for name in sys.modules if name.split(".")[0] == "measnet"]:
    source = pathlib.Path(sys.modules[name].__file__)
    if source.suffix == ".py":
        for node in ast.walk(ast.parse(source.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            names |= {one.split(".")[0] for one in found}
print(" ".join(sorted(names - sys.stdlib_module_names - {"measnet"})))
"""


def test_the_exported_model_stands_alone(tmp_path: Path) -> None:
    """It loads without the repository, and requires only versions that PyPI has."""
    from measnet.config import tiny
    from measnet.network import MEASNet

    MEASNet(tiny()).save_pretrained(tmp_path / "model.safetensors")
    folder = tmp_path / "model"
    mlflow_model.save_model(tmp_path / "model.safetensors", folder)
    listed = (folder / "requirements.txt").read_text().split()
    assert all("+" not in line for line in listed)
    command = [sys.executable, "-I", "-c", ALONE, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shape, place, imported = done.stdout.splitlines()
    assert shape == "(2, 24, 40, 3)"
    assert Path(place) == folder / "code" / "measnet"
    # Imported only for a name of the hub, and on a GPU, where torch brings it.
    optional = {"huggingface_hub", "triton"}
    assert set(imported.split()) - optional <= {line.split("==")[0] for line in listed}


def test_requirements_are_versions_that_an_index_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda _: "2.13.0+cpu")
    assert environment.requirement("torch") == "torch==2.13.0"
    assert "+" not in environment.installed_packages()


def test_a_new_and_an_old_experiment_are_of_the_kind_that_trains_models(database: str) -> None:
    run = prepare(TrackingConfig(uri=database, experiment="kinds"), name="a", key="a")
    client = mlflow_tracker.client_of(run)

    def kind(experiment: str) -> str | None:
        return client.get_experiment_by_name(experiment).tags.get(mlflow_tracker.KIND_TAG)

    assert kind("kinds") == mlflow_tracker.KIND
    client.create_experiment("older")
    assert kind("older") is None
    prepare(TrackingConfig(uri=database, experiment="older"), name="b", key="b")
    assert kind("older") == mlflow_tracker.KIND


def test_figures_of_a_run_that_has_ended(run: Run) -> None:
    finish(run, "FINISHED")
    assert mlflow_tracker.annotate(run, {"a": "b"}, {"eval_psnr/derain": 30.5}, 48)
    assert history(run, "eval_psnr/derain") == [(48, 30.5)]


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("sqlite:////x/mlflow.db", "http://127.0.0.1:5000/#/runs/1f"),
        ("https://mlflow.example/", "https://mlflow.example/#/runs/1f"),
    ],
)
def test_where_a_run_is_shown(uri: str, page: str) -> None:
    assert mlflow_tracker.run_page(uri, "1f") == page
