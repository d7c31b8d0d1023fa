"""From a configuration to a DeepSpeed engine and its optimizer.

The forward pass runs in bf16 by autocast where the device supports it. Weights, gradients and the
optimizer state are always fp32.
"""

import inspect
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.config import Recipe, TrainConfig
from distributed.decisions import Decisions, choose_precision, decide
from distributed.internals.deepspeed import light_deepspeed
from measnet.hardware import Card, card_of
from measnet.memory import Fit, fit, parameter_count, state_bytes
from measnet.ops import cpu_library, gpu_library

BUCKET_ELEMENTS = 2**23
"""Elements of the buffers in which ZeRO exchanges gradients and weights: 32 MiB. DeepSpeed's own
5e8 would take 2 GB of the GPU for a network of 30 million parameters."""


def decide_for(device: torch.device, config: TrainConfig, world: int) -> Decisions:
    """The decisions of a worker on its device; those about all of torch take effect.

    Args:
        device: of the worker.
        config: of the run.
        world: number of workers.
    """
    card = card_of(device)
    kernels = gpu_library.choice(device) if card else cpu_library.choice()
    # It counts for seconds what a step takes: only where something depends on it.
    asked = card if config.engine.activation_checkpointing == "auto" else None
    fused = kernels.choice == "triton"
    predicted = predict_fit(config, world, asked, kernels=fused) if asked else None
    decisions = decide(config, world, card, predicted, kernels)
    if decisions.deterministic.choice == "on":
        use_deterministic_algorithms()
    return decisions


def clips_itself(zero_stage: int, device_type: str) -> bool:
    """Whether `GuardedAdam` clips the gradients, and not DeepSpeed.

    DeepSpeed's clipping at stage 0 starts some three kernels for each parameter. On a CPU it stays
    as it is, so that runs repeat to the bit.
    """
    return zero_stage == 0 and device_type == "cuda"


def deepspeed_config(
    config: TrainConfig, decisions: Decisions, device_type: str = "cpu"
) -> dict[str, Any]:
    """The DeepSpeed configuration, a pure function; nothing is left to DeepSpeed's defaults that
    matters.

    `gradient_clipping` is always written, for DeepSpeed's own default is 1.0. bf16 comes by
    autocast: casting the module makes stage 0 train wrongly (its optimizer starts with an empty
    step). Gradients are exchanged in fp32 also under autocast: no module is named as safe for a
    lower precision.
    """
    return {
        "train_micro_batch_size_per_gpu": config.recipe.micro_batch,
        "gradient_accumulation_steps": int(decisions.accumulation.choice),
        "gradient_clipping": 0.0
        if clips_itself(config.engine.zero_stage, device_type)
        else config.recipe.clip,
        "zero_allow_untested_optimizer": True,  # ours is torch's Adam with a guard around its step
        "torch_autocast": {
            "enabled": decisions.precision.choice == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in each step
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            # The average of the weights is kept on each rank's own part of them, so none may stay
            # whole.
            "stage3_param_persistence_threshold": 0,
        },
    }


class GuardedAdam(torch.optim.Adam):
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

    # As torch has them, but for wrappers that keep its compiler out of them. To say so they import
    # all of the compiler: two seconds of every start, of a run that lost a worker too.
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    _update = inspect.unwrap(torch.optim.Adam.step)

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
        # The fused kernel divides the gradients by the one, and does nothing where the other is 1.
        self.grad_scale = (
            (norm / self._clip).clamp_min(1.0) if self._clip else torch.ones_like(norm)
        )
        self.found_inf = 1.0 - self.applied
        self._update()


def predict_fit(config: TrainConfig, world: int, card: Card, *, kernels: bool = False) -> Fit:
    """What a micro-batch needs of `card`, without and if need be with activation checkpointing.

    `kernels`: Triton's compute there, which keep less than torch's operations.
    """
    state = state_bytes(
        parameter_count(config.model),
        zero_stage=config.engine.zero_stage,
        world=world,
        buckets=BUCKET_ELEMENTS,
    )
    return fit(
        card,
        config.model,
        micro_batch=config.recipe.micro_batch,
        crop=config.data.crop,
        precision="bf16"
        if choose_precision(config.engine.precision, card).choice == "bf16"
        else "fp32",
        state=state,
        kernels=kernels,
    )


def build_optimizer(model: nn.Module, recipe: Recipe, zero_stage: int = 0) -> GuardedAdam:
    """Adam, or AdamW where the recipe names it, over the parameters that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device.type
    return GuardedAdam(
        parameters,
        clip=recipe.clip if clips_itself(zero_stage, device) else 0.0,
        equal=zero_stage == 0,
        fused=device == "cuda",
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        decoupled_weight_decay=recipe.optimizer == "adamw",
    )


def use_deterministic_algorithms() -> None:
    """Have this process repeat to the bit on a GPU; before its first operation there.

    Raises:
        RuntimeError: later, by an operation that has no such algorithm.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it
    torch.use_deterministic_algorithms(True)


def initialize(config: TrainConfig, decisions: Decisions, model: nn.Module) -> Any:
    """A DeepSpeed engine around `model`, on its device, in the process group that is there."""
    # By itself DeepSpeed takes a GPU that is there, also where the run is to use the CPU.
    os.environ["DS_ACCELERATOR"] = next(model.parameters()).device.type
    with light_deepspeed(os.environ["DS_ACCELERATOR"]) as deepspeed:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.recipe, config.engine.zero_stage),
            config=deepspeed_config(config, decisions, os.environ["DS_ACCELERATOR"]),
            dist_init_required=False,
        )
    if config.engine.zero_stage == 0 and dist.get_world_size() == 1:
        # Alone there is nothing to add up; DeepSpeed would still copy all gradients twice.
        engine.enable_backward_allreduce = False
    return engine


def guarded_optimizer(engine: Any) -> GuardedAdam:
    """The optimizer given to DeepSpeed, inside whatever wraps it."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, GuardedAdam):
        optimizer = optimizer.optimizer
    return optimizer


def set_learning_rate(engine: Any, lr: float) -> None:
    """Write the learning rate of the coming step into all parameter groups."""
    for group in guarded_optimizer(engine).param_groups:
        group["lr"] = lr
