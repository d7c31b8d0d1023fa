"""Parts of a search without a run: taking over weights, schedulers, pruning, the registry."""

import dataclasses
import io
import pickle
import random
import subprocess
import sys
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
from tune.space import Parameter, Space
from tune.trial import take_over

ROOT = Path(__file__).resolve().parent.parent


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
