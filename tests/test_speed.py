"""The metrics of speed."""

import pytest
import torch

from distributed.progress import progress_line
from distributed.speed import Speed, StepClock, arithmetic, durations, flops_per_sample
from measnet.complexity import count, network_cost
from measnet.config import tiny
from measnet.hardware import Card, Peak
from measnet.network import MEASNet


def test_operations_follow_the_area_of_the_crop() -> None:
    assert flops_per_sample(1e9, 256) == 6e9
    assert flops_per_sample(1e9, 128) == 1.5e9
    scaled = flops_per_sample(network_cost(tiny())["multiply_adds"], 64)
    counted = 6 * count(MEASNet(tiny()), 64, 64).total_multiply_adds
    assert scaled == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize(
    ("world", "peak", "share"),
    [(1, Peak(100, 1), 0.24), (2, Peak(100, 1), 0.12), (1, None, None)],
)
def test_share_of_the_peak(world: int, peak: Peak | None, share: float | None) -> None:
    metrics = arithmetic(80.0, flops=3e11, world=world, peak=peak)
    assert metrics["speed/model_tflops"] == pytest.approx(24.0)
    assert metrics.get("speed/peak_share") == (share and pytest.approx(share))


def test_parts_of_a_step_add_up() -> None:
    marks = [("data", 0.0), ("forward_backward", 1.0), ("update", 3.0)]
    marks += [("data", 3.5), ("forward_backward", 4.0), ("update", 6.0), ("data", 9.0)]
    assert durations(marks) == {"data": 1.5, "forward_backward": 4.0, "update": 3.5}


def test_a_clock_begins_anew_with_each_step() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("forward_backward")
    clock.begin("update")
    assert [phase for phase, _ in clock.end_step()] == ["forward_backward", "update", "data"]
    assert [phase for phase, _ in clock.end_step()] == ["data"]


def test_times_are_means_per_step_of_one_point() -> None:
    speed = Speed(1, Card(name="NVIDIA H100 80GB HBM3", memory=1, capability=(9, 0)))

    def step(seconds: float, *, last: bool) -> dict[str, float]:
        marks = [("forward_backward", 0.0), ("update", seconds), ("data", seconds + 1.0)]
        point = {"speed/samples_per_s": 989.0}
        return speed.after_step(point, marks, flops=1e12, last=last)

    step(1.0, last=False)
    ends = step(3.0, last=True)
    assert (ends["speed/forward_backward_s"], ends["speed/update_s"]) == (2.0, 1.0)
    assert ends["speed/peak_share"] == pytest.approx(1.0)
    assert step(5.0, last=True)["speed/forward_backward_s"] == 5.0


def test_the_progress_line_has_the_parts_of_a_step() -> None:
    progress = {
        "samples": 4800,
        "speed/samples_per_s": 20.0,
        "speed/data_wait": 0.014,
        "speed/forward_backward_s": 0.38,
        "speed/update_s": 0.0213,
        "train/loss": 0.08081,
        "train/learning_rate": 2e-4,
    }
    assert progress_line(progress, 8000) == (
        "4,800/8,000 samples  20.0/s  loss 0.0808  lr 2.00e-04  "
        "passes 0.38 s, update 21 ms, data wait 1%  left 2:40"
    )
    assert "20.0/s (42% of the card's peak)  loss" in progress_line(
        {**progress, "speed/peak_share": 0.42}, 8000
    )
