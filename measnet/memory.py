"""The memory of training and of inference, predicted from the tensors that live in two steps."""

import functools
import re
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measnet.config import ModelConfig, replace_dotted
from measnet.experts import resolve_path
from measnet.kernels import torch_only
from measnet.losses import restoration_loss
from measnet.network import MEASNet

RESERVE = 0.9
"""Share of a device's memory that is planned with; the rest is for fragments and libraries."""
STATE_BYTES = 4 + 4 + 8 + 4
"""Per parameter: weight, gradient, two moments of Adam, running average; all fp32."""
PROBES = (64, 96)
"""Crops at which the live tensors of a training step are counted; the rest is linear in pixels."""
LARGE_PROBES = (512, 1024)
"""Sides at which tensors without numbers are counted; larger than the experts' `CHUNK`."""
Precision = Literal["fp32", "bf16"]


class _Live(TorchDispatchMode):
    """Bytes of all tensors that live, and the most there were; each storage counts once.

    Those of `besides` do not count: a weight or gradient that an operation gives back, as when it
    is added to in place, was there before.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class Memory(NamedTuple):
    """Bytes of a training step: `state + constant + per_pixel · pixels of the micro-batch`."""

    state: int
    """Weights, gradients, optimizer state, running average."""
    constant: float
    """What a step holds besides, whatever the size."""
    per_pixel: float
    """What it holds for each pixel of the micro-batch."""

    def step(self, batch: int, crop: int) -> float:
        """Peak of a forward and backward pass, without the state."""
        return self.constant + self.per_pixel * batch * crop * crop

    def total(self, batch: int, crop: int) -> float:
        """Peak with the state."""
        return self.state + self.step(batch, crop)


def predict(
    config: ModelConfig, *, precision: Precision = "fp32", checkpointing: bool = False
) -> Memory:
    """Memory of training, from the tensors that live in two small steps on the CPU.

    Activations grow with the pixels, so two crops give the line. What kernels and the allocator
    hold besides is not in it: a few per cent on a CPU whose allocator gives freed memory back.

    Args:
        config: with the expert path that the device will take.
        precision: `bf16` is autocast; weights and optimizer state stay fp32.
        checkpointing: recompute the transformer blocks.
    """
    model = MEASNet(config)
    model.activation_checkpointing = checkpointing
    small, large = (_peak(model, crop, precision) for crop in PROBES)
    pixels = [crop * crop for crop in PROBES]
    per_pixel = (large - small) / (pixels[1] - pixels[0])
    parameters = sum(p.numel() for p in model.parameters())
    constant = max(0.0, small - per_pixel * pixels[0])
    return Memory(STATE_BYTES * parameters, constant, per_pixel)


def _peak(model: MEASNet, crop: int, precision: Precision) -> int:
    state = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        state.append(parameter.grad)
    image = torch.rand(1, 3, crop, crop)
    with _Live(besides=state) as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            restoration = model(image)
        restoration_loss(restoration, image, 1e-4).total.backward()
    return live.peak


@functools.cache
def inference(config: ModelConfig, device_type: str) -> Memory:
    """Memory of restoring in fp32 without gradients; the state are the weights.

    Two blocks of each level are enough: without gradients, memory does not grow with the depth.

    Args:
        config: its expert path may be `auto`.
        device_type: `cpu`, where the step is computed; else what a GPU would hold is counted from
            tensors that have sizes and no numbers.
    """
    device = torch.device(device_type)
    paths = [
        resolve_path(config.expert_path, config.pixel_experts, config.pixel_top_k, device),
        resolve_path(config.expert_path, config.image_experts, config.image_top_k, device),
    ]
    path = config.expert_path if device_type == "cpu" else max(paths)  # sorted, if one is
    shallow = {"num_blocks": (2, 2, 2, 2), "num_refinement_blocks": 2, "expert_path": path}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))  # others' random numbers stay
        torch.manual_seed(0)  # sizes depend on which experts are chosen
        state = sum(4 * tensor.numel() for tensor in MEASNet(config).state_dict().values())
        if device_type != "cpu":
            stack.enter_context(torch_only())
        without_numbers = device_type != "cpu" and path == "dense"  # else sizes depend on them
        if without_numbers:
            stack.enter_context(FakeTensorMode())
        model = MEASNet(replace_dotted(config, shallow)).eval()
        sides = LARGE_PROBES if without_numbers else PROBES
        small, large = (_inference_peak(model, side) for side in sides)
    per_pixel = (large - small) / (sides[1] ** 2 - sides[0] ** 2)
    return Memory(state, max(0.0, small - per_pixel * sides[0] ** 2), per_pixel)


@torch.no_grad()
def _inference_peak(model: MEASNet, side: int) -> int:
    image = torch.rand(1, 3, side, side)
    with _Live(besides=[*model.parameters(), *model.buffers()]) as live:
        model(image)
    return live.peak


def largest_micro_batch(memory: Memory, budget: float, crop: int) -> int:
    """Samples of `crop`×`crop` that fit into `budget` bytes; 0 where not even one does."""
    free = RESERVE * budget - memory.state - memory.constant
    return max(0, int(free / (memory.per_pixel * crop * crop)))


def parse_bytes(text: str) -> float:
    """`24GiB`, `16GB`, `800MiB` -> bytes.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT])(i?)B\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write it as 24GiB or 800MB")
    number, unit, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1)


def memory_table(config: ModelConfig, budget: float, crop: int, precision: Precision) -> str:
    """The largest micro-batch with and without activation checkpointing, on a GPU."""
    lines = [
        f"training with {precision} on crops of {crop}×{crop}; {RESERVE:.0%} of the memory is used",
        f"{'checkpointing':<16}{'state GiB':>12}{'GiB a sample':>14}{'largest micro-batch':>21}",
    ]
    dense = replace_dotted(config, {"expert_path": "dense"})  # what a GPU takes
    for checkpointing in (False, True):
        with torch_only():  # as a GPU
            memory = predict(dense, precision=precision, checkpointing=checkpointing)
        sample = memory.per_pixel * crop * crop / 2**30
        batch = largest_micro_batch(memory, budget, crop)
        name = "on" if checkpointing else "off"
        lines.append(f"{name:<16}{memory.state / 2**30:>12.2f}{sample:>14.2f}{batch:>21}")
    return "\n".join(lines)
