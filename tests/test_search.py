"""A search as a user starts it, on a real Ray with real training, at a tiny size."""

import dataclasses
import io
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from distributed import checkpoint as checkpoints
from distributed.guard import GoBackError, cause_of
from distributed.lease import exclusive, in_use
from distributed.presets import demo
from measnet.config import replace_dotted, to_dict
from measnet.network import MEASNet
from shards.reader import DamagedError
from tune.config import parse
from tune.record import SearchRecord, TrialRecord
from tune.registry import DATA, PROTOCOL, PSNR, decide, register_champion
from tune.results import WORTH, prune_losers, refresh
from tune.runner import EventWriter, Search, trial_share
from tune.schedulers import explore, make_scheduler
from tune.search import main
from tune.space import Parameter, Space
from tune.trial import take_over

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


# ---- parts, without a run ------------------------------------------------------------------------


def saved(
    folder: Path, config: Any, *, samples: int, value: float, **more: Any
) -> checkpoints.Checkpoint:
    """A checkpoint of a network with one weight."""
    state = checkpoints.RunState(
        samples=samples,
        updates=samples // 4,
        config=to_dict(config),
        data="d",
        plan={},
        best=value,
        score=value,
        mlflow_run_id=folder.name,
        **more,
    )
    tensors = [{"w": torch.full((2,), value + n)} for n in range(3)]
    return checkpoints.Snapshot(state, *tensors).write(str(folder))


def test_taking_over_replaces_the_weights_and_keeps_the_recipe(tmp_path: Path) -> None:
    own = dataclasses.replace(demo(), name="own", storage=str(tmp_path))
    own = replace_dotted(own, {"recipe.lr": 5e-4})
    saved(tmp_path / "own", own, samples=900, value=1.0)
    donor = saved(tmp_path / "donor", demo(), samples=800, value=7.0)
    assert take_over(str(tmp_path / "donor"), donor.name, own).samples == 800
    (found,) = checkpoints.listed(str(tmp_path / "own"))
    assert found.problem() is None and found.samples == 800
    for kind, value in (("weights", 7.0), ("ema", 8.0), ("optimizer", 9.0)):
        assert found.tensors(kind)["w"].tolist() == [value, value]
    state = found.state()
    assert state.config["recipe"]["lr"] == 5e-4 and state.config["name"] == "own"
    assert state.mlflow_run_id == "own" and state.updates == 200
    assert len(checkpoints.listed(str(tmp_path / "donor"))) == 1


def test_a_donor_may_replace_its_checkpoint_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dataclasses.replace(demo(), name="own", storage=str(tmp_path))
    donor = saved(tmp_path / "donor", demo(), samples=800, value=7.0)
    real = checkpoints.Checkpoint.tensors

    def replaced(self: checkpoints.Checkpoint, kind: str) -> Any:
        if self.name == donor.name:
            written = saved(tmp_path / "donor", demo(), samples=900, value=8.0)
            checkpoints.prune(str(tmp_path / "donor"), 1, written)
            donor.remove()
        return real(self, kind)

    monkeypatch.setattr(checkpoints.Checkpoint, "tensors", replaced)
    assert take_over(str(tmp_path / "donor"), donor.name, own).samples == 900


def test_after_a_takeover_the_figures_are_those_of_the_new_weights(tmp_path: Path) -> None:
    trial = TrialRecord(number=0, name="t", changes={}, folder=str(tmp_path), samples=900)
    trial.curve = [(300, 20.0), (600, 21.0), (900, 22.0)]
    trial.inherited = [{"from": "u", "samples": 300}]
    saved(tmp_path, demo(), samples=600, value=25.0, validations=[(300, 24.0), (600, 25.0)])
    refresh(trial)
    assert trial.curve == [(300, 20.0), (600, 25.0)] and trial.samples == 600
    assert trial.psnr == 25.0


