"""A search as a user starts it, on a real Ray with real training, at a tiny size."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distributed import checkpoint as checkpoints
from distributed.presets import demo
from measnet.config import replace_dotted
from measnet.network import MEASNet
from tune.search import main

ROOT = Path(__file__).resolve().parent.parent


def command(packed: Path, *more: str) -> list[str]:
    """Trials of 12 steps of 4 samples on the smallest network."""
    return [
        "demo",
        *("--data.train", str(packed / "train"), "--data.validation", str(packed / "test")),
        *("--data.crop", "32", "--model.dim", "8", "--name", "s", "--validations", "3"),
        *("--recipe.samples", "96", "--recipe.global-batch", "4", "--recipe.micro-batch", "2"),
        *("--recipe.lr", "0.002", "--scaling.workers", "1"),
        *("--recipe.warmup-samples", "16", "--every.validation-pictures", "1"),
        *("--samples", "48", *more),
    ]


FINISHED = (
    *("--trials", "2", "--keep", "1", "--cost", "latency"),
    *("--register", "always", "--model-name", "net"),
)
"""Options of the search that the fixture `finished` runs."""


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "runs" / "s" / "search.json").read_text()))


@pytest.fixture(scope="module")
def finished(packed: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a search of two trials ran to its end."""
    folder = tmp_path_factory.mktemp("search")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(command(packed, *FINISHED)) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
