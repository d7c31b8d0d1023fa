"""A small kernel that shows whether Triton can build and run here."""

import torch
import triton
import triton.language as tl

from measnet.ops.gpu_library import launch

COUNT = 16


@triton.jit
def _double(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, tl.load(x + at) * 2.0)


def doubles(device: torch.device) -> bool:
    """Whether a kernel on `device` gives what it should.

    Raises:
        Exception: Triton cannot build; of whichever type the compiler or the driver gives.
    """
    x = torch.arange(COUNT, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    launch(_double, (1,), x, out, COUNT=COUNT)
    return bool((out == 2 * x).all())
