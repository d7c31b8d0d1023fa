"""torch.compile for training: block by block, or not at all where this machine cannot build."""

import torch
from torch import nn

from measnet.hardware import Decision
from measnet.transformer import TransformerBlock

SHAPES = 64
"""Most shapes that torch compiles for one block's code; its own limit, 8, is below what the levels
of the network need."""


def compile_blocks(model: nn.Module, device: torch.device) -> Decision:
    """Have each transformer block of `model` compile itself at its first forward pass.

    Whole blocks repeat with the same shapes, so they compile in a minute; the network as a whole
    takes several. Where a trial compilation fails, the model stays as it is.

    Returns:
        `on`, or `off` with what the compiler said.
    """
    try:
        trial = torch.compile(_trial, dynamic=False)
        trial(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # compilers, headers and drivers fail in many ways; eager works
        lines = str(error).strip().splitlines() or [""]
        return Decision(
            "off",
            f"torch.compile cannot build here ({type(error).__name__}: {lines[0]}); training goes "
            "on without it. It needs a C compiler and Python's headers (apt-get install gcc "
            "python3-dev)",
        )
    torch._dynamo.config.recompile_limit = SHAPES
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    for block in blocks:
        block.compile(dynamic=False)
    return Decision("on", f"{len(blocks)} blocks compile in the first step")


def _trial(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(2 * x).sum()
