import json
from pathlib import Path

import pytest

from bench import results, speedrun
from bench.compare import TASKS
from distributed.config import IntervalConfig
from distributed.presets import parse
from measnet import hub
from measnet.config import tiny
from measnet.weights import load_weights
from shards.tasks import DEGRADATIONS
from tune.record import SearchRecord, TrialRecord


def _point(step: int, seconds: float, **metrics: float) -> dict[str, object]:
    return {"step": step, "time": 1000 * (100 + seconds), "metrics": metrics}


def test_the_clock_stands_still_while_it_validates() -> None:
    records = [
        _point(8, 20, **{"train/loss": 1.0}),
        _point(8, 50, **{speedrun.VALIDATED: 29.0}),
        _point(8, 51, **{"speed/validate_s": 25.0}),
        _point(16, 90, **{speedrun.VALIDATED: 30.25}),
        _point(16, 91, **{"speed/validate_s": 15.0}),
    ]
    curve = speedrun.clock(records, started=100)
    assert [(p["samples"], p["seconds"], p["psnr"]) for p in curve] == [
        (8, 25.0, 29.0),
        (16, 50.0, 30.25),
    ]
    assert speedrun.seconds_to(curve, 29.0) == 25.0
    assert speedrun.seconds_to(curve, 30.0) == 50.0
    assert speedrun.seconds_to(curve, 30.7) is None


def test_a_record_does_not_continue_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "speedrun").mkdir(parents=True)
    assert speedrun.main([]) == 2
    assert "runs/speedrun exists" in capsys.readouterr().out


def test_the_page_is_written_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"pictures": 10, "input_psnr": 20.5, "restored_psnr": 29.75, "restored_ssim": 0.8125}
    origin = {"date": "2026-01-02", "commit": "abc", "machine": "a card", "seconds": 7}
    record = origin | {
        "command": "python bench/results.py small cbsd68=CBSD68",
        "protocol": {"description": "protocol 9"},
        "held": {"denoise_25": {"packed": 10, "benchmark": 68}},
        "degradations": {"denoise_25": row},
    }
    fast = {
        **origin,
        "machine": {"cores": 2, "processor": "a processor"},
        "seconds": 90,
        "seconds_to": {"30.0": 60.0, "30.7": None},
        "psnr": 30.25,
        "samples": 1234,
        "pictures": 68,
        "curve": [{"samples": 8, "seconds": 60.0, "psnr": 30.25}],
        "command": "python bench/speedrun.py",
        "workers": "2",
    }
    for name, content in (("small/cbsd68", record), ("speedrun/first", fast)):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    page = "\n".join(results.page())
    assert "| cbsd68 | denoise_25 | 10 of 68 | 20.50 | 29.75 | +9.25 | 0.812 |" in page
    assert "`python bench/results.py small cbsd68=CBSD68`, 7 s on a card" in page
    assert (tmp_path / "speedrun" / "curves.png").is_file()
    assert "| 2026-01-02 | 1.0 min | not reached | 1.5 min | 30.25 | 1,234 | 68 |" in page


def test_a_record_names_no_folder_of_a_machine() -> None:
    assert results._without_folder("cbsd68=/home/me/CBSD68") == "cbsd68=CBSD68"
    assert results._without_folder("/data/shards/test") == "test"


def test_the_weights_that_come_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_weights("small").config == tiny()
    assert hub.SMALL_FILE.stat().st_size <= 5e6
    (tmp_path / "small").mkdir()  # a folder of that name comes first
    with pytest.raises(ValueError, match=r"the folder small holds no model\.safetensors"):
        load_weights("small")


def test_an_unknown_degradation_to_validate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every\.validation_degradations names 'denoise_26'"):
        IntervalConfig(validation_degradations=("denoise_26",))


def test_a_recipe_is_the_mean_of_its_seeds_and_only_equal_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "recipe").mkdir()
    for name, seed, samples, psnr in (
        ("field", 0, 80, 20.0),
        ("field", 1, 80, 21.0),
        ("muon", 0, 80, 22.0),
        ("muon", 1, 800, 29.0),
    ):
        record = {
            "date": "2026-11-27",
            "commit": "abc",
            "machine": "a card",
            "name": name,
            "seed": seed,
            "samples": samples,
            "crop": 48,
            "pictures": {"derain": 3},
            "gain": {"derain": psnr - 18},
            "mean_psnr": psnr,
        }
        (tmp_path / "recipe" / f"{name}-{seed}-{samples}.json").write_text(json.dumps(record))
    lines = list(results.page())
    assert "| field | 0, 1 | +2.50 | 20.50 | 20.00 - 21.00 |" in lines
    assert "| muon | 0 | +4.00 | 22.00 | 22.00 - 22.00 |" in lines
    assert "| muon | 1 | +11.00 | 29.00 | 29.00 - 29.00 |" in lines
    assert sum(line.startswith("| recipe |") for line in lines) == 2