def test_a_search_leaves_what_is_needed(finished: Path) -> None:
    search = read(finished)
    assert search["state"] == "finished"
    first, second = search["trials"]
    assert first["changes"] == {
        "model.pixel_experts": 6,
        "model.pixel_top_k": 2,
        "model.image_experts": 5,
        "model.image_top_k": 2,
        "recipe.balance_weight": 1e-4,
    }
    for trial in (first, second):
        assert (trial["state"], trial["samples"]) == ("finished", 48)
        assert [samples for samples, _ in trial["curve"]] == [16, 32, 48]
        assert trial["psnr"] == trial["curve"][-1][1]
        assert sum(trial["tasks"].values()) / 5 == pytest.approx(trial["psnr"])
        model = MEASNet(replace_dotted(demo(), trial["changes"] | {"model.dim": 8}).model)
        assert trial["costs"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert trial["costs"]["latency"] > 0
    best = max((first, second), key=lambda t: t["psnr"])
    assert search["champion"] == best["number"] and best["number"] in search["front"]
    folder = finished / "runs" / "s"
    config = MEASNet.from_pretrained(folder / "champion.safetensors").config
    assert config.pixel_experts == best["changes"]["model.pixel_experts"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert not (folder / "tune").exists()
    assert best["input_psnr"] > 0 and best["routing"]
    assert "is net@champion now" in search["registration"]


@pytest.mark.slow
def test_losers_are_pruned_and_the_best_is_kept(finished: Path) -> None:
    search = read(finished)
    kept = set(search["front"])
    for trial in search["trials"]:
        there = checkpoints.listed(trial["folder"])
        assert bool(there) == (trial["number"] in kept)
        assert (Path(trial["folder"]) / "metrics.jsonl").exists()


@pytest.mark.slow
def test_mlflow_has_flat_trials_a_summary_and_the_champion(finished: Path) -> None:
    from mlflow import MlflowClient

    search = read(finished)
    client = MlflowClient(f"sqlite:///{finished}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "measnet")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"s", "s-000", "s-001"}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert not any("mlflow.parentRunId" in r.data.tags for r in runs.values())
    for trial in search["trials"]:
        run = runs[trial["name"]]
        assert run.info.run_id == trial["mlflow_run_id"]
        assert run.data.tags["measnet.search"] == "s"
        history = client.get_metric_history(run.info.run_id, "val_psnr/mean")
        assert [(m.step, m.value) for m in history] == [(s, p) for s, p in trial["curve"]]
        assert run.data.params["model.pixel_experts"] == str(
            trial["changes"]["model.pixel_experts"]
        )
    files = {f.path for f in client.list_artifacts(runs["s"].info.run_id)}
    assert {"report.html", "search.json", "best.yaml"} <= files
    champion = client.get_model_version_by_alias("net", "champion")
    assert champion.run_id == search["trials"][search["champion"]]["mlflow_run_id"]
    assert "validation PSNR" in champion.description
    assert float(champion.tags["measnet.psnr"]) == search["trials"][search["champion"]]["psnr"]
    assert champion.tags["measnet.validation_data"] == search["validation_data"]


@pytest.mark.slow
def test_the_shown_command_trains_the_best_at_full_length(finished: Path) -> None:
    from distributed.config import from_yaml
    from distributed.launch import check, resolve

    search = read(finished)
    assert search["best_command"].endswith("best.yaml")
    config = from_yaml((finished / "runs" / "s" / "best.yaml").read_text())
    assert (config.name, config.recipe.samples, config.recipe.warmup_samples) == ("s-best", 96, 16)
    changes = search["trials"][search["champion"]]["changes"]
    assert replace_dotted(config, changes) == config
    check(resolve(config))


@pytest.mark.slow
def test_a_finished_search_says_so_and_another_one_of_its_name_is_refused(
    finished: Path,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    before = read(finished)["trials"]
    assert main(command(packed, *FINISHED)) == 0
    assert "is finished: 2 trials" in capsys.readouterr().out
    assert read(finished)["trials"] == before
    assert main(command(packed, *FINISHED, "--recipe.lr", "1e-5")) == 2
    message = capsys.readouterr().err
    assert "(now 1e-05)" in message and "--name" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.train", "nowhere"), "nowhere"),
        (("--vary", "model.dim=8,15"), "multiple of 4"),
        (("--scaling.cpus-per-worker", "8"), "a trial needs 8 CPUs"),
        (("--parallel", "9", "--scaling.cpus-per-worker", "1"), "room for 4"),
    ],
)
def test_what_cannot_run_is_refused_before_a_trial_starts(
    more: tuple[str, ...],
    message: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_local: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(packed, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "s" / "trials").exists()


def test_ray_is_not_imported_before_its_token_is_set() -> None:
    """Ray reads at its import whether it needs a token."""
    code = (
        "import sys; import tune.search, tune.results, tune.registry; "
        "from distributed.internals import ray_tune; print(ray_tune.configure()); "
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"  # and no warning of another version


def start(packed: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "tune.search", *command(packed, *more)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def wait_for(folder: Path, run: subprocess.Popen[bytes], condition: Any) -> None:
    deadline = time.monotonic() + 400
    while True:
        with_file = (folder / "runs" / "s" / "search.json").exists()
        if with_file and condition(read(folder)["trials"]):
            return
        assert run.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.3)


@pytest.mark.slow
def test_a_killed_search_resumes_and_loses_nothing(packed: Path, tmp_path: Path) -> None:
    more = ("--trials", "3", "--scheduler", "none", "--parallel", "1", "--samples", "240")
    more = (*more, "--recipe.samples", "480")
    run = start(packed, tmp_path, *more)
    wait_for(
        tmp_path,
        run,
        lambda t: len(t) > 1 and t[0]["state"] == "finished" and len(t[1]["curve"]) == 1,
    )
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    before = read(tmp_path)["trials"]
    time.sleep(5)  # Ray's processes notice that their driver has gone
    assert start(packed, tmp_path, *more).wait(500) == 0, (tmp_path / "log.txt").read_text()
    after = read(tmp_path)["trials"]
    assert after[0] == before[0]  # finished, and not touched again
    assert [t["state"] for t in after] == ["finished"] * 3
    assert after[1]["changes"] == before[1]["changes"]
    assert after[1]["curve"][:1] == before[1]["curve"]
    assert [s for s, _ in after[1]["curve"]] == [80, 160, 240]
    events = Path(after[1]["folder"], "events.log").read_text()
    assert "resumed from checkpoint" in events
    assert all(t["samples"] == 240 for t in after)


@pytest.mark.slow
def test_asha_stops_slow_trials_and_a_diverged_trial_fails_with_its_reason(
    packed: Path, tmp_path: Path
) -> None:
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text("recipe.lr: [0.002, 1.0e-7, 1.0e+25]\n")
    more = ("--trials", "3", "--space", str(ranges), "--parallel", "1", "--reduction", "2")
    more = (*more, "--samples", "480", "--recipe.samples", "480", "--grace", "160")
    more = (*more, "--scaling.max-failures", "0")
    run = start(packed, tmp_path, *more)
    assert run.wait(600) == 0, (tmp_path / "log.txt").read_text()
    trials = {t["changes"]["recipe.lr"]: t for t in read(tmp_path)["trials"]}
    assert trials[0.002]["state"] == "finished"
    assert trials[1e-7]["state"] == "stopped" and trials[1e-7]["samples"] < 480
    assert "ASHA" in trials[1e-7]["reason"]
    assert (trials[1e25]["state"], trials[1e25]["cause"]) == ("failed", "diverged")
    assert trials[1e25]["reason"].startswith("diverged: ")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    stopped = client.get_run(trials[1e-7]["mlflow_run_id"])
    assert stopped.info.status == "KILLED"
    history = client.get_metric_history(stopped.info.run_id, "val_psnr/mean")
    assert [m.step for m in history] == [s for s, _ in trials[1e-7]["curve"]]
    assert client.get_run(trials[1e25]["mlflow_run_id"]).info.status == "FAILED"


@pytest.mark.slow
def test_with_pbt_a_trial_takes_over_weights(packed: Path, tmp_path: Path) -> None:
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text("recipe.lr: [0.002, 1.0e-9]\n")
    more = ("--trials", "2", "--space", str(ranges), "--scheduler", "pbt", "--parallel", "2")
    more += ("--recipe.optimizer", "adam")  # with Muon recipe.lr matters little
    run = start(packed, tmp_path, *more, "--samples", "480", "--recipe.samples", "960")
    assert run.wait(600) == 0, (tmp_path / "log.txt").read_text()
    good, bad = read(tmp_path)["trials"]
    assert {taken["from"] for taken in bad["inherited"]} == {"s-000"}  # it took over the good one's
    assert math.isclose(bad["psnr"], good["psnr"], abs_tol=3.0)
    assert bad["state"] == good["state"] == "finished"


@pytest.mark.slow
def test_ctrl_c_loses_nothing_and_ends_soon(packed: Path, tmp_path: Path) -> None:
    more = ("--trials", "2", "--scheduler", "none", "--parallel", "1", "--samples", "2400")
    run = start(packed, tmp_path, *more, "--recipe.samples", "4800")
    wait_for(tmp_path, run, lambda t: bool(t) and t[0]["state"] == "running" and t[0]["curve"])
    asked = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(120) == 130, (tmp_path / "log.txt").read_text()
    assert time.monotonic() - asked < 60
    (trial,) = (t for t in read(tmp_path)["trials"] if t["curve"])
    assert trial["state"] == "waiting"
    newest = checkpoints.newest_complete(trial["folder"])
    assert newest is not None and newest.samples >= trial["samples"]
    assert "resume    python -m tune.search" in (tmp_path / "log.txt").read_text()
