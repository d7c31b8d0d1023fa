"""Weights, their average and the optimizer state: whole tensors by name, from and to the ranks.

The state that a checkpoint holds does not depend on the ranks. So any ZeRO stage on any number of
workers reads what any other wrote.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.internals.deepspeed import held_part, parts, whole_shape
from distributed.internals.torch import foreach_add_, foreach_lerp_, foreach_mul_, foreach_sub
from distributed.optimizer import GuardedAdam, guarded_optimizer
from measnet.internals import is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors that Adam keeps for each parameter."""


def weights(engine: Any) -> dict[str, Tensor]:
    """The whole state dict on the CPU, on every rank; a collective call."""
    import deepspeed

    sharded = [p for p in engine.module.parameters() if is_sharded(p)]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {k: v.detach().to("cpu", copy=True) for k, v in engine.module.state_dict().items()}


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """`exp_avg.NAME` and `exp_avg_sq.NAME` of all trained parameters, whole, on rank 0; a
    collective call.

    Before the first step, and on other ranks, the result is empty.
    """
    optimizer = guarded_optimizer(engine)
    held_parts = list(parts(engine))
    shapes = {n: whole_shape(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    offsets = dict(zip(sizes, _running_sum(sizes.values()), strict=True))
    if not any(optimizer.state.values()):
        return {}
    result = {}
    for moment in MOMENTS:
        # Bits, not numbers: adding integer zeros keeps even the sign of a zero.
        buffer = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=engine.device)
        for part in held_parts:
            held = optimizer.state[part.flat][moment].flatten()
            numel = part.weight.numel()
            at = offsets[part.name] + part.start
            buffer[at : at + numel] = held[part.flat_start : part.flat_start + numel].view(
                torch.int32
            )
        if engine.zero_optimization_stage() > 0:
            dist.reduce(buffer, dst=0)
        if dist.get_rank() == 0:
            whole = buffer.cpu().view(torch.float32)
            for name, size in sizes.items():
                at = offsets[name]
                result[f"{moment}.{name}"] = whole[at : at + size].reshape(shapes[name]).clone()
    return result


def load_optimizer_state(engine: Any, state: Mapping[str, Tensor], updates: int) -> None:
    """Set Adam's moments from whole tensors by name, as if `updates` updates had been made.

    Raises:
        ValueError: a trained parameter has no state, or one of another shape.
    """
    optimizer = guarded_optimizer(engine)
    if not state:
        return
    for part in parts(engine):
        held = optimizer.state[part.flat]
        if not held:
            device = part.flat.device if optimizer.defaults["fused"] else None
            held["step"] = torch.tensor(float(updates), device=device)
            held.update({moment: torch.zeros_like(part.flat) for moment in MOMENTS})
        for moment in MOMENTS:
            key = f"{moment}.{part.name}"
            if key not in state:
                raise ValueError(f"the checkpoint has no {key}: it belongs to another network")
            numel = part.weight.numel()
            value = state[key].flatten()[part.start : part.start + numel]
            if value.numel() != numel:
                raise ValueError(
                    f"{key} of the checkpoint has another size: it belongs to another network"
                )
            held[moment].flatten()[part.flat_start : part.flat_start + numel].copy_(value)


def _running_sum(sizes: Any) -> list[int]:
    total, sums = 0, []
    for size in sizes:
        sums.append(total)
        total += size
    return sums


class WeightAverage:
    """Exponential moving average of the weights, kept on what each rank holds of them.

    The decay rises as (1 + t) / (10 + t) to its final value, so that short runs are not tied to
    their random start.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        """Start at the engine's present weights; a decay of 0 follows them without lag."""
        self._engine, self._decay = engine, decay
        self._held = [held_part(p) for p in engine.module.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._held]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the weights, after update number `updates` (from 1)."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        foreach_lerp_(self._average, self._held, 1.0 - decay)

    @torch.no_grad()
    def update_on_device(self, optimizer: GuardedAdam) -> None:
        """The same after each step of `optimizer`, without waiting for it: skipped steps move
        nothing."""
        made = optimizer.device_updates
        decay = ((1 + made) / (10 + made)).clamp_max(self._decay)
        apart = foreach_sub(self._held, self._average)
        foreach_mul_(apart, (1.0 - decay) * optimizer.applied)
        foreach_add_(self._average, apart)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the network has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the average from whole tensors by name."""
        rank, world = dist.get_rank(), dist.get_world_size()
        trained = [(n, p) for n, p in self._engine.module.named_parameters() if p.requires_grad]
        for average, (name, parameter) in zip(self._average, trained, strict=True):
            value = state[name].to(average.device)
            if is_sharded(parameter):
                padded = torch.zeros(average.numel() * world, device=average.device)
                padded[: value.numel()] = value.flatten()
                value = padded[rank * average.numel() : (rank + 1) * average.numel()]
            average.copy_(value.reshape(average.shape))

    @torch.no_grad()
    def _swap(self) -> None:
        for held, average in zip(self._held, self._average, strict=True):
            kept = held.clone()
            held.copy_(average)
            average.copy_(kept)
