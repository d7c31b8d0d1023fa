"""What a run chooses by itself, each choice with its reason.

Pure functions of a configuration and a machine. Nothing here looks at a device, so every rule is
tested over a table of machines.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from distributed.config import EngineConfig, Recipe, ScalingConfig, TrainConfig
from measnet.experts import resolve_path
from measnet.hardware import Card, Decision, Machine

if TYPE_CHECKING:
    from measnet.memory import Fit

TrainingDevice = Literal["cpu", "cuda"]


class Decisions(NamedTuple):
    """All automatic choices of a run."""

    precision: Decision
    compile: Decision
    checkpointing: Decision
    accumulation: Decision
    zero: Decision
    deterministic: Decision
    kernels: Decision
    graphs: Decision
    reduction: Decision


def training_device(scaling: ScalingConfig, gpus: float, machine: Machine | None) -> TrainingDevice:
    """The device of a run: the one place where it is decided.

    Args:
        scaling: of the run.
        gpus: GPUs that Ray counts, on this machine or in the cluster.
        machine: this machine, where the run stays on it; None on a cluster, which may still start
            GPU nodes.

    Raises:
        ValueError: a GPU is asked for, and this machine has none that can be used, or fewer than
            workers.
    """
    if scaling.device == "cpu":
        return "cpu"
    if machine is None:
        return "cuda" if scaling.device == "gpu" or gpus >= 1 else "cpu"
    if not machine.cards:
        if scaling.device == "gpu":
            reason = machine.problem or "torch sees no GPU on this machine"
            raise ValueError(
                f"scaling.device is gpu, but {reason}; or use --scaling.device cpu, or set "
                "RAY_ADDRESS to a cluster with GPUs"
            )
        return "cpu"
    least, _most = scaling.bounds
    if least > len(machine.cards):
        raise ValueError(
            f"scaling.workers is {scaling.workers}, but this machine has {len(machine.cards)} "
            f"GPU{'s' * (len(machine.cards) > 1)}, and each worker needs its own; use "
            f"--scaling.workers {len(machine.cards)}, or --scaling.device cpu"
        )
    return "cuda"


def sharing_workers(recipe: Recipe, world: int) -> int:
    """How many of `world` workers share the micro-batches evenly; the rest are idle.

    Only a run whose number of workers changes has idle ones: with 8 micro-batches, 5 workers are
    no faster than 4 however the work is divided.
    """
    return max(n for n in recipe.worker_counts if n <= world)


def choose_precision(asked: str, card: Card | None) -> Decision:
    """`bf16` or `fp32` for the forward pass; weights and optimizer state are always fp32.

    fp16 is never chosen. DeepSpeed 0.19.8 clips gradients before it removes the loss scale (ZeRO 1
    to 3), and after an overflow its scale does not fall. And the sums of attention over all pixels
    pass the largest number of fp16.
    """
    if asked != "auto":
        if asked == "bf16" and card is not None and not card.has_bf16:
            emulated = f"engine.precision asks for it; {card.name} emulates it, fp32 is faster"
            return Decision("bf16", emulated)
        return Decision(asked, "engine.precision asks for it")
    if card is None:
        return Decision("fp32", "the device is a CPU")
    if card.has_bf16:
        return Decision("bf16", f"{card.name} supports it; weights and optimizer state stay fp32")
    major, minor = card.capability
    return Decision(
        "fp32",
        f"{card.name} has no bf16 (compute capability {major}.{minor}, bf16 needs 8.0), and fp16 "
        "is not sound: attention's products overflow it, and DeepSpeed clips scaled gradients",
    )


def choose_compile(asked: str) -> Decision:
    """Whether each transformer block is compiled; never by itself."""
    if asked == "on":
        return Decision("on", "engine.compile asks for it; the first step takes about a minute")
    reason = (
        "engine.compile asks for it"
        if asked == "off"
        else "the default, which starts faster; --engine.compile on compiles"
    )
    return Decision("off", reason)


def choose_checkpointing(asked: str, micro_batch: int, predicted: "Fit | None") -> Decision:
    """Whether transformer blocks are computed again in the backward pass, to save memory.

    Args:
        asked: `engine.activation_checkpointing`.
        micro_batch: samples per forward pass.
        predicted: what the micro-batch needs of the GPU; None on a CPU.
    """
    if asked != "auto":
        return Decision(asked, "engine.activation_checkpointing asks for it")
    if predicted is None:
        return Decision("off", "the device is a CPU")
    needs = (
        f"micro-batch {micro_batch} is predicted to take {predicted.needed / 2**30:.1f} of "
        f"{predicted.usable / 2**30:.1f} GiB"
    )
    if predicted.checkpointing is False:
        return Decision("off", needs)
    if predicted.checkpointing is True:
        return Decision("on", f"{needs} with checkpointing; without it, it does not fit")
    return Decision(
        "on",
        f"{needs} even with checkpointing: where memory runs out, lower recipe.micro_batch to "
        f"{predicted.largest}"
        if predicted.largest
        else f"{needs} even with checkpointing: use a larger GPU",
    )


def accumulation_steps(recipe: Recipe, world: int) -> int:
    """Micro-batches that each sharing worker computes per optimizer step."""
    return recipe.micro_batches // sharing_workers(recipe, world)


def choose_accumulation(recipe: Recipe, world: int) -> Decision:
    """The same, with its reason."""
    sharing = sharing_workers(recipe, world)
    idle = f", {world - sharing} more are idle" if sharing < world else ""
    return Decision(
        f"{accumulation_steps(recipe, world)}",
        f"global batch {recipe.global_batch} / {sharing} workers / micro-batch "
        f"{recipe.micro_batch}{idle}",
    )


def choose_deterministic(engine: EngineConfig) -> Decision:
    """Whether the device may only use algorithms that repeat to the bit."""
    if engine.deterministic == "on":
        return Decision("on", "engine.deterministic asks for it; steps are slower on a GPU")
    return Decision(
        "off", "the default; --engine.deterministic on repeats exactly on a GPU, but is slower"
    )


def choose_graphs(
    config: TrainConfig, *, on_gpu: bool, compiled: bool, checkpointing: bool, kernels: str
) -> Decision:
    """Whether a micro-batch is one CUDA graph.

    Args:
        config: of the run.
        on_gpu: whether it trains on a GPU.
        compiled: whether blocks are compiled.
        checkpointing: whether blocks are computed again in the backward pass.
        kernels: what computes the operations, `triton` or `torch`.
    """
    engine, model = config.engine, config.model
    if not on_gpu:
        return Decision("off", "the device is a CPU")
    if engine.cuda_graphs == "off":
        return Decision("off", "engine.cuda_graphs asks for it")
    paths = [
        resolve_path(model.expert_path, experts, top_k, torch.device("cuda"))
        for experts, top_k in (
            (model.pixel_experts, model.pixel_top_k),
            (model.image_experts, model.image_top_k),
        )
    ]
    hindrances = {
        f"ZeRO stage {engine.zero_stage} exchanges weights or gradients within the passes": (
            engine.zero_stage > 0
        ),
        "torch.compile is on": compiled,
        "activation checkpointing is on": checkpointing,
        "the noise of the gates fades": model.routing.noise > 0,
        "the sorted path of the experts waits for the host": (
            kernels != "triton" and "sorted" in paths
        ),
    }
    for reason, hinders in hindrances.items():
        if hinders:
            return Decision("off", reason)
    return Decision("on", "one launch per micro-batch; --engine.cuda_graphs off does without")


def choose_reduction(zero_stage: int, world: int, graphs: Decision) -> Decision:
    """When several ranks add up their gradients."""
    if world == 1:
        return Decision("none", "there is one worker")
    if zero_stage > 0:
        return Decision("by DeepSpeed", f"ZeRO stage {zero_stage}")
    if graphs.choice == "on":
        return Decision(
            "after the backward pass",
            "that is one CUDA graph; engine.cuda_graphs off overlaps them",
        )
    return Decision("during the backward pass", "each bucket as soon as it is complete")


def decide(
    config: TrainConfig,
    world: int,
    card: Card | None,
    predicted: "Fit | None" = None,
    kernels: Decision | None = None,
) -> Decisions:
    """Resolve what the configuration leaves open.

    Args:
        config: of the run.
        world: number of workers.
        card: the GPU that a worker trains on; None trains on the CPU.
        predicted: see `choose_checkpointing`.
        kernels: what computes the network's operations on this device.
    """
    engine = config.engine
    kernels = kernels or Decision("torch", "the device is not known yet")
    compile_ = choose_compile(engine.compile)
    checkpointing = choose_checkpointing(
        engine.activation_checkpointing, config.recipe.micro_batch, predicted
    )
    graphs = choose_graphs(
        config,
        on_gpu=card is not None,
        compiled=compile_.choice == "on",
        checkpointing=checkpointing.choice == "on",
        kernels=kernels.choice,
    )
    return Decisions(
        precision=choose_precision(engine.precision, card),
        compile=compile_,
        checkpointing=checkpointing,
        accumulation=choose_accumulation(config.recipe, world),
        zero=Decision(f"stage {engine.zero_stage}", "engine.zero_stage"),
        deterministic=choose_deterministic(engine),
        kernels=kernels,
        graphs=graphs,
        reduction=choose_reduction(engine.zero_stage, world, graphs),
    )
