"""From a configuration to a DeepSpeed engine, and the optimizer state to and from plain tensors.

The state that a checkpoint holds is free of ranks: whole tensors by parameter name. So any ZeRO
stage on any number of workers reads what any other wrote. The forward pass runs in bf16 by autocast
where the device supports it; weights, their average and the optimizer state are fp32 always.
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.config import Recipe, TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors that Adam keeps for each parameter."""


class Decision(NamedTuple):
    """Something the program chose by itself, with the reason that is shown to the user."""

    choice: str
    reason: str

    def __str__(self) -> str:
        """`choice: reason`, as it is printed."""
        return f"{self.choice}: {self.reason}"


class Decisions(NamedTuple):
    """All automatic choices of a run."""

    precision: Decision
    compile: Decision
    accumulation: Decision
    zero: Decision


def sharing_workers(recipe: Recipe, world: int) -> int:
    """How many of `world` workers share the micro-batches evenly; the rest stand by.

    Only a run that grows and shrinks meets a number that does not divide: with 8 micro-batches, 5
    workers are no faster than 4 however the work is dealt out.
    """
    return max(n for n in range(1, world + 1) if recipe.micro_batches % n == 0)


def decide(config: TrainConfig, world: int, device: torch.device) -> Decisions:
    """Resolve what the configuration leaves open, for `world` workers on `device`."""
    engine, recipe = config.engine, config.recipe
    on_gpu = device.type == "cuda"
    if engine.precision != "auto":
        precision = Decision(engine.precision, "engine.precision asks for it")
    elif on_gpu and torch.cuda.is_bf16_supported():
        precision = Decision("bf16", "the GPU supports it; weights and optimizer state stay fp32")
    else:
        precision = Decision("fp32", "this GPU has no bf16" if on_gpu else "the device is a CPU")
    if engine.compile != "auto":
        compiled = Decision(engine.compile, "engine.compile asks for it")
    else:
        compiled = Decision(
            "on" if on_gpu else "off", "a GPU" if on_gpu else "does not pay on a CPU"
        )
    sharing = sharing_workers(recipe, world)
    spare = f", {world - sharing} more stand by" if sharing < world else ""
    accumulation = Decision(
        f"{recipe.micro_batches // sharing}",
        f"global batch {recipe.global_batch} / {sharing} workers / micro-batch "
        f"{recipe.micro_batch}{spare}",
    )
    zero = Decision(f"stage {engine.zero_stage}", "engine.zero_stage")
    return Decisions(precision, compiled, accumulation, zero)


def deepspeed_config(config: TrainConfig, decisions: Decisions) -> dict[str, Any]:
    """The DeepSpeed configuration, a pure function; nothing is left to DeepSpeed's defaults that
    matters.

    `gradient_clipping` is always written, for DeepSpeed's own default is 1.0. bf16 comes by
    autocast: casting the module makes stage 0 train wrongly (its optimizer starts with an empty
    step).
    """
    return {
        "train_micro_batch_size_per_gpu": config.recipe.micro_batch,
        "gradient_accumulation_steps": int(decisions.accumulation.choice),
        "gradient_clipping": config.recipe.clip,
        "zero_allow_untested_optimizer": True,  # ours is torch's Adam with a guard around its step
        "torch_autocast": {
            "enabled": decisions.precision.choice == "bf16",
            "dtype": "bfloat16",
        },
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            # The average of the weights is kept on each rank's own part of them, so none may stay
            # whole.
            "stage3_param_persistence_threshold": 0,
        },
    }