def test_a_reason_with_brackets_is_shown_whole() -> None:
    file = io.StringIO()
    search = SimpleNamespace(console=Console(file=file, width=200))
    search.show = lambda trial, text: Search.show(search, trial, text)  # type: ignore[arg-type]
    entry = TrialRecord(number=3, name="t", changes={"recipe.optimizer": "[/muon]"})
    reason = "RuntimeError: [/pytorch/gloo/pair.cc:547] Connection closed by peer"
    EventWriter._failed(SimpleNamespace(_search=search), entry, "other", reason)  # type: ignore[arg-type]
    assert reason in file.getvalue() and "[/muon]" in file.getvalue()


def test_taking_over_falls_back_to_the_donors_newest(tmp_path: Path) -> None:
    own = dataclasses.replace(demo(), name="own", storage=str(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        take_over(str(tmp_path / "donor"), "pruned", own)
    saved(tmp_path / "donor", demo(), samples=1_000, value=7.0)
    take_over(str(tmp_path / "donor"), "pruned", own)
    assert checkpoints.newest_complete(str(tmp_path / "own")).samples == 1_000  # type: ignore[union-attr]


def test_pbt_varies_the_recipe_inside_its_range_and_keeps_the_network() -> None:
    random.seed(0)
    ranges = {
        "recipe.lr": Parameter(field="recipe.lr", low=1e-4, high=1e-2, log=True),
        "recipe.optimizer": Parameter(field="recipe.optimizer", choices=("adam", "adamw")),
    }
    changes = {"model.pixel_experts": 6, "recipe.lr": 9e-3, "recipe.optimizer": "adam"}
    config = {"trial": {"changes": changes, "name": "x"}}
    seen = [explore(config, ranges)["trial"] for _ in range(40)]
    assert {s["changes"]["recipe.lr"] for s in seen} == {1e-2, 9e-3 * 0.8}
    assert {s["changes"]["recipe.optimizer"] for s in seen} == {"adam", "adamw"}
    assert all(s["changes"]["model.pixel_experts"] == 6 and s["name"] == "x" for s in seen)
    assert changes["recipe.lr"] == 9e-3


class Stand:
    """What a scheduler needs to know of a trial."""

    def __init__(self, name: str) -> None:
        self.trial_id = self.name = name

    def __str__(self) -> str:
        return self.name


def curve(psnr: float, upto: int = 720) -> list[tuple[int, float]]:
    return [(samples, psnr) for samples in range(80, upto + 1, 80)]


def asha_with(*rows: TrialRecord) -> Any:
    config = parse(["demo", "--samples", "720", "--reduction", "3"])
    assert config.first_rung == 80
    record = SearchRecord(
        name="s", config={}, command="", budget=720, cost="none", trials=list(rows)
    )
    return make_scheduler(config, Space(), record)


def test_asha_remembers_the_trials_of_an_earlier_launch() -> None:
    rows = [
        TrialRecord(number=n, name=f"s-00{n}", changes={}, state="finished", curve=curve(30.0 + n))
        for n in range(3)
    ]
    for psnr, decision in ((29.0, "STOP"), (33.0, "CONTINUE")):
        for known, expected in ((rows, decision), ([], "CONTINUE")):
            asha, newcomer = asha_with(*known), Stand("s-003")
            asha.on_trial_add(None, newcomer)
            assert asha.on_trial_result(None, newcomer, {"samples": 80, "psnr": psnr}) == expected


def test_asha_enters_a_resumed_trial_into_the_rungs_it_has_passed() -> None:
    """Its next figure, at more samples, is not compared with others' figures at fewer samples."""
    rows = [TrialRecord(number=0, name="s-000", changes={})]
    rows += [
        TrialRecord(
            number=n, name=f"s-00{n}", changes={}, state="stopped", curve=curve(30.0 + n / 10, 240)
        )
        for n in (1, 2)
    ]
    rows.append(TrialRecord(number=3, name="s-003", changes={}, curve=curve(31.0, 240)))
    asha, resumed = asha_with(*rows), Stand("s-003")
    asha.on_trial_add(None, resumed)
    assert asha.on_trial_result(None, resumed, {"samples": 320, "psnr": 29.0}) == "CONTINUE"


def test_asha_never_stops_the_papers_point() -> None:
    rows = [
        TrialRecord(number=n, name=f"s-00{n}", changes={}, state="finished", curve=curve(30.0))
        for n in range(1, 4)
    ]
    asha = asha_with(TrialRecord(number=0, name="s-000", changes={}), *rows)
    for name, decision in (("s-000", "CONTINUE"), ("s-004", "STOP")):
        asha.on_trial_add(None, Stand(name))
        assert asha.on_trial_result(None, Stand(name), {"samples": 80, "psnr": 9.0}) == decision


def test_validations_that_a_killed_search_missed_are_read_from_the_checkpoint(
    tmp_path: Path,
) -> None:
    report = {
        "tasks": {"denoise": {"restored_psnr": 22.0}},
        "mean": {"input_psnr": 15.0},
        "gain_error": 0.25,
        "routing": {"denoise": {"encoder1": [1.0]}},
    }
    curve = [(80, 20.0), (160, 21.5), (240, 22.0)]
    saved(
        tmp_path, demo(), samples=240, value=1.0, validations=curve, validation={"report": report}
    )
    entry = TrialRecord(number=0, name="0", changes={}, folder=str(tmp_path))
    entry.curve, entry.psnr = [(160, 21.0)], 21.0
    refresh(entry)
    assert entry.curve == [(80, 20.0), (160, 21.0), (240, 22.0)]
    assert (entry.samples, entry.psnr, entry.input_psnr) == (240, 22.0, 15.0)
    assert entry.tasks == {"denoise": 22.0} and entry.gain() == (7.0, True)
    assert entry.choice_worth is None
    (tmp_path / WORTH).parent.mkdir()
    (tmp_path / WORTH).write_text('{"worth": {"derain": 0.4, "mean": 0.2}}')
    refresh(entry)
    assert entry.choice_worth == 0.2
    refresh(fresh := TrialRecord(number=1, name="1", changes={}, folder=str(tmp_path / "none")))
    assert fresh.psnr is None and not fresh.curve


def test_a_second_launch_of_a_search_is_refused(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from distributed.lease import exclusive\n"
        "with exclusive(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"in\n"
    assert in_use(str(tmp_path))
    with (
        pytest.raises(ValueError, match=rf"in use by process {other.pid} on host .* since .*:"),
        exclusive(str(tmp_path)),
    ):
        pass
    other.kill()
    other.wait()
    assert not in_use(str(tmp_path))
    with exclusive(str(tmp_path)):
        assert in_use(str(tmp_path))
    assert not in_use(str(tmp_path)) and not in_use(str(tmp_path / "none"))


def test_checkpoints_of_losers_are_deleted_while_the_search_runs(tmp_path: Path) -> None:
    record = SearchRecord(
        name="s", config={}, command="", budget=100, cost="none", folder=str(tmp_path)
    )
    states = ["finished", "finished", "stopped", "failed", "failed", "running"]
    causes = ["", "", "", "diverged", "out of memory", ""]
    for number, (state, cause) in enumerate(zip(states, causes, strict=True)):
        folder = tmp_path / "trials" / str(number)
        saved(folder, demo(), samples=100, value=float(number))
        record.trials.append(
            TrialRecord(
                number=number,
                name=str(number),
                changes={},
                state=state,  # type: ignore[arg-type]
                cause=cause,
                psnr=30.0 - number,
                folder=str(folder),
            )
        )
    with exclusive(record.trials[2].folder):  # still writing
        prune_losers(record, 1)
    left = [bool(checkpoints.listed(trial.folder)) for trial in record.trials]
    assert left == [True, False, True, False, True, True]
    prune_losers(record, 1)
    assert not checkpoints.listed(record.trials[2].folder)


@pytest.mark.parametrize("parallel", [1, 2, 3, 7, 16])
def test_shares_of_the_node_allow_exactly_the_parallel_trials(parallel: int) -> None:
    share = trial_share(parallel)
    assert parallel * share <= 1 < (parallel + 1) * share


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ([GoBackError("10 updates in a row were skipped")], "diverged"),
        ([RuntimeError("Connection closed by peer"), GoBackError("late")], "diverged"),
        ([torch.OutOfMemoryError("CUDA out of memory")], "out of memory"),
        ([RuntimeError("lost"), MemoryError()], "out of memory"),
        ([DamagedError("3 samples", "look")], "corrupt data"),
        ([ValueError("out of memory, diverged: words do not count")], "other"),
        ([], "other"),
    ],
)
def test_the_cause_of_a_failure_follows_from_the_type_of_the_exception(
    errors: list[Exception], cause: str
) -> None:
    from ray.train import WorkerGroupError  # type: ignore[attr-defined]

    # As it travels from Ray Train's controller to the command.
    failed = pickle.loads(pickle.dumps(WorkerGroupError("failed", dict(enumerate(errors)))))
    assert cause_of(failed) == cause
    assert not errors or len(errors) > 1 or cause_of(errors[0]) == cause


NEW = {PSNR: "25.5", DATA: "d", PROTOCOL: "p"}


@pytest.mark.parametrize(
    ("policy", "champion", "above_noise", "choice", "reason"),
    [
        ("never", {}, True, "no", "never"),
        ("always", NEW | {PSNR: "30"}, False, "yes", "always"),
        ("if-better", {}, True, "no", "no champion"),
        ("if-better", NEW | {PSNR: "25.4"}, True, "yes", "the champion had 25.40 dB"),
        ("if-better", NEW | {PSNR: "25.4"}, False, "no", "not above noise"),
        ("if-better", NEW, True, "no", "the champion 25.50 dB"),
        ("if-better", NEW | {PSNR: "9", DATA: "other"}, True, "no", "other validation data"),
        ("if-better", NEW | {PSNR: "9", PROTOCOL: "other"}, True, "no", "other protocol"),
        ("if-better", {PSNR: "9"}, True, "no", "unknown validation data"),
        ("if-better", {DATA: "d", PROTOCOL: "p"}, True, "no", "nan"),
    ],
)
def test_a_model_is_registered_only_where_it_is_known_to_be_better(
    policy: Any, champion: dict[str, str], above_noise: bool, choice: str, reason: str
) -> None:
    decision = decide(policy, NEW, champion, above_noise=above_noise)
    assert decision.choice == choice and reason in decision.reason


def test_a_toy_search_does_not_replace_a_better_champion(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MEASNet(demo().model).save_pretrained(tmp_path / "champion.safetensors")

    def search(name: str, psnr: float, *more: str) -> str:
        config = parse(["demo", "--name", name, "--tracking.uri", uri, *more])
        best = TrialRecord(
            number=0,
            name=f"{name}-000",
            changes={},
            psnr=psnr,
            input_psnr=15.27,
            gain_error=0.1,
            folder=str(tmp_path / name),
        )
        record = SearchRecord(
            name=name, config={}, command="", budget=8, cost="none", validation_data="d"
        )
        for _ in range(2):  # the same command again registers nothing twice
            register_champion(config, record, best, tmp_path / "champion.safetensors", "# card")
        return record.registration

    assert "no champion" in search("first", 25.0)
    assert "first-000 is measnet@champion now" in search("first", 25.0, "--register", "always")
    assert "not above noise" in search("toy", 15.29)
    assert "it has 20.00 dB, the champion 25.00 dB" in search("worse", 20.0)
    assert "other protocol" in search("other", 26.0, "--every.validation-pictures", "2")
    assert "the champion had 25.00 dB" in search("better", 26.0)
    client = MlflowClient(uri)
    assert len(client.search_model_versions("name = 'measnet'")) == 2
    assert client.get_model_version_by_alias("measnet", "champion").tags[PSNR] == "26.0"


# ---- complete searches, slow ---------------------------------------------------------------------


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
