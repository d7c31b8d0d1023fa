import pytest

from distributed.cost import main, worker_counts
from distributed.presets import PRESETS


def test_hours_follow_from_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper-5task", "--step-seconds", "0.4", "--price", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    hours = 24_396_900 / (4 / 0.4) / 3600
    (one,) = [line for line in lines if line.split("│")[1:2] and line.split("│")[1].strip() == "1"]
    cells = [cell.strip() for cell in one.split("│")[1:-1]]
    assert cells == ["1", "10.0", f"{hours:,.1f}", f"{hours:,.1f}", f"{hours * 0.5:,.0f}"]


def test_workers_share_the_batch_evenly() -> None:
    assert worker_counts(PRESETS["paper-5task"]()) == [1, 2, 4, 8]


@pytest.mark.parametrize("wrong", [["nonsense"], ["demo", "--steps", "0"], ["demo", "--price=-1"]])
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")