def test_classical_methods_stand_beside_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "methods").mkdir()
    record = {
        "date": "2026-11-28",
        "commit": "abc",
        "machine": "a card",
        "seconds": 9,
        "command": "python bench/results.py small cbsd68=CBSD68 --compare cbm3d",
        "degradations": {
            "denoise_15": {"pictures": 2, "input_psnr": 24.0},
            "denoise_25": {"pictures": 2, "input_psnr": 20.0},
        },
        "about": ["CBM3D"],
        "methods": {
            "small": {"denoise_15": 32.0, "denoise_25": 28.0},
            "cbm3d": {"denoise_15": 33.0, "denoise_25": 29.0},
        },
    }
    (tmp_path / "methods" / "cbsd68.json").write_text(json.dumps(record))
    lines = list(results.page())
    assert "| cbsd68 | denoise_15 | 2 | 24.00 | small | 32.00 |" in lines
    assert "| cbsd68 | denoise_25 | 2 | 20.00 | cbm3d | 29.00 |" in lines
    assert lines.count("* CBM3D") == 1


def test_a_network_for_one_task_sees_nothing_of_the_others() -> None:
    for task, options in TASKS.items():
        given = [part for pair in options.items() for part in (f"--{pair[0]}", pair[1])]
        repeats = parse(["small", *given], prog="test").data.repeats
        kept = {DEGRADATIONS[name].task for name, times in repeats.items() if times}
        assert kept == (set(TASKS) - {"all"} if task == "all" else {task})


def test_the_trials_of_a_search_are_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    folder = tmp_path / "runs" / "search"
    values = {"model.num_pixel_experts": 6, "recipe.balance_weight": 1e-4}
    trials = [
        TrialRecord(0, "trial-000", values, state="finished", samples=80, psnr=22.0),
        TrialRecord(1, "trial-001", values, state="stopped", samples=40, psnr=25.0),
        TrialRecord(2, "trial-002", values, state="finished", samples=80, psnr=22.5),
    ]
    for trial in trials:
        trial.input_psnr, trial.choice_worth = 20.0, 0.25
    SearchRecord(
        "search", {}, "python -m tune.search small", 80, "none", trials, folder=str(folder)
    ).save()
    results.add_search(folder)
    with pytest.raises(ValueError, match=r"holds no search\.json"):
        results.add_search(tmp_path)
    rows = [line for line in results.page() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| 2", "| 0 (paper)", "| 1"]
    assert rows[0] == "| 2 | 6 | 0.0001 | 80 | 22.50 | +2.50 | – | – | +0.25 |"


def test_the_choice_of_experts_is_shown_beside_the_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "routing").mkdir()
    rows = [("noise", 0, 0.5, 21.0), ("noise", 1, -0.1, 21.5)]
    for name, seed, worth, psnr in [*rows, (results.PAPER, 0, 0, 20), (results.PAPER, 1, 0, 21)]:
        record = {
            "date": "2026-11-27",
            "commit": "abc",
            "machine": "a card",
            "name": name,
            "seed": seed,
            "samples": 80,
            "crop": 48,
            "pictures": {"derain": 3},
            "gain": {"derain": 1.0},
            "mean_psnr": psnr,
            "effective_experts": {"encoder1": 3.0, "encoder2": 4.0, "decoder1.low": 2.0},
            "information": {"encoder1": 0.1, "encoder2": 0.3, "decoder1.low": 0.0},
            "worth": {"derain": worth, "mean": worth},
        }
        (tmp_path / "routing" / f"{name}-{seed}.json").write_text(json.dumps(record))
    page = list(results.page())
    measured = "3.50 | 2.00 | 0.20 | 0.00"
    better = "+1.00, +0.50 | +0.75 ± 0.25"
    assert f"| noise | {measured} | +0.50, -0.10 | +0.20 | {better} |" in page
    assert f"| {results.PAPER} | {measured} | +0.00, +0.00 | +0.00 | – | – |" in page
