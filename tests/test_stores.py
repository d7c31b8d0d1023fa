"""Runs in an object store: a real S3-compatible server on loopback, and several processes."""

import io
import subprocess
import sys
from pathlib import Path

import torch
from mlflow import MlflowClient
from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.config import TrainConfig
from distributed.mlflow_tracker import run_key
from distributed.presets import PRESETS
from measnet.config import to_dict
from measnet.network import MEASNet
from shards import storage
from shards.storage import list_names, read
from tune.config import parse
from tune.record import SearchRecord, TrialRecord
from tune.registry import PSNR
from tune.results import write_results
from tune.trial import take_over

CONFIG = PRESETS["demo"]()

WRITE = """
import sys
from pathlib import Path
from tests.test_stores import write
for samples in map(int, sys.argv[2:]):
    write(sys.argv[1], samples)
"""


def write(run: str, samples: int) -> checkpoints.Checkpoint:
    """A small checkpoint of a run."""
    state = checkpoints.RunState(
        samples=samples, updates=samples, config=to_dict(CONFIG), data="", plan={}
    )
    tensors = {"a": torch.full((2,), float(samples))}
    return checkpoints.Snapshot(state, tensors, tensors, tensors).write(run)


def elsewhere(code: str, *arguments: object) -> str:
    """What another process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_driver_sees_the_checkpoints_that_workers_write(bucket: str) -> None:
    """Listings are not cached: it listed the folder before, as every resumed driver does."""
    run = f"{bucket}/runs/seen"
    write(run, 8)
    assert [c.samples for c in checkpoints.listed(run)] == [8]
    elsewhere(WRITE, run, 16, 24)
    newest = checkpoints.newest_complete(run)
    assert newest is not None and newest.samples == 24
    elsewhere("import sys; from distributed.checkpoint import prune; prune(sys.argv[1], 1)", run)
    assert [c.samples for c in checkpoints.listed(run)] == [24]
    newest = checkpoints.newest_complete(run)
    assert newest is not None and newest.tensors("ema")["a"].tolist() == [24, 24]


def test_a_trial_takes_over_what_another_process_has_just_written(bucket: str) -> None:
    donor, own = f"{bucket}/trials/donor", TrainConfig(name="own", storage=f"{bucket}/trials")
    write(donor, 8)
    old = write(own.folder, 8)
    assert checkpoints.newest_complete(donor) and checkpoints.newest_complete(own.folder)
    elsewhere(WRITE, donor, 16)
    name = checkpoints.listed(donor)[-1].name
    assert take_over(donor, name, own).samples == 16
    assert [c.samples for c in checkpoints.listed(own.folder)] == [16]
    assert old.problem() is not None


def test_a_search_in_a_store_has_a_report_a_champion_and_its_model(
    bucket: str, tmp_path: Path
) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    options = ("--storage", f"{bucket}/searches", "--tracking.uri", tracking)
    config = parse(["demo", "--name", "s", "--register", "always", *options])
    folder = f"{config.folder}/trials/s-000"
    weights = {k: v.contiguous() for k, v in MEASNet(config.train.model).state_dict().items()}
    state = checkpoints.RunState(
        samples=8, updates=2, config=to_dict(config.train), data="", plan={}, score=25.0
    )
    checkpoints.Snapshot(state, weights, weights, {"a": torch.ones(1)}).write(folder)
    run_key(folder)
    trial = TrialRecord(number=0, name="s-000", changes={}, state="finished", folder=folder)
    trial.psnr, trial.input_psnr, trial.curve, trial.samples = 25.0, 20.0, [(8, 25.0)], 8
    record = SearchRecord(
        name="s", config=to_dict(config), command="c", budget=8, cost="none", state="finished"
    )
    record.folder, record.trials, record.validation_data = config.folder, [trial], "d"
    write_results(config, record, Console(file=io.StringIO()))

    assert {"report.html", "champion.safetensors", "best.yaml", "search.json"} <= set(
        list_names(config.folder)
    )
    assert b"s-000 is measnet@champion now" in read(f"{config.folder}/report.html")
    client = MlflowClient(tracking)
    assert client.get_model_version_by_alias("measnet", "champion").tags[PSNR] == "25.0"
    files = {file.path for file in client.list_artifacts(record.mlflow_run_id)}
    assert {"report.html", "best.yaml", "search.json"} <= files
    assert "model" in {file.path for file in client.list_artifacts(trial.mlflow_run_id)}
    # The same command from another process makes the same report again.
    main = "import sys; from tune.report import main; sys.exit(main(sys.argv[1:]))"
    assert elsewhere(main, config.folder).strip() == f"{config.folder}/report.html"


def test_a_local_place_may_be_written_as_a_uri(tmp_path: Path) -> None:
    place = f"file://{tmp_path}"
    storage.write(f"{place}/run/a.txt", b"text")
    assert (tmp_path / "run" / "a.txt").read_bytes() == storage.read(f"{place}/run/a.txt")
    assert storage.exists(f"{place}/run/a.txt") and storage.list_names(place) == ["run"]
    assert storage.absolute(place) == str(tmp_path)
    assert storage.size_and_sha256(f"{place}/run/a.txt")[0] == 4
    storage.remove(f"{place}/run/a.txt")
    assert storage.list_names(f"{place}/run") == []
