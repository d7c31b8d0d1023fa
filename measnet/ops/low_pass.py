"""FD's low-pass: each picture filtered by kernels of its own (Eq. 7-8)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from measnet.ops import cpu, gpu_library
from measnet.ops.cpu_library import fits


def low_pass(x_bhwc: Tensor, taps_bc9: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture convolved with kernels of its own, reflecting at the edges, and the rest of it.

    Args:
        x_bhwc: (B, H, W, C); H and W are 2 or more.
        taps_bc9: (B, C, 9), 3×3 kernels row by row.

    Returns:
        Two of (B, H, W, C), whose sum is the input.
    """
    if fits(x_bhwc):
        return cpu.low_pass(x_bhwc, taps_bc9.transpose(1, 2))
    if gpu_library.fits(x_bhwc):
        from measnet.ops.gpu import low_pass as gpu

        return gpu.low_pass(x_bhwc, taps_bc9)
    padded = reflect_pad(x_bhwc.permute(0, 3, 1, 2))
    kernel_bc133 = taps_bc9.unflatten(2, (1, 3, 3))
    low = torch.cat(
        [
            F.conv2d(one, its_kernel, groups=len(its_kernel))
            for one, its_kernel in zip(padded.split(1), kernel_bc133.unbind(), strict=True)
        ]
    ).permute(0, 2, 3, 1)
    return low, x_bhwc - low


def reflect_pad(x_bchw: Tensor) -> Tensor:
    """One more pixel on each side, reflected: (B, C, H + 2, W + 2); H and W are 2 or more."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x_bchw, (1, 1, 1, 1), mode="reflect")
    # On a GPU torch has no deterministic gradient of its own reflection.
    x = torch.cat([x_bchw[..., 1:2, :], x_bchw, x_bchw[..., -2:-1, :]], dim=-2)
    return torch.cat([x[..., 1:2], x, x[..., -2:-1]], dim=-1)
