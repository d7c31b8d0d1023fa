"""What the experts of MEE see: norm, depth-wise convolution and a product that modulates it.

The norm is computed by the convolution that reads it, the modulation by the product before it, and
the mean that the gate sees beside the convolution. Kept for the backward pass are the input and the
convolved features; the rest is computed again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu.depthwise import Norm, convolve_back, norm_convolve
from measnet.ops.gpu.products import multiply, through_norm, weight_gradient
from measnet.ops.gpu_library import ceil_div, feature_dtype, launch, power_of_two, products


@triton.jit(do_not_specialize=["pixels"])
def _statistics(x, mean_out, rstd_out, pixels, epsilon,
                C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Mean and 1 / standard deviation over the channels of each pixel."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    known = inside[:, None] & (c < C)[None, :]
    tile = tl.load(x + rows[:, None] * C + c[None, :], mask=known, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 1) / C
    apart = tl.where(known, tile - mean[:, None], 0.0)
    tl.store(mean_out + rows, mean, mask=inside)
    tl.store(rstd_out + rows, tl.rsqrt(tl.sum(apart * apart, 1) / C + epsilon), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _norm_back(
    gradient, x, mean_in, rstd_in, gamma, of_x, of_norm, pixels,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this tile's of the norm's weight and bias, from that of norm(x)."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    known = inside[:, None] & (c < C)[None, :]
    at = rows[:, None] * C + c[None, :]
    mean = tl.load(mean_in + rows, mask=inside, other=0.0)
    rstd = tl.load(rstd_in + rows, mask=inside, other=0.0)
    wanted = tl.load(gradient + at, mask=known, other=0.0).to(tl.float32)
    normal = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    normal = tl.where(known, (normal - mean[:, None]) * rstd[:, None], 0.0)
    partial = of_norm + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(partial + c, tl.sum(wanted * normal, 0), mask=c < C)
    tl.store(partial + C + c, tl.sum(wanted, 0), mask=c < C)
    scale = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    wanted = through_norm(wanted, normal, rstd, scale, C)
    tl.store(of_x + at, wanted.to(of_x.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels", "span"])
def _modulate_back(
    gradient, depth, matrix, of_mean, of_product, of_depth, pixels, span,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the product and of `depth`, where out = (depth · matrixᵀ) ⊙ (1 + depth).

    `of_mean` is added to the gradient of every pixel of a picture, which has `span` pixels.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    known = inside[:, None] & (c < C)[None, :]
    sums = tl.zeros([BM, BC], tl.float32)  # the product, once more
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        known_part = inside[:, None] & (k < C)[None, :]
        tile = tl.load(depth + rows[:, None] * C + k[None, :], mask=known_part, other=0.0)
        known_weight = (k < C)[:, None] & (c < C)[None, :]
        weight = tl.load(matrix + c[None, :] * C + k[:, None], mask=known_weight, other=0.0)
        sums = tl.dot(tile, weight, sums, input_precision=PRECISION)
    at = rows[:, None] * C + c[None, :]
    sums *= tl.load(gradient + at, mask=known, other=0.0).to(tl.float32)
    sums += tl.load(of_mean + (rows // span)[:, None] * C + c[None, :], mask=known, other=0.0)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        known_part = inside[:, None] & (k < C)[None, :]
        part = rows[:, None] * C + k[None, :]
        tile = tl.load(depth + part, mask=known_part, other=0.0)
        wanted = tl.load(gradient + part, mask=known_part, other=0.0).to(tl.float32)
        wanted = (wanted * (1.0 + tile.to(tl.float32))).to(tile.dtype)
        tl.store(of_product + part, wanted, mask=known_part)
        known_weight = (k < C)[:, None] & (c < C)[None, :]
        weight = tl.load(matrix + k[:, None] * C + c[None, :], mask=known_weight, other=0.0)
        sums = tl.dot(wanted, weight, sums, input_precision=PRECISION)
    tl.store(of_depth + at, sums.to(of_depth.dtype.element_ty), mask=known)


def expert_features(
    x_bhwc: Tensor, norm: torch.nn.LayerNorm, depthwise: Tensor, project: Tensor
) -> tuple[Tensor, Tensor]:
    """See `measnet.ops.expert_features`."""
    x = x_bhwc.to(feature_dtype(x_bhwc))
    found: tuple[Tensor, Tensor] = _ExpertFeatures.apply(
        x, norm.weight, norm.bias, norm.eps, depthwise, project
    )
    return found


class _ExpertFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_bhwc: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        depthwise: Tensor,
        project: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = x_bhwc.contiguous()
        pixels = x.shape[1] * x.shape[2]
        norm = Norm(*_moments(x, epsilon), weight, bias)
        taps = depthwise.flatten(1).float().contiguous()
        depth, sums = norm_convolve(x, norm, taps)
        matrix = project.to(x.dtype).contiguous()
        ctx.save_for_backward(x, *norm, taps, depth, matrix)
        return sums / pixels, multiply(depth, matrix, factor=depth)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_mixed: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, taps, depth, matrix = ctx.saved_tensors
        norm = Norm(mean, rstd, weight, bias)
        of_mean = (of_mean / (x.shape[1] * x.shape[2])).contiguous()
        of_product, of_depth = _modulated(of_mixed.contiguous(), depth, matrix, of_mean)
        of_project = weight_gradient(of_product, depth)
        of_normal, of_taps = convolve_back(x, taps, of_depth, norm)
        of_x, of_norm = _normalised(of_normal, x, norm)
        return of_x, *of_norm.unbind(), None, of_taps.view(-1, 1, 3, 3), of_project


def _moments(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    channels, pixels = x.shape[-1], x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(pixels, dtype=torch.float32) for _ in range(2))
    sizes = _sizes(channels)
    grid = (ceil_div(pixels, sizes["BM"]),)
    launch(_statistics, grid, x, mean, rstd, pixels, epsilon, C=channels, **sizes)
    return mean, rstd


def _normalised(gradient: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the norm's weight and bias, (2, C) fp32."""
    channels, pixels = x.shape[-1], x.numel() // x.shape[-1]
    sizes = _sizes(channels)
    programs = ceil_div(pixels, sizes["BM"])
    of_x = torch.empty_like(x)
    of_norm = x.new_empty(programs, 2, channels, dtype=torch.float32)
    arguments = (gradient, x, norm.mean, norm.rstd, norm.weight, of_x, of_norm, pixels)
    launch(_norm_back, (programs,), *arguments, C=channels, **sizes)
    return of_x, of_norm.sum(0)


def _modulated(
    gradient: Tensor, depth: Tensor, matrix: Tensor, of_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the product and of the convolved features."""
    channels, pixels = depth.shape[-1], depth.numel() // depth.shape[-1]
    of_product, of_depth = torch.empty_like(depth), torch.empty_like(depth)
    block = power_of_two(channels)
    # A product of fp32 needs each number in three parts, so its tiles are smaller.
    rows = 32 if depth.dtype == torch.float32 else min(128, 8192 // block)
    launch(
        _modulate_back,
        (ceil_div(pixels, rows),),
        *(gradient, depth, matrix, of_mean, of_product, of_depth),
        *(pixels, pixels // len(of_mean)),
        **{"C": channels, "BM": rows, "BC": block, "BK": 32},
        PRECISION=products(depth.dtype),
        num_warps=8,
        num_stages=2,
    )
    return of_product, of_depth


def _sizes(channels: int) -> dict[str, int]:
    """Pixels of a tile, which has all channels: 32 values for each thread."""
    block = power_of_two(channels)
    return {"BM": max(16, min(64, 8192 // block)), "BC": block, "num_warps": 8}
