"""What is compiled before training: blocks by torch.compile, and the Triton kernels in parallel."""

import os

import torch
import torch.distributed as dist
from torch import nn

from distributed.config import TrainConfig
from distributed.decisions import Decisions
from measnet.compile_ahead import compile_ahead, kernels_of_a_step
from measnet.errors import typed
from measnet.hardware import Decision
from measnet.transformer import TransformerBlock

SHAPES = 64
"""Shapes that torch may compile for one block's code. Its default, 8, is too low for the levels of
the network."""


def compile_blocks(model: nn.Module, device: torch.device) -> Decision:
    """Compile each transformer block of `model` at its first forward pass.

    Many blocks have the same shapes, so this takes about one minute; compiling the network as one
    piece takes several. If a trial compilation fails, the model does not change.

    Returns:
        `on`, or `off` with the compiler's message.
    """
    try:
        trial = torch.compile(_trial, dynamic=False)
        trial(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # compilers, headers and drivers fail in many ways; eager works
        return Decision(
            "off",
            f"torch.compile cannot build here ({typed(error)}); training "
            "continues without it. It needs a C compiler and Python's headers (apt-get install gcc "
            "python3-dev)",
        )
    torch.compiler.config.recompile_limit = SHAPES
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        block.compile(dynamic=False)
    return Decision("on", f"{len(blocks)} blocks compile in the first step")


def _trial(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(2 * x).sum()


def compile_kernels(config: TrainConfig, decisions: Decisions, *, first_on_node: bool) -> None:
    """Compile the Triton kernels of a step in parallel, where they are used; a collective call.

    On each node one rank compiles; the others then find the results in Triton's folder.
    """
    if decisions.kernels.choice != "triton" or decisions.compile.choice == "on":
        return
    launches = kernels_of_a_step(
        config.model,
        micro_batch=config.recipe.micro_batch,
        crop=config.data.crop,
        bf16=decisions.precision.choice == "bf16",
    )
    for turn in (True, False):
        if first_on_node == turn:
            compile_ahead(launches, threads=os.cpu_count() or 1)
        dist.barrier()
