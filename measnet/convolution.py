"""Convolutions on BHWC features, each by the library that is fastest on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from measnet import kernels

CONVOLUTION_PAYS = 48 * 128
"""Elements of a matrix from which oneDNN trains faster than MKL."""


def convolve(x_bhwc: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """`F.conv2d` with zero padding to the same size (odd kernels) on BHWC features."""
    if (
        bias is None
        and groups == len(kernel)
        and kernel.shape[1:] == (1, 3, 3)
        and kernels.fit(x_bhwc, kernel)
    ):
        return kernels.depthwise(x_bhwc, kernel)
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    x_bchw = F.conv2d(x_bhwc.permute(0, 3, 1, 2), kernel, bias, padding=padding, groups=groups)
    return x_bchw.permute(0, 2, 3, 1)


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` over the last dimension: a 1×1 convolution.

    On a CPU it is computed as one, for torch hands convolutions to oneDNN and matrix products to
    MKL, which uses half of what an AMD processor can do. Not where a small matrix is trained: there
    oneDNN's gradient costs more than the rest gains.
    """
    on_cpu = x.device.type == "cpu" and x.dtype != torch.float64
    small = torch.is_grad_enabled() and matrix.numel() < CONVOLUTION_PAYS
    if not on_cpu or small or x.numel() == 0 or torch.compiler.is_compiling():
        return F.linear(x, matrix, bias)
    row_bchw = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out_bchw = F.conv2d(row_bchw, matrix[:, :, None, None], bias)
    return out_bchw.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(matrix))
