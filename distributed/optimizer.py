"""The optimizers: Adam and Muon with a guard around their step, and how a recipe names them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.config import Recipe
from distributed.internals.torch import (
    FastStartAdam,
    foreach_add_,
    foreach_lerp,
    foreach_mul_,
    foreach_sub,
    foreach_sub_,
)

MUON_MOMENTUM = 0.95
"""Decay of Muon's momentum (Jordan et al., "Muon", 2024)."""
LEAST_SIDE = 8
"""A weight with fewer rows or columns is not treated as a matrix."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, (X·Xᵀ)·X and (X·Xᵀ)²·X in one iteration, and five iterations: they bring all
singular values close to 1 fast, not exactly to 1 (Jordan et al., 2024)."""


def clips_itself(zero_stage: int, device_type: str) -> bool:
    """Whether `GuardedAdam` clips the gradients, and not DeepSpeed.

    DeepSpeed's clipping at stage 0 starts some three kernels for each parameter. On a CPU it stays
    as it is, so that runs repeat to the bit.
    """
    return zero_stage == 0 and device_type == "cuda"


class GuardedAdam(FastStartAdam):
    """Adam that skips the update on all ranks where any rank holds a gradient that is not finite.

    Not every ZeRO stage and precision of DeepSpeed looks for that; a NaN would stay in the moments
    for good. On a GPU the check, the clipping and the skip are decided on the device, by torch's
    fused Adam: the host does not wait for them.
    """

    def __init__(
        self,
        parameters: Any,
        *,
        clip: float = 0.0,
        equal: bool = False,
        fused: bool = False,
        **options: Any,
    ) -> None:
        """Adam with the `options` of torch.

        Args:
            parameters: see torch.
            clip: largest norm of the gradients; 0: they are not clipped here. For `fused` only.
            equal: all ranks hold the same gradients, so each finds the same.
            fused: decide on the device.
            options: see torch.
        """
        super().__init__(parameters, fused=fused or None, **options)
        self._clip, self._equal, self._fused = clip, equal, fused
        self.applied = torch.ones(())
        """1 where the last step updated the weights, 0 where it was skipped; on the device."""

    @property
    def updates(self) -> int:
        """Updates made so far; less than the steps asked for where some were skipped.

        On a GPU this waits for the device.
        """
        return max((int(held["step"]) for held in self.state.values() if held), default=0)

    @property
    def device_updates(self) -> Tensor:
        """The same as a tensor () on the device; only after the first step."""
        return next(held["step"] for held in self.state.values() if held)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update where all gradients of all ranks are finite; else leave everything as it is."""
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if self._fused:
            self._step_on_device([p.grad for p in parameters if p.grad is not None])
            return
        finite = torch.ones((), device=parameters[0].device if parameters else "cpu")
        for p in parameters:
            finite *= torch.isfinite(p.grad.sum())
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self.applied = finite
        if finite.item():
            self._update(closure)

    def _step_on_device(self, gradients: list[Tensor]) -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        self.applied = norm.isfinite().float()
        if not self._equal and dist.is_initialized():
            dist.all_reduce(self.applied, op=dist.ReduceOp.MIN)
        divisor = (norm / self._clip).clamp_min(1.0) if self._clip else torch.ones_like(norm)
        self.scale_and_update(divisor, 1.0 - self.applied)


class GuardedMuon(GuardedAdam):
    """Muon for matrices, Adam for all else; skips updates as `GuardedAdam` does.

    The update of a matrix is its momentum with all singular values brought close to 1, so that all
    directions are learnt at the same pace (Jordan et al., "Muon: An optimizer for hidden layers",
    2024). A convolution's weight is one matrix of its outputs; stacked weights, as those of the
    experts, are one matrix each. The matrices must be whole on each rank: ZeRO stage 0 only.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        scale: float,
        **options: Any,
    ) -> None:
        """See `GuardedAdam` for the options.

        Args:
            matrices: updated by Muon.
            others: updated by Adam.
            scale: Muon's learning rate is `lr` times this.
            options: of `GuardedAdam`.
        """
        groups = [{"params": others}, {"params": matrices, "lr_scale": scale}]
        super().__init__(groups, **options)
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        # Not shared on a GPU: to send `paper`'s 0.1 GB is estimated to take longer than to compute
        # its 0.23 TFLOP in bf16.
        self._shared = self._equal and self._world > 1 and not self._fused

    def _update(self, closure: Any = None) -> None:
        groups = self.param_groups
        self.param_groups = groups[:1]
        try:
            super()._update(closure)
        finally:
            self.param_groups = groups
        self._update_matrices(groups[1])

    def _update_matrices(self, group: dict[str, Any]) -> None:
        """Update all matrices by a few operations; nothing changes where `applied` is 0."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        moved = self._momenta(parameters)
        directions = self._directions([_wide(as_matrices(one)) for one in moved])
        updates = []
        for p, direction in zip(parameters, directions, strict=True):
            _, rows, columns = as_matrices(p).shape
            updates.append((direction.mT if rows > columns else direction).reshape(p.shape))
        foreach_mul_(updates, [_relative_rate(p) for p in parameters])
        foreach_mul_(updates, group["lr"] * self.applied)
        weights = [p.detach() for p in parameters]
        foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"] * self.applied)
        foreach_sub_(weights, updates)

    def _directions(self, wide: list[Tensor]) -> list[Tensor]:
        """Each stack of matrices orthogonalised, those of one shape together.

        On a CPU each rank takes a part, and all get the same bits.
        """
        ranks, rank = (self._world, dist.get_rank()) if self._shared else (1, 0)
        owners = share([one.numel() * one.shape[1] for one in wide], ranks)
        batches: dict[tuple[int, int], list[int]] = {}
        for number, (one, owner) in enumerate(zip(wide, owners, strict=True)):
            if owner == rank:
                batches.setdefault((one.shape[1], one.shape[2]), []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in batches.values():
            batch = orthogonalise(torch.cat([wide[number] for number in numbers]))
            made = batch.split([len(wide[number]) for number in numbers])
            found.update(zip(numbers, made, strict=True))
        if ranks == 1:
            return [found[number] for number in range(len(wide))]
        pieces = [found.get(number, torch.zeros_like(one)) for number, one in enumerate(wide)]
        flat = torch.cat([piece.flatten() for piece in pieces])
        dist.all_reduce(flat)  # all but one rank have zeros, so the sum is exact
        parts = flat.split([one.numel() for one in wide])
        return [part.view(one.shape) for part, one in zip(parts, wide, strict=True)]

    def _momenta(self, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """Count the step and move the momenta; returns them, looked ahead (Nesterov)."""
        for p in parameters:
            if not self.state[p]:
                step = torch.zeros((), device=p.device if self._fused else "cpu")
                # `exp_avg_sq` is not used: the states of all parameters have one form.
                self.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        held = [self.state[p] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._fused:  # a skipped step has values that are not finite
            flat = torch.cat([one.flatten() for one in gradients])
            flat.div_(self.grad_scale).nan_to_num_(0.0, 0.0, 0.0)
            parts = flat.split([one.numel() for one in gradients])
            gradients = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        averages = [one["exp_avg"] for one in held]
        # A list, because torch would read a single tensor on the host.
        foreach_add_([one["step"] for one in held], [self.applied] * len(held))
        apart = foreach_sub(gradients, averages)
        foreach_mul_(apart, (1.0 - MUON_MOMENTUM) * self.applied)
        foreach_add_(averages, apart)
        return foreach_lerp(gradients, averages, MUON_MOMENTUM)


def share(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does each piece of work, so that all take about as long: the largest first."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _wide(matrices: Tensor) -> Tensor:
    """(n, rows, columns), turned where there are more rows than columns."""
    return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices


def _relative_rate(weight: Tensor) -> float:
    """Of a tall matrix, whose outputs are more than its inputs (Jordan et al., 2024)."""
    rows, columns = as_matrices(weight).shape[1:]
    return max(1.0, rows / columns) ** 0.5


def as_matrices(weight: Tensor) -> Tensor:
    """View (number, rows, columns) of a linear weight, a stack of them, or a convolution's."""
    if weight.ndim == 3:
        return weight
    return weight.reshape(1, weight.shape[0], -1)


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon updates a weight: all products between hidden features.

    Not the first and last convolution, gates, depthwise filters, and the prompts.
    """
    if name.startswith("prompt.") or weight.ndim not in (2, 3, 4):
        return False
    sides = weight.shape[1:] if weight.ndim == 3 else weight.shape[:2]
    return min(sides) >= LEAST_SIDE


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each (rows, columns) close to 1: (n, rows, columns) fp32.

    bf16 on a GPU, as its authors do. A matrix of zeros stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    if x.is_cuda:
        x = x.bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if tall else x


def build_optimizer(model: nn.Module, recipe: Recipe, zero_stage: int = 0) -> GuardedAdam:
    """The recipe's optimizer over the parameters that are trained."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    device = trained[0][1].device.type
    options: dict[str, Any] = {
        "clip": recipe.clip if clips_itself(zero_stage, device) else 0.0,
        "equal": zero_stage == 0,
        "fused": device == "cuda",
        "lr": recipe.lr,
        "betas": (recipe.beta1, recipe.beta2),
        "weight_decay": recipe.weight_decay,
        "decoupled_weight_decay": recipe.optimizer != "adam",
    }
    if recipe.optimizer != "muon":
        return GuardedAdam([p for _, p in trained], **options)
    matrices = [p for name, p in trained if is_matrix(name, p)]
    others = [p for name, p in trained if not is_matrix(name, p)]
    return GuardedMuon(matrices, others, scale=recipe.muon_lr / recipe.lr, **options)


def guarded_optimizer(engine: Any) -> GuardedAdam:
    """The optimizer given to DeepSpeed, inside whatever wraps it."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, GuardedAdam):
        optimizer = optimizer.optimizer
    return optimizer


def set_learning_rate(engine: Any, lr: float) -> None:
    """Write the learning rate of the coming step into all parameter groups."""
    for group in guarded_optimizer(engine).param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
