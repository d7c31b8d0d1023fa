"""The metrics of speed."""

import pytest
import torch

from distributed.progress import progress_line
from distributed.speed import Phase, Speed, StepClock, arithmetic, durations, flops_per_sample
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
    marks = [("data", 0.0), ("forward", 1.0), ("backward", 2.0), ("update", 3.0)]
    marks += [("data", 3.5), ("forward", 4.0), ("backward", 4.5), ("update", 6.0), ("data", 9.0)]
    assert durations(marks) == {"data": 1.5, "forward": 1.5, "backward": 2.5, "update": 3.5}


def test_a_clock_begins_anew_with_each_step() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("forward")
    clock.begin("update")
    assert [phase for phase, _ in clock.end_step()] == ["forward", "update", "data"]
    assert [phase for phase, _ in clock.end_step()] == ["data"]


def after_steps(
    steps: list[list[tuple[Phase, float]]], forward_share: float | None = None
) -> dict[str, float]:
    """The metrics after some steps, the last of which ends a point."""
    speed = Speed(1, Card(name="NVIDIA H100 80GB HBM3", memory=1, capability=(9, 0)))
    point = {"speed/samples_per_s": 989.0}
    for number, marks in enumerate(steps, 1):
        found = speed.after_step(
            point, marks, flops=1e12, last=number == len(steps), forward_share=forward_share
        )
    return found


def test_times_are_means_per_step_of_one_point() -> None:
    def step(seconds: float) -> list[tuple[Phase, float]]:
        ends = 3 * seconds
        return [("forward", 0.0), ("backward", seconds), ("update", ends), ("data", ends + 1)]

    found = after_steps([step(1.0), step(3.0)])
    names = ("forward", "backward", "forward_backward", "update")
    assert [found[f"speed/{name}_s"] for name in names] == [2.0, 4.0, 6.0, 1.0]
    assert found["speed/peak_share"] == pytest.approx(1.0)


def test_a_point_begins_anew_after_the_last_one() -> None:
    speed = Speed(1, None)
    for seconds in (1.0, 5.0):
        marks: list[tuple[Phase, float]] = [("forward", 0.0), ("update", seconds), ("data", 9.0)]
        found = speed.after_step({"speed/samples_per_s": 1.0}, marks, flops=1, last=True)
        assert found["speed/forward_s"] == seconds


def test_the_passes_of_a_graph_are_split_by_the_share_that_was_measured() -> None:
    marks: list[tuple[Phase, float]] = [
        ("forward", 0.0),  # until the host starts the graph
        ("graph", 0.5),
        ("update", 4.5),
        ("data", 5.0),
    ]
    found = after_steps([marks], 0.25)
    assert (found["speed/forward_s"], found["speed/backward_s"]) == (1.5, 3.0)
    found = after_steps([marks])
    assert found["speed/forward_backward_s"] == 4.5
    assert "speed/forward_s" not in found


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
    more = {
        "speed/forward_s": 0.12,
        "speed/backward_s": 0.26,
        "speed/validate_s": 25.0,
        "speed/save_s": 0.031,
    }
    assert progress_line(progress | more, 8000).endswith(
        "forward 0.12 s, backward 0.26 s, update 21 ms, data wait 1%, "
        "last validation 25.00 s, last checkpoint 31 ms  left 2:40"
    )
    assert "20.0/s (42% of the card's peak)  loss" in progress_line(
        {**progress, "speed/peak_share": 0.42}, 8000
    )
