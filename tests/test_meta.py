"""Without a GPU: a training step never mixes devices and rarely waits for the device."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.config import Recipe
from distributed.optimizer import GuardedAdam, build_optimizer
from distributed.sharded_state import WeightAverage
from measnet import autocast
from measnet import config as configs
from measnet.autocast import CudaAutocast
from measnet.config import ABLATION, ModelConfig, replace_dotted
from measnet.losses import Losses, restoration_loss
from measnet.network import MEASNet, Restoration
from measnet.ops.choice import torch_only
from measnet.step_statistics import commit_statistics
from measnet.tiling import restore
from tests.meta import UNREPEATABLE, Calls, OneDevice, autocast_list

SHALLOW: dict[str, Any] = {
    "num_blocks": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "expert_path": "dense",
}
"""All blocks of a level are alike, so one of each is enough."""
CONFIGS = {
    "official": replace_dotted(configs.official(), SHALLOW),
    **{f"paper-{row}": replace_dotted(build(), SHALLOW) for row, build in ABLATION.items()},
}
SIZES = [(2, 17, 23), (1, 16, 16), (2, 128, 128), (1, 1031, 1024)]
"""Batch, height, width; the last has several frequencies in each rectangle of `official`."""
CASES = [(name, SIZES[0]) for name in CONFIGS]
CASES += [(name, size) for name in ("paper-full", "official") for size in SIZES[1:]]


def network(config: ModelConfig) -> MEASNet:
    return MEASNet(config).to("meta")


def picture(size: tuple[int, int, int]) -> Tensor:
    batch, height, width = size
    return torch.empty(batch, 3, height, width, device="meta")


def train(
    model: MEASNet, image: Tensor, dtype: torch.dtype | None = None
) -> tuple[Losses, Restoration]:
    """Forward pass under CUDA's autocast to `dtype`, or without one, and backward pass."""
    with CudaAutocast():
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            restoration = model(image)
            losses = restoration_loss(restoration, image, 1e-4)
        # Not `total.backward()`: there `CudaAutocast` would not see the recomputed operations.
        edge = torch.autograd.graph.get_gradient_edge(losses.total)
        torch.autograd.backward(edge, torch.ones_like(losses.total))
    return losses, restoration


# --- What the tests below rely on ---


MIXTURES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + torch.ones(4),
    "in place": lambda x: x.mul_(torch.ones(4)),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long)],
    "scatter": lambda x: x.scatter(0, torch.zeros(4, dtype=torch.long), x),
    "convolution": lambda x: torch.conv1d(x[None, None], torch.ones(1, 1, 3)),
    "list": lambda x: torch.cat([x, torch.ones(4)]),
}
WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nan guard": lambda x: float(x.isfinite().all()),
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "to": lambda x: torch.ones(4).to(x.device),
    "from numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(4)),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixed_devices_are_seen(kind: str) -> None:
    with OneDevice(), pytest.raises((AssertionError, RuntimeError), match="device"):
        MIXTURES[kind](torch.empty(4, device="meta"))


@pytest.mark.parametrize("kind", [*WAITS, *COPIES])
def test_waits_are_counted(kind: str) -> None:
    x = torch.empty(4, device="meta")
    with OneDevice() as device:
        (WAITS | COPIES)[kind](x)
    assert (device.reads, device.copies) == (int(kind in WAITS), int(kind in COPIES))


def test_numbers_without_dimensions_may_come_from_the_cpu() -> None:
    with OneDevice() as device:
        assert (torch.empty(4, device="meta") * torch.tensor(2.0)).device.type == "meta"
    assert (device.reads, device.copies) == (0, 0)


def test_autocast_has_the_lists_of_torch() -> None:
    """Except composite operations, which are listed by the name that is called from Python."""
    assert autocast.LOWER - {"rmatmul"} <= autocast_list("LOWER_PRECISION_FP")
    assert autocast.FULL - {"square", "interpolate", "norm"} <= autocast_list("FP32")
    assert autocast_list("FP32_SET_OPT_DTYPE") >= autocast.FULL_RESULT
    assert autocast.WIDEST - {"cat", "stack"} <= autocast_list("PROMOTE")


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_knows_all_operations_of_the_network(name: str) -> None:
    with Calls() as calls:
        train(network(CONFIGS[name]), picture((2, 64, 64)))
    for ours, theirs in (
        (autocast.LOWER, "LOWER_PRECISION_FP"),
        (autocast.FULL, "FP32"),
        (autocast.FULL_RESULT, "FP32_SET_OPT_DTYPE"),
        (autocast.WIDEST, "PROMOTE"),
    ):
        assert calls.names & autocast_list(theirs) <= ours
    assert {"linear", "layer_norm", "softmax"} <= calls.names