class GuardedAdam(torch.optim.Adam):
    """Adam that skips the update on all ranks where any rank holds a gradient that is not finite.

    Not every ZeRO stage and precision of DeepSpeed looks for that; a NaN would stay in the moments
    for good.
    """

    # As torch has them, but for wrappers that keep its compiler out of them. To say so they import
    # all of the compiler: two seconds of every start, of a run that lost a worker too.
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    _update = inspect.unwrap(torch.optim.Adam.step)

    @property
    def updates(self) -> int:
        """Updates made so far; less than the steps asked for where some were skipped."""
        return max((int(held["step"]) for held in self.state.values() if held), default=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update where all gradients of all ranks are finite; else leave everything as it is."""
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        finite = torch.ones((), device=parameters[0].device if parameters else "cpu")
        for p in parameters:
            finite *= torch.isfinite(p.grad.sum())
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item():
            self._update(closure)


def build_optimizer(model: nn.Module, recipe: Recipe) -> GuardedAdam:
    """Adam, or AdamW where the recipe names it, over the parameters that are trained."""
    return GuardedAdam(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        decoupled_weight_decay=recipe.optimizer == "adamw",
    )


def initialize(config: TrainConfig, decisions: Decisions, model: nn.Module) -> Any:
    """A DeepSpeed engine around `model`, in the process group that is already there."""
    # By itself DeepSpeed would take a GPU of the machine also where the CPU trains.
    on_gpu = next(model.parameters()).is_cuda
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    with _only_what_is_used():
        deepspeed = importlib.import_module("deepspeed")  # not when this module is imported
        if os.environ["DS_ACCELERATOR"] == "cpu":
            # A shared-memory kernel for inference that would be compiled at start-up, and is not
            # used here.
            operations = importlib.import_module("deepspeed.ops").__compatible_ops__
            operations["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.recipe),
            config=deepspeed_config(config, decisions),
            dist_init_required=False,
        )
    if decisions.compile.choice == "on":
        engine.compile()
    return engine


@contextmanager
def _only_what_is_used() -> Iterator[None]:
    """Spares each start some seconds: DeepSpeed would import an optimizer that compiles itself, and
    with it all of torch's compiler, and MLflow for a tuner."""
    compile_, unused = torch.compile, "mlflow"
    torch.compile = _as_it_is  # type: ignore[assignment]
    hidden = sys.modules.setdefault(unused, None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules[unused]


def _as_it_is(function: Any = None, **options: Any) -> Any:
    """In the place of `torch.compile`, as a function or a decorator."""
    return (lambda decorated: decorated) if function is None else function


def guarded_optimizer(engine: Any) -> GuardedAdam:
    """The optimizer given to DeepSpeed, inside whatever wraps it."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, GuardedAdam):
        optimizer = optimizer.optimizer
    return optimizer


def learning_rate(recipe: Recipe, samples: int) -> float:
    """Learning rate of the step that begins after `samples` samples: linear warm-up, then cosine to
    zero.

    The first step of a warm-up already learns (a rate of zero would waste it).
    """
    if samples < recipe.warmup_samples:
        return recipe.lr * min(1.0, (samples + recipe.global_batch) / recipe.warmup_samples)
    done = (samples - recipe.warmup_samples) / max(1, recipe.samples - recipe.warmup_samples)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(engine: Any, lr: float) -> None:
    """Write the learning rate of the coming step into all parameter groups."""
    for group in guarded_optimizer(engine).param_groups:
        group["lr"] = lr


# ---- whole tensors by name, from and to what each rank holds -------------------------------------


class _Part(NamedTuple):
    """What one rank holds of one parameter: elements [start, start + numel) of it, flattened."""

    name: str
    start: int
    weight: Tensor
    flat: Tensor
    """The optimizer's own parameter that this part lies in."""
    flat_start: int


def weights(engine: Any) -> dict[str, Tensor]:
    """The whole state dict on the CPU, on every rank; a collective call."""
    import deepspeed

    sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {k: v.detach().to("cpu", copy=True) for k, v in engine.module.state_dict().items()}


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """`exp_avg.NAME` and `exp_avg_sq.NAME` of all trained parameters, whole, on rank 0; a
    collective call.

    Before the first step, and on other ranks, the result is empty.
    """
    optimizer = guarded_optimizer(engine)
    parts = list(_parts(engine))
    sizes = {n: _numel(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    shapes = {n: _shape(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    offsets = dict(zip(sizes, _running_sum(sizes.values()), strict=True))
    if not any(optimizer.state.values()):
        return {}
    result = {}
    for moment in MOMENTS:
        # Bits, not numbers: adding integer zeros keeps even the sign of a zero.
        buffer = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=engine.device)
        for part in parts:
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
    for part in _parts(engine):
        held = optimizer.state[part.flat]
        if not held:
            held["step"] = torch.tensor(float(updates))
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


def _parts(engine: Any) -> Iterator[_Part]:
    """What this rank holds of each trained parameter, in the order of the network."""
    stage = engine.zero_optimization_stage()
    rank = dist.get_rank()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield _Part(name, 0, parameter.detach().view(-1), parameter, 0)
        elif stage < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield _Part(
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment,
                    flat,
                    mapping.hp_fragment_address.start,
                )
        else:
            group, flat_start, numel = engine.optimizer.grad_position[
                engine.optimizer.get_param_id(parameter)
            ]
            flat = engine.optimizer.fp32_partitioned_groups_flat[group]
            start = rank * numel
            numel = max(0, min(numel, parameter.ds_numel - start))  # the last part may be padded
            if numel:
                yield _Part(
                    name, start, flat.data[flat_start : flat_start + numel], flat, flat_start
                )


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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
        self._held = [_held(p) for p in engine.module.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._held]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the weights, after update number `updates` (from 1)."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._average, self._held, 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights stand in the network while inside."""
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
            if hasattr(parameter, "ds_id"):
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


def _held(parameter: Any) -> Tensor:
    """The storage that this rank keeps of a parameter: its part under ZeRO-3, else the whole."""
    return parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter.data
