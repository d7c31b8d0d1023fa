"""The memory that training takes, predicted from the tensors that live in two small steps."""

import re
import weakref
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops.cpu_library import torch_only

RESERVE = 0.9
"""Share of a device's memory that is planned with; the rest is for fragments and libraries."""
STATE_BYTES = 4 + 4 + 8 + 4
"""Per parameter: weight, gradient, two moments of Adam, running average; all fp32."""
PROBES = (64, 96)
"""Crops at which the live tensors of a training step are counted; the rest is linear in pixels."""
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