# --- The network ---


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_training_stays_on_the_device_and_never_waits(
    name: str, size: tuple[int, int, int]
) -> None:
    model, image = network(CONFIGS[name]), picture(size)
    model.defer_statistics = True
    with OneDevice() as device:
        losses, restoration = train(model, image, torch.bfloat16)
        commit_statistics(model, reduce=lambda summed: summed.mul_(2))
    assert (device.reads, device.copies) == (0, 0)
    assert losses.total.dtype == torch.float32 and restoration.image.shape == image.shape
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [
        (None, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (None, True),
        (torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["paper-full", "official"])
def test_every_precision_trains(name: str, dtype: torch.dtype | None, checkpointing: bool) -> None:
    model = network(CONFIGS[name])
    model.activation_checkpointing = checkpointing
    with OneDevice() as device:
        train(model, picture((2, 64, 72)), dtype)
    assert (device.reads, device.copies) == (0, 0)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1]], ids=str)
@pytest.mark.parametrize("name", ["paper-full", "official"])
def test_inference_in_every_type_never_waits(
    name: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    model, image = network(CONFIGS[name]).to(dtype).eval(), picture(size)
    with torch.no_grad(), OneDevice() as device:
        restoration = model(image)
    assert (device.reads, device.copies) == (0, 0)
    assert restoration.image.shape == image.shape
    assert {one.device.type for one in restoration.routing.values()} == {"meta"}


def test_noise_is_drawn_on_the_device_of_its_generator() -> None:
    """meta has no generators; a generator of the CPU costs a copy per library."""
    model, image = network(CONFIGS["official"]), picture((1, 64, 64))
    with OneDevice() as device:
        model(image, generator=torch.Generator().manual_seed(0))
    assert (device.reads, device.copies) == (0, 3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["paper-full", "official"])
def test_a_gpu_can_repeat_a_step_exactly(name: str, deterministic: bool) -> None:
    model, image = network(CONFIGS[name]), picture((2, 68, 67))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with OneDevice() as device:
            train(model, image, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(before)
    assert bool(device.operations & UNREPEATABLE) != deterministic
    assert (device.reads, device.copies) == (0, 0)


@pytest.mark.parametrize("variant", ["paper", pytest.param("official", marks=pytest.mark.slow)])
def test_a_gpus_autocast_stays_near_fp32(variant: str) -> None:
    """CUDA's autocast computed on the CPU, so with numbers."""
    changes = SHALLOW | {"variant": variant, "dim": 8}
    model = MEASNet(replace_dotted(configs.tiny(), changes))
    image = torch.rand(2, 3, 32, 40)
    losses = []
    for on in (False, True):
        with torch_only(), CudaAutocast(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            restoration = model(image, generator=torch.Generator().manual_seed(0))
            losses.append(restoration_loss(restoration, image.flip(0), 1e-4))
    exact, rounded = losses
    assert rounded.l1.item() != exact.l1.item()
    assert rounded.l1.item() == pytest.approx(exact.l1.item(), rel=2**-7)
    assert rounded.balance.item() == pytest.approx(exact.balance.item(), rel=0.05)


# --- The rest of a training step ---


def test_the_update_waits_once_however_many_weights() -> None:
    """It waits for the number that says whether all gradients of all ranks are finite."""
    for blocks in (1, 2):
        changes = SHALLOW | {"dim": 8, "num_blocks": (blocks,) * 4}
        model = network(replace_dotted(configs.tiny(), changes))
        adam: GuardedAdam = build_optimizer(model, Recipe(optimizer="adamw"))
        train(model, picture((1, 16, 16)))
        with OneDevice() as device:
            adam.step()
        assert (device.reads, device.copies) == (1, 0)
        assert adam.updates == 1


def test_the_average_on_the_device_never_waits() -> None:
    model = network(configs.tiny())
    average = WeightAverage(SimpleNamespace(module=model), decay=0.999)
    step = torch.empty((), device="meta")
    optimizer = SimpleNamespace(device_updates=step, applied=step)
    with OneDevice() as device:
        average.update_on_device(optimizer)
    assert (device.reads, device.copies) == (0, 0)


def test_the_average_of_the_weights_never_waits() -> None:
    model = network(configs.tiny())
    average = WeightAverage(SimpleNamespace(module=model), decay=0.999)
    with OneDevice() as device:
        average.update(3)
    assert (device.reads, device.copies) == (0, 0)


def test_counting_a_micro_batch_never_waits() -> None:
    from distributed.meter import Meter
    from shards.stream import Batch

    model = network(replace_dotted(configs.tiny(), SHALLOW))
    image = picture((2, 64, 64))
    crops = torch.rand(2, 3, 64, 64)
    numbers = torch.zeros(2, dtype=torch.int64)
    batch = Batch(crops, crops, numbers, numbers, numbers, keys=["derain/a", "derain/b"])
    meter = Meter(torch.device("meta"), counts=True)
    losses, restoration = train(model, image)
    with OneDevice() as device:
        for _ in range(2):
            meter.add(losses, restoration, batch)
    assert (device.reads, device.copies) == (0, 0)
    assert meter.micro_batches == 2


@pytest.mark.parametrize("tile", [None, 48])
def test_a_picture_on_the_device_is_restored_there(tile: int | None) -> None:
    model = network(CONFIGS["paper-full"]).eval()
    with OneDevice() as device:
        restored = restore(model, torch.empty(3, 70, 90, device="meta"), tile=tile, overlap=16)
    assert restored.device.type == "meta" and restored.shape == (3, 70, 90)
    assert (device.reads, device.copies) == (0, 0)
