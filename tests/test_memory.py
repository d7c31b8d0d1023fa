"""The memory prediction against a process that trains."""

import os
import subprocess
import sys

import pytest
import torch

from measnet import config as configs
from measnet.config import ModelConfig
from measnet.memory import RESERVE, Memory, _Live, largest_micro_batch, parse_bytes, predict


def test_sizes_are_read() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5 GB") == 1.5e9
    with pytest.raises(ValueError, match="24GiB"):
        parse_bytes("24")


MEASURE = """
import sys, torch
from measnet import config
from measnet.losses import restoration_loss
from measnet.network import MEASNet
torch.set_num_threads(2)
preset, checkpointing, precision, batch, crop = sys.argv[1:]
model = MEASNet(getattr(config, preset)())
model.activation_checkpointing = checkpointing == "True"
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
def step(image):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        restoration = model(image)
    restoration_loss(restoration, image, 1e-4).total.backward()
step(torch.rand(1, 3, 32, 32))  # libraries are loaded
def resident(field):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field))
before = resident("VmRSS")
step(torch.rand(int(batch), 3, int(crop), int(crop)))
print((resident("VmHWM") - before) * 1024)
"""


def check_memory(preset: str, checkpointing: bool, precision: str, batch: int, crop: int) -> None:
    # An allocator that keeps what was freed would be measured instead of the network.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, preset, str(checkpointing), precision]
    command += [str(batch), str(crop)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    config: ModelConfig = getattr(configs, preset)()
    memory = predict(config, precision=precision, checkpointing=checkpointing)  # type: ignore[arg-type]
    assert memory.step(batch, crop) == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_prediction() -> None:
    check_memory("tiny", False, "fp32", 2, 128)


def test_weights_and_gradients_are_state_and_not_counted_again() -> None:
    weight = torch.zeros(1000)
    with _Live(besides=[weight]) as live:
        weight.add_(1)
        weight.view(10, 100).mul_(2)
        assert live.peak == 0
        assert (weight + 1).nbytes == live.peak == 4000
    assert live.bytes == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("preset", "checkpointing", "precision", "batch", "crop"),
    [
        ("tiny", True, "fp32", 4, 128),
        ("tiny", False, "bf16", 4, 128),
        ("tiny", True, "bf16", 4, 128),
        ("paper", False, "fp32", 1, 128),
        ("paper", True, "fp32", 2, 128),
        ("official", False, "fp32", 1, 128),
    ],
)
def test_memory_prediction_of_more(
    preset: str, checkpointing: bool, precision: str, batch: int, crop: int
) -> None:
    check_memory(preset, checkpointing, precision, batch, crop)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    memory = Memory(state=1000, constant=500.0, per_pixel=2.0)
    budget = (1000 + 500 + 2 * 64 * 3) / RESERVE
    assert largest_micro_batch(memory, budget + 1, 8) == 3
    assert largest_micro_batch(memory, budget - 1, 8) == 2
    assert largest_micro_batch(memory, 100, 8) == 0
