"""Convolutions on BHWC features, each by the library that is fastest on the device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.ops import cpu, cpu_library, gpu_library
from measnet.ops.cpu_library import fits

CONVOLUTION_PAYS = 48 * 128
"""Elements of a matrix from which oneDNN trains faster than MKL."""


def convolve(
    x_bhwc: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    *,
    gelu: bool = False,
) -> Tensor:
    """`F.conv2d` with zero padding to the same size (odd kernels) on BHWC features, then `gelu`."""
    depthwise = groups == len(kernel) and kernel.shape[1] == 1 and max(kernel.shape[2:]) == 3
    if depthwise and fits(x_bhwc, kernel, bias):
        return cpu.depthwise(x_bhwc, kernel, bias, gelu=gelu)
    bare = kernel.shape[2:] == (3, 3) and bias is None and not gelu
    if depthwise and bare and gpu_library.fits(x_bhwc, kernel):
        from measnet.ops.gpu.depthwise import Depthwise

        x = x_bhwc.to(gpu_library.feature_dtype(x_bhwc)).contiguous()
        out: Tensor = Depthwise.apply(x, kernel)
        return out
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    x_bchw = F.conv2d(x_bhwc.permute(0, 3, 1, 2), kernel, bias, padding=padding, groups=groups)
    out_bhwc = x_bchw.permute(0, 2, 3, 1)
    return F.gelu(out_bhwc) if gelu else out_bhwc


def pointwise(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """`F.linear` over the last dimension, a 1×1 convolution, of x or of gelu(x)."""
    (out,) = project(x, (matrix,), None if bias is None else (bias,), gelu=gelu)
    return out


class Pointwise(nn.Linear):
    """A linear layer computed by `pointwise`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return pointwise(x, self.weight, self.bias)


def project(
    x: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    gelu: bool = False,
) -> tuple[Tensor, ...]:
    """`pointwise` of the same features with each of up to three matrices."""
    if fits(x, *matrices, *(biases or ()), out=len(matrices[0])):
        return cpu.project(x, matrices, biases, gelu=gelu)
    x = F.gelu(x) if gelu else x
    each = (None,) * len(matrices) if biases is None else biases
    return tuple(_linear(x, matrix, bias) for matrix, bias in zip(matrices, each, strict=True))


def preferred_padding(x: Tensor, width: int) -> int:
    """Channels by which to pad `width` hidden channels, so that these features' device is fast."""
    return -width % next(iter(cpu_library.KERNELS)) if fits(x) else 0


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, on a CPU computed as a convolution.

    Torch hands convolutions to oneDNN and matrix products to MKL, which uses half of what an AMD
    processor can do. Not where a small matrix is trained: there oneDNN's gradient costs more than
    the rest gains.
    """
    on_cpu = x.device.type == "cpu" and x.dtype != torch.float64
    small = torch.is_grad_enabled() and matrix.numel() < CONVOLUTION_PAYS
    if not on_cpu or small or x.numel() == 0 or torch.compiler.is_compiling():
        return F.linear(x, matrix, bias)
    row_bchw = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out_bchw = F.conv2d(row_bchw, matrix[:, :, None, None], bias)
    return out_bchw.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(matrix))
