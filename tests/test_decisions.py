"""The automatic choices of a run, over a table of machines."""

import dataclasses

import pytest

from distributed.config import EngineConfig, Recipe, ScalingConfig, TrainConfig
from distributed.decisions import (
    choose_checkpointing,
    choose_compile,
    choose_precision,
    decide,
    training_device,
)
from distributed.engine import predict_fit
from distributed.presets import PRESETS
from measnet.hardware import Card
from measnet.memory import Fit
from tests.machines import H100, MACHINES, RTX_3050, RTX_4090, T4

RECIPE = Recipe(samples=800, global_batch=8, micro_batch=2)


@pytest.mark.parametrize(
    ("machine", "asked", "workers", "device"),
    [
        ("no GPU", "auto", "1", "cpu"),
        ("no GPU", "auto", "2", "cpu"),
        ("no GPU", "cpu", "4", "cpu"),
        ("old driver", "auto", "1", "cpu"),
        ("8 GB", "auto", "1", "cuda"),
        ("T4", "gpu", "1", "cuda"),
        ("4090", "auto", "1", "cuda"),
        ("4090", "auto", "1..8", "cuda"),
        ("4090", "cpu", "2", "cpu"),
        ("H100", "gpu", "1", "cuda"),
        ("8 H100", "auto", "8", "cuda"),
        ("8 H100", "cpu", "16", "cpu"),
    ],
)
def test_device_of_a_local_run(machine: str, asked: str, workers: str, device: str) -> None:
    scaling = ScalingConfig(device=asked, workers=workers)  # type: ignore[arg-type]
    assert training_device(scaling, 0, MACHINES[machine]) == device


@pytest.mark.parametrize(
    ("machine", "asked", "workers", "message"),
    [
        ("no GPU", "gpu", "1", "scaling.device is gpu, but torch sees no GPU"),
        ("old driver", "gpu", "1", "535.104.05"),
        ("4090", "auto", "2", "this machine has 1 GPU, and each worker needs its own"),
        ("4090", "gpu", "2..4", "use --scaling.workers 1, or --scaling.device cpu"),
        ("8 H100", "gpu", "16", "this machine has 8 GPUs"),
    ],
)
def test_what_a_machine_cannot_give_is_refused_at_once(
    machine: str, asked: str, workers: str, message: str
) -> None:
    scaling = ScalingConfig(device=asked, workers=workers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        training_device(scaling, 0, MACHINES[machine])


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 8, "cuda"), ("gpu", 0, "cuda"), ("cpu", 8, "cpu")],
)
def test_a_cluster_may_still_start_gpu_nodes(asked: str, gpus: int, device: str) -> None:
    scaling = ScalingConfig(device=asked, workers="16")  # type: ignore[arg-type]
    assert training_device(scaling, gpus, None) == device


@pytest.mark.parametrize(
    ("asked", "card", "precision", "reason"),
    [
        ("auto", None, "fp32", "the device is a CPU"),
        ("auto", T4, "fp32", "Tesla T4 has no bf16"),
        ("auto", RTX_3050, "bf16", "supports it"),
        ("auto", RTX_4090, "bf16", "supports it"),
        ("auto", H100, "bf16", "supports it"),
        ("fp32", H100, "fp32", "asks for it"),
        ("bf16", T4, "bf16", "emulates it"),
        ("bf16", None, "bf16", "asks for it"),
    ],
)
def test_precision(asked: str, card: Card | None, precision: str, reason: str) -> None:
    choice = choose_precision(asked, card)
    assert choice.choice == precision and reason in choice.reason


WITHOUT = Fit(checkpointing=False, needed=15e9, usable=23e9, largest=11)
WITH = Fit(checkpointing=True, needed=10e9, usable=23e9, largest=46)
NEVER = Fit(checkpointing=None, needed=30e9, usable=23e9, largest=40)


@pytest.mark.parametrize(
    ("asked", "predicted", "choice", "message"),
    [
        ("auto", None, "off", "the device is a CPU"),
        ("auto", WITHOUT, "off", "14.0 of 21.4 GiB"),
        ("auto", WITH, "on", "without it, it does not fit"),
        ("auto", NEVER, "on", "lower recipe.micro_batch to 40"),
        ("auto", NEVER._replace(largest=0), "on", "use a larger GPU"),
        ("off", WITH, "off", "asks for it"),
        ("on", WITHOUT, "on", "asks for it"),
    ],
)
def test_activation_checkpointing(
    asked: str, predicted: Fit | None, choice: str, message: str
) -> None:
    decision = choose_checkpointing(asked, 8, predicted)
    assert decision.choice == choice and message in decision.reason


@pytest.mark.parametrize(
    ("card", "micro_batch", "checkpointing"),
    [
        (RTX_3050, 2, False),
        (RTX_3050, 8, True),
        (T4, 8, True),
        (RTX_4090, 8, False),
        (H100, 32, False),
    ],
)
def test_checkpointing_of_the_paper_on_a_card(
    card: Card, micro_batch: int, checkpointing: bool
) -> None:
    config = TrainConfig(recipe=Recipe(global_batch=32, micro_batch=micro_batch))
    predicted = predict_fit(config, 1, card)
    assert predicted.checkpointing is checkpointing
    assert predicted.needed <= predicted.usable == 0.9 * card.memory


def test_the_4090_preset_fits_without_checkpointing() -> None:
    assert predict_fit(PRESETS["local-4090"](), 1, RTX_4090).checkpointing is False


def test_compiling_is_never_chosen_by_itself() -> None:
    assert [choose_compile(asked).choice for asked in ("auto", "off", "on")] == ["off", "off", "on"]


def test_decisions_name_their_reason() -> None:
    config = TrainConfig(recipe=RECIPE, scaling=ScalingConfig(workers="2"))
    decisions = decide(config, 2, None)
    assert decisions.precision == ("fp32", "the device is a CPU")
    assert decisions.accumulation == ("2", "global batch 8 / 2 workers / micro-batch 2")
    assert all(decision.choice and decision.reason for decision in decisions)
    exact = dataclasses.replace(config, engine=EngineConfig(deterministic="on"))
    assert decide(exact, 2, H100).deterministic.choice == "on"


def test_workers_that_do_not_divide_the_micro_batches_are_idle() -> None:
    config = TrainConfig(recipe=RECIPE, scaling=ScalingConfig(workers="1..8"))
    assert decide(config, 3, None).accumulation == (
        "2",
        "global batch 8 / 2 workers / micro-batch 2, 1 more are idle",
    )
