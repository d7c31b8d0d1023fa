"""From a configuration to a DeepSpeed engine and its optimizer.

The forward pass runs in bf16 by autocast where the device supports it. Weights, gradients and the
optimizer state are always fp32.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed.config import TrainConfig
from distributed.decisions import Decisions, accumulation_steps, choose_precision, decide
from distributed.internals.deepspeed import light_deepspeed, reduce_by, reduce_nothing
from distributed.optimizer import build_optimizer, clips_itself
from distributed.reduction import GradientReduction
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
    # The prediction takes seconds, so it is made only where a choice depends on it.
    asked = card if config.engine.activation_checkpointing == "auto" else None
    fused = kernels.choice == "triton"
    predicted = predict_fit(config, world, asked, kernels=fused) if asked else None
    decisions = decide(config, world, card, predicted, kernels)
    if decisions.deterministic.choice == "on":
        use_deterministic_algorithms()
    return decisions


def deepspeed_config(
    config: TrainConfig, decisions: Decisions, world: int, device_type: str = "cpu"
) -> dict[str, Any]:
    """The DeepSpeed configuration, a pure function, with every value that matters.

    `gradient_clipping` is always written, because DeepSpeed's own default is 1.0. bf16 comes by
    autocast: casting the module makes stage 0 train wrongly (its optimizer starts with an empty
    step). Gradients are exchanged in fp32 also under autocast: no module is named as safe for a
    lower precision.
    """
    return {
        "train_micro_batch_size_per_gpu": config.recipe.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config.recipe, world),
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
        crop=max(side for _, side in config.data.crop_stages(config.recipe.samples)),
        precision="bf16"
        if choose_precision(config.engine.precision, card).choice == "bf16"
        else "fp32",
        state=state,
        kernels=kernels,
    )


def use_deterministic_algorithms() -> None:
    """Have this process repeat to the bit on a GPU; before its first operation there.

    Raises:
        RuntimeError: later, by an operation that has no such algorithm.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it
    torch.use_deterministic_algorithms(True)


def initialize(
    config: TrainConfig, decisions: Decisions, model: nn.Module, *, overlap: bool = True
) -> Any:
    """A DeepSpeed engine around `model`, on its device, in the process group that is there.

    Args:
        config: of the run.
        decisions: of the run.
        model: in training mode.
        overlap: reduce gradients during the backward pass where the ZeRO stage allows it; False
            leaves them to DeepSpeed, to compare the two.
    """
    # By itself DeepSpeed takes a GPU that is there, also where the run is to use the CPU.
    os.environ["DS_ACCELERATOR"] = next(model.parameters()).device.type
    with light_deepspeed(os.environ["DS_ACCELERATOR"]) as deepspeed:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.recipe, config.engine.zero_stage),
            config=deepspeed_config(
                config, decisions, dist.get_world_size(), os.environ["DS_ACCELERATOR"]
            ),
            dist_init_required=False,
        )
    if config.engine.zero_stage > 0:
        return engine
    if dist.get_world_size() == 1:
        reduce_nothing(engine)
    elif overlap:
        trained = [p for p in model.parameters() if p.requires_grad]
        reduction = GradientReduction(trained, engine.is_gradient_accumulation_boundary)
        reduce_by(engine, reduction.finish, reduction.zero)
    return engine
