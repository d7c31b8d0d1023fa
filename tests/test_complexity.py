"""Counts against a count by hand; the memory prediction against a process that trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from measnet import complexity
from measnet import config as configs
from measnet.complexity import count, largest_micro_batch, parse_bytes, predict
from measnet.config import ModelConfig, replace_dotted
from measnet.network import MEASNet

TINY = configs.tiny()


def test_parameters_and_multiply_adds_by_hand() -> None:
    """The backbone of one size, written out from the description of its parts."""
    config = replace_dotted(TINY, dict.fromkeys(("tspg", "mese", "fd", "mee"), False))
    counted = count(MEASNet(config), 64, 64)
    width, expansion = config.dim, config.ffn_expansion

    def block(channels: int, heads: int, pixels: int) -> tuple[float, float]:
        hidden = int(channels * expansion)
        padded = hidden + -hidden % 16  # what is computed; the parameters are not padded
        parameters = 4 * channels + heads  # two norms, temperature
        parameters += 3 * channels * (channels + 9) + channels * channels
        parameters += 2 * hidden * (channels + 9) + hidden * channels
        operations = 2 * 2 * channels * pixels  # norms
        operations += 3 * channels * (channels + 9) * pixels  # q, k, v
        operations += channels * channels / heads * pixels  # q kᵀ
        operations += channels * channels / heads * channels  # output convolution times attention
        operations += channels * channels * pixels  # v
        operations += padded * (2 * (channels + 9) + channels) * pixels
        return parameters, operations

    sizes = [64 * 64 // 4**level for level in range(4)]
    blocks = [(width * 2**n, config.heads[n], sizes[n]) for n in range(4)]  # encoder, latent
    blocks += [blocks[2], blocks[1], *2 * [(width * 2, config.heads[0], sizes[0])]]
    counts = [block(*one) for one in blocks]
    parameters = sum(p for p, _ in counts)
    operations = sum(o for _, o in counts)
    dense = [(3, width, sizes[0]), (2 * width, 3, sizes[0])]  # 3×3: in, out, pixels
    dense += [(width * 2**n, width * 2**n // 2, sizes[n]) for n in range(3)]  # down
    dense += [(width * 2**n, width * 2**n * 2, sizes[n]) for n in (3, 2, 1)]  # up
    parameters += sum(9 * i * o for i, o, _ in dense)
    operations += sum(9 * i * o * pixels for i, o, pixels in dense)
    for n in (1, 2):  # merging at levels 2 and 3
        parameters += 2 * (width * 2**n) ** 2
        operations += 2 * (width * 2**n) ** 2 * sizes[n]
    assert counted.total_parameters == parameters
    assert counted.total_multiply_adds == pytest.approx(operations, rel=1e-6)
    assert sum(counted.operators.values()) == pytest.approx(counted.total_multiply_adds)


def test_only_chosen_experts_are_counted() -> None:
    def experts1(**changes: object) -> float:
        config = replace_dotted(TINY, {"expert_path": "sorted", **changes})
        return count(MEASNet(config), 64, 64).multiply_adds["experts1"]

    hidden, pixels, width = int(16 * 2.66), 64 * 64, 16
    one_expert = 2 * width * hidden * pixels
    assert experts1(pixel_top_k=3) - experts1(pixel_top_k=2) == one_expert
    gate = width * pixels + width + 0  # one more column of logits, and of the prompt's half
    assert experts1(pixel_experts=5) - experts1() == pytest.approx(gate, abs=width)


def test_presets_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.png"
    assert complexity.main(["tiny", "--chart", str(chart)]) == 0
    out = capsys.readouterr().out
    assert "refinement" in out and "PromptIR" in out and "total" in out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert complexity.main(["large"]) == 2
    assert "unknown preset large" in capsys.readouterr().err
    assert complexity.main(["--memory", "much"]) == 2
    assert "24GiB" in capsys.readouterr().err


def test_the_official_network_is_the_programs_less_what_has_no_effect() -> None:
    with torch.device("meta"):
        ours = sum(p.numel() for p in MEASNet(configs.official()).parameters())
    assert ours + complexity.DEAD_OFFICIAL_PARAMETERS == 31_680_752


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
    with complexity._Live(besides=[weight]) as live:
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
    memory = complexity.Memory(state=1000, constant=500.0, per_pixel=2.0)
    budget = (1000 + 500 + 2 * 64 * 3) / complexity.RESERVE
    assert largest_micro_batch(memory, budget + 1, 8) == 3
    assert largest_micro_batch(memory, budget - 1, 8) == 2
    assert largest_micro_batch(memory, 100, 8) == 0
