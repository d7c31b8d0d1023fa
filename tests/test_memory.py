"""The memory prediction against measurements on an H100, a training process, and DeepSpeed."""

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from measnet import config as configs
from measnet.autocast import CudaAutocast, autocast_off
from measnet.complexity import main
from measnet.config import ModelConfig, replace_dotted
from measnet.hardware import Card
from measnet.losses import restoration_loss
from measnet.memory import (
    RESERVE,
    Memory,
    Precision,
    _LiveTensors,
    _step,
    cards_table,
    fit,
    largest_micro_batch,
    parameter_count,
    parse_bytes,
    predict,
    state_bytes,
)
from measnet.network import MEASNet
from measnet.ops.choice import torch_only
from tests.ranks import run_ranks

# Peaks of torch's allocator on one H100 (torch 2.11, CUDA 13.0): forward, backward and AdamW in a
# loop of one process without an average of the weights; crops of 128; GiB.
MEASURED = [
    ("paper", "bf16", False, 8, 15.4),
    ("paper", "bf16", False, 14, 26.6),
    ("paper", "bf16", False, 32, 60.0),
    ("paper", "bf16", True, 50, 22.8),
]
MEASURED_TOO = [
    ("paper", "fp32", False, 8, 24.0),
    ("official", "fp32", False, 8, 21.9),
    ("official", "bf16", False, 8, 14.3),
]


def test_kernels_keep_less_than_half_of_what_torch_keeps() -> None:
    """Counted; tests/gpu measures it."""
    pytest.importorskip("triton")
    by_torch, by_kernels = (
        predict(configs.paper(), precision="bf16", kernels=kernels).step(8, 128)
        for kernels in (False, True)
    )
    assert by_kernels < 0.45 * by_torch


@pytest.mark.parametrize(
    ("preset", "precision", "checkpointing", "batch", "gib"),
    [*MEASURED, *(pytest.param(*row, marks=pytest.mark.slow) for row in MEASURED_TOO)],
)
def test_prediction_for_a_gpu_is_what_an_h100_took(
    preset: str, precision: Precision, checkpointing: bool, batch: int, gib: float
) -> None:
    config: ModelConfig = getattr(configs, preset)()
    state = 16 * parameter_count(config)  # weights, gradients, two moments
    memory = predict(config, precision=precision, checkpointing=checkpointing, state=state)
    assert memory.total(batch, 128) / 2**30 == pytest.approx(gib, rel=0.1)


def test_a_gpu_needs_no_other_paths_than_meta_takes() -> None:
    # Torch's own operations on the CPU, dense experts, keep about what `meta` counts in fp32.
    on_meta = _step(configs.tiny(), "fp32", False, "cuda", 2, 64)
    model = MEASNet(replace_dotted(configs.tiny(), {"expert_path": "dense"}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    image = torch.rand(2, 3, 64, 64)
    with torch_only(), _LiveTensors([one for one in state if one is not None]) as live:
        restoration_loss(model(image), image, 1e-4).total.backward()
    assert live.peak == pytest.approx(on_meta, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_chooses_types_as_on_a_gpu(device: str) -> None:
    x, weight = torch.rand(2, 4, device=device), torch.rand(4, 4, device=device)
    with CudaAutocast(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = F.linear(x, weight)
        assert low.dtype == (low + low).dtype == (x @ weight).dtype == torch.bfloat16
        for full in (F.layer_norm(low, (4,)), low.square(), low.sum(0), torch.softmax(low, 0)):
            assert full.dtype == torch.float32
        assert torch.cat([low, x]).dtype == torch.float32
        assert torch.cat([low, low]).dtype == torch.bfloat16
        assert low.double().exp().dtype == torch.float64
        with autocast_off(x):
            assert F.linear(x, weight).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.bfloat16
    assert F.linear(x, weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("gib", "checkpointing"), [(4.0, False), (1.5, True), (0.1, None)], ids=str
)
def test_a_card_fits_a_micro_batch_without_or_with_checkpointing_or_not(
    gib: float, checkpointing: bool | None
) -> None:
    card = Card(name="any", memory=int(gib * 2**30), capability=(8, 0))
    config = configs.tiny()
    found = fit(card, config, micro_batch=8, crop=128, precision="bf16")
    assert found.checkpointing is checkpointing
    assert (found.needed <= found.usable) is (checkpointing is not None)
    assert found.usable == RESERVE * card.memory
    assert (found.largest >= 8) is (checkpointing is not None)
    memory = predict(config, precision="bf16", checkpointing=checkpointing is not False)
    assert 0 <= largest_micro_batch(memory, card.memory, 128) - found.largest <= 1


def test_state_of_the_engine_by_stage() -> None:
    assert state_bytes(100) == 2000
    assert state_bytes(100, zero_stage=1, buckets=50) == 2600
    assert state_bytes(100, zero_stage=1, world=4, buckets=50) == 1200 + 300 + 200
    assert state_bytes(100, zero_stage=2, world=4, buckets=50) == 800 + 400 + 200
    assert state_bytes(100, zero_stage=3, world=4, buckets=50) == 400 + 500 + 200


def held_by_engine(stage: int) -> tuple[int, int]:
    """Parameters, and bytes of all tensors when a backward pass ends, before a step's last one."""
    import deepspeed

    from distributed.optimizer import GuardedAdam
    from distributed.sharded_state import WeightAverage

    model = MEASNet(configs.tiny())
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in model.parameters())
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 2 * size,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=GuardedAdam(parameters), config=settings, dist_init_required=False
    )
    average = WeightAverage(engine, 0.999)
    held: list[int] = []

    def count(_: torch.Tensor) -> None:
        # The gradients must have been asked for: what only C++ knows is not found below.
        seen = [p.grad for p in parameters]
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        held.append(sum(one.nbytes() for one in storages.values()))
        del seen

    image = torch.rand(1, 3, 16, 16)
    for micro_step in range(4):
        if micro_step == 3:  # the first layer's gradient is the last: activations are gone
            model.patch_embed.weight.register_hook(count)
        engine.backward((engine(image).image - image).abs().mean())
        engine.step()
    average.update(2)
    return size, held[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_of_the_engine_is_what_deepspeed_holds(stage: int) -> None:
    ((size, held),) = run_ranks(1, held_by_engine, stage)
    assert state_bytes(size, zero_stage=stage, buckets=2 * size) == pytest.approx(held, rel=0.03)


def test_cards_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    card = Card(name="T4", memory=2**30, capability=(7, 5))
    last = cards_table(configs.tiny(), 128, [card]).splitlines()[-1]
    name, precision, without, with_it = last.strip("| ").split(" | ")
    assert (name, precision) == ("T4", "fp32")
    assert 0 < int(without) < int(with_it)
    assert main(["tiny", "--memory", "24GiB"]) == 0
    assert "largest micro-batch" in capsys.readouterr().out


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
    memory = predict(config, precision=precision, checkpointing=checkpointing, device="cpu")  # type: ignore[arg-type]
    assert memory.step(batch, crop) == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_prediction() -> None:
    check_memory("tiny", False, "fp32", 2, 128)


def test_weights_and_gradients_are_state_and_not_counted_again() -> None:
    weight = torch.zeros(1000)
    with _LiveTensors(besides=[weight]) as live:
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
