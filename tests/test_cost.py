import pytest

from distributed import cost
from distributed.config import TrainConfig
from distributed.cost import (
    MEASURED,
    Rate,
    Step,
    amount,
    choose_rate,
    duration,
    main,
    measure,
    rows,
)
from distributed.presets import PRESETS
from measnet.config import replace_dotted
from measnet.hardware import Machine


def row(text: str, workers: int) -> list[str]:
    """The cells of the table for this number of workers."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    (cells,) = [line for line in lines if line[:1] == [str(workers)]]
    return cells


def test_hours_follow_from_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper-5task", "--step-seconds", "0.4", "--price", "0.5"]) == 0
    said = capsys.readouterr().out
    hours = 24_396_900 / (4 / 0.4) / 3600
    price = f"{hours * 0.5:,.0f}"
    assert row(said, 1) == ["1", "10.0", f"{hours:,.1f} h", f"{hours:,.1f} h", price]
    assert row(said, 2) == ["2", "20.0", f"{hours / 2:,.1f} h", f"{hours:,.1f} h", price]


def test_workers_on_one_machine_share_its_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "1", "--price", "1.2"]) == 0
    said = capsys.readouterr().out
    one, two = row(said, 1), row(said, 2)
    assert one[1:] == two[1:]
    assert float(one[4]) > 0
    assert "share its cores" in said


def test_a_short_run_costs_minutes_and_cents() -> None:
    rate = Rate(10.0, 10.0, "as given", cpu=True)
    config = replace_dotted(PRESETS["demo"](), {"recipe.samples": 9600})
    minutes = "16.0 min"
    assert rows(config, rate, 1.2) == [
        ("1", "10.0", minutes, minutes, "0.32"),
        ("2", "10.0", minutes, minutes, "0.32"),
    ]


def test_the_rate_is_the_mean_of_all_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(config: TrainConfig, steps: int) -> Step:
        assert not config.data.later_crops
        return Step(config.data.crop / 48, "a CPU, fp32", cpu=True)

    monkeypatch.setattr(cost, "_measure_step", step)
    fields = {"recipe.samples": 4800, "data.later_crops": "3600:96,9600:480"}
    rate = measure(replace_dotted(PRESETS["demo"](), fields), 1)
    assert rate.low == pytest.approx(2 / 1.25)
    assert "2 crops of 48, 96 takes 1.25 s on average, measured on a CPU, fp32" in rate.source


def test_without_a_gpu_a_run_for_one_is_taken_from_a_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "this_machine", lambda: Machine(cores=2))
    assert main(["paper-3task"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H100 80GB" in said and "not measured since" in said
    short, long = (21_364_650 / rate / 3600 for rate in (28, 24))
    assert row(said, 1)[1:3] == ["24.0 to 28.0", f"{short:.1f} to {long:.1f} h"]


@pytest.mark.parametrize("preset", PRESETS)
def test_only_a_run_for_a_gpu_is_taken_from_a_measurement(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Rate(1.0, 1.0, "here", cpu=True)
    monkeypatch.setattr(cost, "measure", lambda config, steps: here)
    rate = choose_rate(PRESETS[preset](), Machine(cores=2), 1)
    assert (rate == here) == (PRESETS[preset]().scaling.device == "cpu")
    assert rate.low in (here.low, *(known.low for known in MEASURED.values()))


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.01, 0.01, "0.6 min"),
        (0.5, 0.75, "30.0 to 45.0 min"),
        (0.9, 1.0, "0.9 to 1.0 h"),
        (2400, 2400, "2,400.0 h"),
    ],
)
def test_durations(low: float, high: float, shown: str) -> None:
    assert duration(low, high) == shown


@pytest.mark.parametrize(
    ("price", "shown"),
    [(0.00312, "0.0031"), (0.1, "0.10"), (4.567, "4.57"), (99.5, "99.50"), (1234.5, "1,234")],
)
def test_prices_keep_two_digits(price: float, shown: str) -> None:
    assert amount(price) == shown


def test_workers_share_the_batch_evenly() -> None:
    assert PRESETS["paper-5task"]().recipe.worker_counts == [1, 2, 4, 8]


@pytest.mark.parametrize("wrong", [["nonsense"], ["demo", "--steps", "0"], ["demo", "--price=-1"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")
