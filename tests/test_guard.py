import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distributed.exchange import Step, StepSums
from distributed.guard import (
    PASSED_OVER,
    GoBackError,
    RateWatch,
    SkipCounter,
    SpikeDetector,
    StepGuard,
    chain,
    describe_samples,
    routing_warnings,
    watch_unused,
)
from distributed.presets import demo
from measnet.config import replace_dotted, tiny


def test_the_chain_tells_order_and_content() -> None:
    first = chain("", [1, 2])
    assert chain(first, [3, 4]) == chain(chain("", [1, 2]), [3, 4])
    assert len({first, chain("", [2, 1]), chain("", [1, 3]), chain("x", [1, 2])}) == 4


def test_a_loss_that_stands_out_is_noticed_and_noise_is_not() -> None:
    draw = random.Random(0)
    detector = SpikeDetector(8.0)
    found = [detector.is_spike(0.1 + 0.01 * draw.gauss(0, 1)) for _ in range(2000)]
    assert not any(found)
    assert detector.is_spike(0.5)
    assert not detector.is_spike(float("nan"))
    assert not detector.is_spike(0.1)


def test_skips_in_a_row_lead_back_and_their_samples_are_passed_over(tmp_path: Path) -> None:
    counter = SkipCounter(str(tmp_path), limit=2)
    assert not counter.after_step(0, skipped=True)
    assert not counter.after_step(8, skipped=False)
    assert not counter.after_step(16, skipped=True)
    assert counter.after_step(24, skipped=True)
    assert counter.pass_over(32) == [16, 32]
    assert json.loads((tmp_path / PASSED_OVER).read_text()) == [[16, 32]]
    again = SkipCounter(str(tmp_path), limit=2)
    assert [again.after_skipped(s) for s in (8, 16, 24, 32)] == [8, 32, 32, 32]


@pytest.mark.parametrize(
    ("spans", "apart"),
    [
        ([], []),
        ([[16, 32], [48, 64]], [[16, 32], [48, 64]]),
        ([[48, 64], [16, 32]], [[16, 32], [48, 64]]),  # the later one came first
        ([[200, 300], [180, 330]], [[180, 330]]),  # skipping began earlier the second time
        ([[16, 32], [32, 40], [24, 28]], [[16, 40]]),
    ],
)
def test_spans_that_overlap_are_one(
    tmp_path: Path, spans: list[list[int]], apart: list[list[int]]
) -> None:
    (tmp_path / PASSED_OVER).write_text(json.dumps(spans))
    counter = SkipCounter(str(tmp_path), limit=2)
    assert counter.spans == apart
    for first, end in apart:
        assert (
            counter.after_skipped(first)
            == counter.after_skipped(end - 1)
            == counter.after_skipped(end)
            == end
        )


def test_a_run_goes_back_after_skips_in_a_row_and_names_their_samples(tmp_path: Path) -> None:
    changes = {"storage": str(tmp_path), "name": "r", "guard.skips_in_a_row": 2}
    config = replace_dotted(demo(), {**changes, "recipe.global_batch": 8})
    (tmp_path / "r").mkdir()
    weight = nn.Parameter(torch.ones(1))
    lines: list[str] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        guard = StepGuard(config, torch.optim.Adam([weight]), lambda: ["gate"], lines.append)
        for samples, updated in ((8, True), (16, False), (24, True), (32, False)):
            guard.after_step(*one_step(samples, updated))
        assert guard.skips.in_a_row == 1
        with pytest.raises(GoBackError, match="2 updates in a row were skipped up to 40 samples"):
            guard.after_step(*one_step(40, False))
    finally:
        dist.destroy_process_group()
    assert lines[0] == "warning: no gradient ever reaches gate"
    assert [line.partition(": ")[2] for line in lines[1:4]] == ["key16", "key32", "key40"]
    assert lines[4].endswith("going back, leaving out samples 24 to 40")
    assert SkipCounter(config.folder, 2).spans == [[24, 40]]


def one_step(samples: int, updated: bool) -> tuple[Step, StepSums]:
    step = Step(samples, 1e-3, [f"key{samples}"], True, 8, 1.0)
    return step, StepSums([0.1, 0.1, 0.0, 1.0], 0.0, False, False, 0, updated, [])


def test_parameters_without_gradient_are_named() -> None:
    network = nn.ModuleDict({"used": nn.Linear(2, 2), "forgotten": nn.Linear(2, 2)})
    network["used"].bias.requires_grad_(False)
    finish = watch_unused(network)
    network["used"](torch.ones(1, 2)).sum().backward()
    assert finish() == ["forgotten.bias", "forgotten.weight"]
    assert finish() == ["forgotten.bias", "forgotten.weight"]  # the hooks have gone


def test_a_learning_rate_of_zero_is_noticed_once() -> None:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, (1e-3, 1e-4), strict=True)]
    optimizer = torch.optim.Adam(groups)
    watch = RateWatch(optimizer)
    found = []
    for rate in (1e-4, 0.0, 0.0, 1e-4, 0.0):
        optimizer.param_groups[1]["lr"] = rate
        found.append(watch.falls_to_zero())
    assert found == [False, True, False, False, True]


def test_samples_fit_in_a_line() -> None:
    assert describe_samples(["a", "b"]) == "a, b"
    assert describe_samples([str(n) for n in range(10)], most=2) == "0, 1 and 8 more"


@pytest.mark.parametrize(
    ("library", "chosen", "words"),
    [
        ("encoder1", [50.0, 50.0, 0.0, 0.0], "encoder1 has collapsed: it uses 2.0 of 4 experts"),
        ("encoder1", [50.0, 40.0, 9.0, 0.0], "experts 3 of encoder1 were not chosen once"),
        ("encoder1", [30.0, 30.0, 20.0, 20.0], ""),
        ("decoder1.low", [10.0, 10.0, 0.0], "model.routing.picture-weight"),
        ("decoder1.low", [0.0, 0.0, 0.0], ""),
    ],
)
def test_warnings_name_the_library_and_what_to_try(
    library: str, chosen: list[float], words: str
) -> None:
    warnings = routing_warnings({library: chosen}, tiny())
    assert [words in line for line in warnings] == ([True] if words else [])
