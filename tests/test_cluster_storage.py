"""A cluster whose only storage is an object store: nodes are lost with their disks.

The store is a real S3-compatible server on loopback, started by the test.
"""

import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load

from distributed.mlflow_tracker import read_metrics
from distributed.run_log import CONSUMED, EVENTS, METRICS, read, records
from shards.storage import list_names, open_folder, read_json
from shards.storage import read as read_file
from tests import chaos, faults
from tests.faults import Fault

pytestmark = pytest.mark.slow

STEPS = 200


class StoreRun(chaos.Run):
    """A training command whose run lies in an object store."""

    def __init__(
        self,
        folder: Path,
        data: str,
        environment: dict[str, str],
        storage: str,
        *more: str,
        steps: int = STEPS,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.uri = f"{storage}/demo"
        super().__init__(
            folder,
            Path("unused"),
            environment,
            *("--storage", storage, "--data.cache-dir", str(folder / "cache")),
            *("--data.train", f"{data}/train", "--data.validation", f"{data}/test"),
            *("--recipe.samples", str(steps * chaos.BATCH), "--every.validate", "400"),
            *more,
        )

    def consumed(self) -> list[dict[str, Any]]:
        return records(read(self.uri, CONSUMED))

    def wait_for(self, ready: Callable[[], bool], pause: float = 0.5) -> bool:
        return super().wait_for(ready, pause)

    def said(self) -> str:
        return Path(self.log.name).read_text()


def lose_nodes(cluster: chaos.Cluster, count: int, disks: Path) -> None:
    """End so many nodes, and all that the workers have written to their disks."""
    raylets = [
        process
        for process in cluster.processes()
        if process.cmdline() and process.cmdline()[0].endswith("raylet")
    ]
    with_workers = [raylet for raylet in raylets if chaos._workers([raylet])]
    chaos._kill(with_workers[:count])
    for folder in disks.glob("measnet-run-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for _ in range(count):
        cluster.add_node()


def same_steps(run: StoreRun, calm: StoreRun, count: int) -> list[int]:
    """Check that each step and each point is there once; the samples after each step."""
    steps = [line["samples"] for line in records(read_file(f"{run.uri}/{CONSUMED}"))]
    assert steps == [chaos.BATCH * n for n in range(1, count + 1)]
    assert [line["consumed"] for line in run.consumed()] == [
        line["consumed"] for line in calm.consumed()
    ]
    points = Counter(
        (name, point["step"])
        for point in read_metrics(run.uri)
        for name in point["metrics"]
        if name.startswith("train/")
    )
    assert set(points.values()) == {1}
    return steps


def test_nodes_are_lost_with_their_disks(
    bucket: str, packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    data = f"{bucket}/cluster/data"
    fs, root = open_folder(data)
    fs.put(f"{packed}/", f"{root}/", recursive=True)

    calm = StoreRun(tmp_path / "calm", data, {}, f"{bucket}/cluster/calm")
    assert calm.end() == 0, calm.said()

    disks = Path(tempfile.mkdtemp(prefix="disks-"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("TMPDIR", str(disks))
    cluster = chaos.Cluster(nodes=2, cpus=1)
    storage = f"{bucket}/cluster/stormy"
    try:
        run = StoreRun(tmp_path / "stormy", data, cluster.environment, storage)
        assert run.wait_for_step(5), run.said()
        second = StoreRun(tmp_path / "second", data, cluster.environment, storage)
        assert second.end() == 2
        assert f"demo is in use by process {run.process.pid} on host" in second.said()
        for count in (1, 2):
            lose_nodes(cluster, count, disks)
            # From here on, because the log in the store is seconds behind the run.
            assert run.wait_for_step(len(run.consumed()) + 10), run.said()
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130, run.said()
        run = StoreRun(tmp_path / "stormy", data, cluster.environment, storage)
        assert run.end() == 0, run.said()
    finally:
        cluster.close()
        shutil.rmtree(disks, ignore_errors=True)

    expected, found = chaos.state_of(calm.uri), chaos.state_of(run.uri)
    assert chaos.difference(expected, found) == ""
    exported = load(read_file(f"{run.uri}/model.safetensors"))
    assert chaos.difference({"ema": found["ema"]}, {"ema": exported}) == ""

    steps = same_steps(run, calm, STEPS)
    client = MlflowClient(f"sqlite:///{tmp_path}/stormy/mlflow.db")
    (kept,) = client.search_runs([client.get_experiment_by_name("measnet").experiment_id])
    history = client.get_metric_history(kept.info.run_id, "train/loss")
    assert [point.step for point in history] == steps
    assert kept.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(kept.info.run_id)}
    assert {"model", EVENTS, "validation", "environment", "config.yaml"} <= files

    assert "resumed from checkpoint" in read(run.uri, EVENTS).decode()
    names = list_names(run.uri)
    assert {METRICS, CONSUMED, EVENTS, "validation", "outcome.json"} <= set(names)
    assert "owner.json" not in names
    outcome = read_json(fs, f"{open_folder(run.uri)[1]}/outcome.json")
    goodput = outcome["goodput"]
    assert goodput["samples_kept"] == STEPS * chaos.BATCH
    assert goodput["restarts"] >= 3 and 0 < goodput["share"] < 1
    assert kept.data.metrics["goodput/samples_kept"] == goodput["samples_kept"]
    assert "samples kept" in run.said()


def test_training_outlives_a_store_that_fails(
    bucket: str,
    s3_server: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors for 30 s, cut uploads, lost answers, slow answers, and listings that come late."""
    monkeypatch.setattr(chaos, "LIMIT_S", 900.0)
    data, steps, one = f"{bucket}/faults/data", 30, ("--scaling.workers", "1")
    fs, root = open_folder(data)
    fs.put(f"{packed}/", f"{root}/", recursive=True)
    calm = StoreRun(tmp_path / "calm", data, {}, f"{bucket}/faults/calm", *one, steps=steps)
    assert calm.end() == 0, calm.said()
    with faults.proxy(s3_server) as proxy:
        proxy.faults.append(Fault("stale listing", seconds=5))
        environment = {"AWS_ENDPOINT_URL": proxy.url}
        storage = f"{bucket}/faults/stormy"
        run = StoreRun(tmp_path / "stormy", data, environment, storage, *one, steps=steps)
        assert run.wait_for_step(5), run.said()
        for status in (500, 503):
            with proxy.failing(Fault("status", status)):
                time.sleep(15)
        puts = ("PUT", "POST", "DELETE")
        for fault in (
            Fault("cut upload", methods=puts, count=6),
            Fault("lost answer", methods=puts, count=6),
            Fault("slow", seconds=12, count=4),
        ):
            proxy.faults.insert(0, fault)
            assert run.wait_for(lambda fault=fault: fault.hits == fault.count), run.said()
        assert run.end() == 0, run.said()

    expected, found = chaos.state_of(calm.uri), chaos.state_of(run.uri)
    assert chaos.difference(expected, found) == ""
    exported = load(read_file(f"{run.uri}/model.safetensors"))
    assert chaos.difference({"ema": found["ema"]}, {"ema": exported}) == ""
    same_steps(run, calm, steps)
    outcome = read_json(fs, f"{open_folder(run.uri)[1]}/outcome.json")
    assert outcome["goodput"]["restarts"] == 0  # it waited, and lost no worker
    said, events = run.said(), read(run.uri, EVENTS).decode()
    assert "HTTP 500" in said and "retrying for up to" in said
    assert "works again after" in said and "works again after" in events
