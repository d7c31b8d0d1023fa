"""Depth-wise 3×3 convolutions with zero padding: after a layer norm, or before a gate.

A program slides down the rows of a tile of columns and channels. It holds the sums of three rows
of the result, so that each row of the input is loaded three times, once for each column of the
kernel, and not nine times.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu_library import ceil_div, launch, power_of_two

COLUMNS = 16
"""Columns of a tile."""
CHANNELS = 64
"""Most channels of a tile."""
ROWS = 16
"""Rows that a program makes; it reads one more on either side."""
WARPS = 8
"""Four values of a tile for each thread: the nine taps of four channels fit into registers."""
STAGES = 1
"""Rows that are loaded before they are needed, and one; more take registers and shared memory."""


class Norm(NamedTuple):
    """A layer norm over the channels, as a kernel computes it."""

    mean: Tensor
    """Of each pixel, (P,) fp32."""
    rstd: Tensor
    """1 / standard deviation of each pixel, (P,) fp32."""
    weight: Tensor
    """(C,)."""
    bias: Tensor
    """(C,)."""


@triton.jit
def start_of(H, W, R: tl.constexpr, BW: tl.constexpr):
    """Picture, first row and first column of this program's tile, from its first number."""
    across = (W + BW - 1) // BW
    down = (H + R - 1) // R
    at = tl.program_id(0)
    column = (at % across) * BW
    row = ((at // across) % down) * R
    return (at // (across * down)).to(tl.int64), row, column


@triton.jit
def load_row(x, picture, row, column, channel, known, step, H, W):
    """One row of a tile, fp32; 0 outside the picture."""
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (picture * H + row) * W + column
    address = x + at[:, None] * step + channel[None, :]
    return tl.load(address, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_normal(x, norm, picture, row, column, channel, known, step, H, W):
    """The same of norm(x), of which `norm` is mean and rstd of each pixel, weight and bias."""
    mean, rstd, gamma, beta = norm
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (picture * H + row) * W + column
    tile = load_row(x, picture, row, column, channel, known, step, H, W)
    tile -= tl.load(mean + at, mask=inside, other=0.0)[:, None]
    tile *= tl.load(rstd + at, mask=inside, other=0.0)[:, None]
    tile *= tl.load(gamma + channel, mask=known, other=0.0)[None, :]
    tile += tl.load(beta + channel, mask=known, other=0.0)[None, :]
    return tl.where(inside[:, None] & known[None, :], tile, 0.0)


@triton.jit
def load_columns(x, picture, row, column, channel, known, step, H, W):
    """One row of a tile, from one column to the left, in place, and from one to the right."""
    left = load_row(x, picture, row, column - 1, channel, known, step, H, W)
    middle = load_row(x, picture, row, column, channel, known, step, H, W)
    right = load_row(x, picture, row, column + 1, channel, known, step, H, W)
    return left, middle, right


@triton.jit
def load_tap(kernel, tap: tl.constexpr, channel, known):
    """One of the nine taps of each channel's kernel, (1, channels)."""
    return tl.load(kernel + channel * 9 + tap, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_taps(kernel, channel, known):
    """All nine, row by row."""
    return (
        load_tap(kernel, 0, channel, known),
        load_tap(kernel, 1, channel, known),
        load_tap(kernel, 2, channel, known),
        load_tap(kernel, 3, channel, known),
        load_tap(kernel, 4, channel, known),
        load_tap(kernel, 5, channel, known),
        load_tap(kernel, 6, channel, known),
        load_tap(kernel, 7, channel, known),
        load_tap(kernel, 8, channel, known),
    )


@triton.jit
def add_row(beside, first, second, third):
    """What one row of the input gives to one row of the result."""
    return beside[0] * first + beside[1] * second + beside[2] * third


@triton.jit
def slide(beside, above, here, taps):
    """Adds a row of the input: a row of the result that is complete, and the sums of the next two.

    `above` and `here` are the sums before: of the row above, and of the input's own row.
    """
    done = above + add_row(beside, taps[6], taps[7], taps[8])
    above = here + add_row(beside, taps[3], taps[4], taps[5])
    here = add_row(beside, taps[0], taps[1], taps[2])
    return done, above, here


@triton.jit
def gelu(x):
    """x · Φ(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """d gelu(x) / dx."""
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["H", "W"])
def _convolve(
    x, kernel, out, H, W, x_step, out_step, mean, rstd, gamma, beta, sums,
    C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = x ⊛ kernel. `NORM`: of norm(x), and also the sum over this tile's pixels."""
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    taps = load_taps(kernel, c, known)
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    total = tl.zeros([BW, BC], tl.float32)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        if NORM:
            norm = (mean, rstd, gamma, beta)
            left = load_normal(x, norm, picture, r, column - 1, c, known, x_step, H, W)
            middle = load_normal(x, norm, picture, r, column, c, known, x_step, H, W)
            right = load_normal(x, norm, picture, r, column + 1, c, known, x_step, H, W)
            beside = (left, middle, right)
        else:
            beside = load_columns(x, picture, r, column, c, known, x_step, H, W)
        done, above, here = slide(beside, above, here, taps)
        made = (i >= 2) & (r - 1 < H) & (column < W)
        at = (picture * H + r - 1) * W + column
        address = out + at[:, None] * out_step + c[None, :]
        tl.store(address, done.to(out.dtype.element_ty), mask=made[:, None] & known[None, :])
        if NORM:
            total += tl.where(made[:, None], done, 0.0)
    if NORM:
        at = tl.program_id(0).to(tl.int64) * C
        tl.store(sums + at + c, tl.sum(total, 0), mask=known)


@triton.jit(do_not_specialize=["H", "W"])
def _gate(
    planes, kernel, out, gradient, of_planes, H, W,
    C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = gelu(a) · b of the halves a and b of planes ⊛ kernel; `C` channels each.

    `BACK`: also the gradients of a and b, from that of `out`.
    """
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    d = c + C
    known = c < C
    a_taps = load_taps(kernel, c, known)
    b_taps = load_taps(kernel, d, known)
    a_above = tl.zeros([BW, BC], tl.float32)
    a_here = tl.zeros([BW, BC], tl.float32)
    b_above = tl.zeros([BW, BC], tl.float32)
    b_here = tl.zeros([BW, BC], tl.float32)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        beside = load_columns(planes, picture, r, column, c, known, 2 * C, H, W)
        a, a_above, a_here = slide(beside, a_above, a_here, a_taps)
        beside = load_columns(planes, picture, r, column, d, known, 2 * C, H, W)
        b, b_above, b_here = slide(beside, b_above, b_here, b_taps)
        made = ((i >= 2) & (r - 1 < H) & (column < W))[:, None] & known[None, :]
        at = ((picture * H + r - 1) * W + column)[:, None]
        active = gelu(a)
        dtype = out.dtype.element_ty
        tl.store(out + at * C + c[None, :], (active * b).to(dtype), mask=made)
        if BACK:
            wanted = tl.load(gradient + at * C + c[None, :], mask=made, other=0.0).to(tl.float32)
            of_a = (wanted * b * gelu_slope(a)).to(dtype)
            tl.store(of_planes + at * 2 * C + c[None, :], of_a, mask=made)
            tl.store(of_planes + at * 2 * C + d[None, :], (wanted * active).to(dtype), mask=made)


@triton.jit(do_not_specialize=["H", "W"])
def _convolve_back(
    x, kernel, gradient, of_x, of_kernel, H, W, x_step, gradient_step, out_step,
    mean, rstd, gamma, beta,
    C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, NORM: tl.constexpr,
    GROUP: tl.constexpr, OWN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of x and, of this tile, of the kernel, from one reading of both.

    A row of the gradient meets the row of x above it, beside it and below it; of x only the rows
    that belong to this program count. `NORM`: norm(x) was convolved, and has the gradient. The
    kernel's gradient is that of the first `OWN` of each `GROUP` of channels.
    """
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    taps = load_taps(kernel, c, known)
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    x_above = tl.zeros([BW, BC], tl.float32)
    x_here = tl.zeros([BW, BC], tl.float32)
    g0 = tl.zeros([BW, BC], tl.float32)
    g1 = tl.zeros([BW, BC], tl.float32)
    g2 = tl.zeros([BW, BC], tl.float32)
    g3 = tl.zeros([BW, BC], tl.float32)
    g4 = tl.zeros([BW, BC], tl.float32)
    g5 = tl.zeros([BW, BC], tl.float32)
    g6 = tl.zeros([BW, BC], tl.float32)
    g7 = tl.zeros([BW, BC], tl.float32)
    g8 = tl.zeros([BW, BC], tl.float32)
    end = tl.minimum(row + R, H)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        beside = load_columns(gradient, picture, r, column, c, known, gradient_step, H, W)
        own = known & (r + 1 < end)
        if NORM:
            norm = (mean, rstd, gamma, beta)
            x_below = load_normal(x, norm, picture, r + 1, column, c, own, x_step, H, W)
        else:
            x_below = load_row(x, picture, r + 1, column, c, own, x_step, H, W)
        g0 += x_above * beside[2]
        g1 += x_above * beside[1]
        g2 += x_above * beside[0]
        g3 += x_here * beside[2]
        g4 += x_here * beside[1]
        g5 += x_here * beside[0]
        g6 += x_below * beside[2]
        g7 += x_below * beside[1]
        g8 += x_below * beside[0]
        x_above = x_here
        x_here = x_below
        done = above + add_row(beside, taps[2], taps[1], taps[0])
        above = here + add_row(beside, taps[5], taps[4], taps[3])
        here = add_row(beside, taps[8], taps[7], taps[6])
        made = (i >= 2) & (r - 1 < H) & (column < W)
        at = (picture * H + r - 1) * W + column
        address = of_x + at[:, None] * out_step + c[None, :]
        tl.store(address, done.to(of_x.dtype.element_ty), mask=made[:, None] & known[None, :])
    known = known & (c % GROUP < OWN)
    own = c // GROUP * OWN + c % GROUP
    partial = of_kernel + tl.program_id(0).to(tl.int64) * 9 * (C // GROUP * OWN) + own * 9
    tl.store(partial, tl.sum(g0, 0), mask=known)
    tl.store(partial + 1, tl.sum(g1, 0), mask=known)
    tl.store(partial + 2, tl.sum(g2, 0), mask=known)
    tl.store(partial + 3, tl.sum(g3, 0), mask=known)
    tl.store(partial + 4, tl.sum(g4, 0), mask=known)
    tl.store(partial + 5, tl.sum(g5, 0), mask=known)
    tl.store(partial + 6, tl.sum(g6, 0), mask=known)
    tl.store(partial + 7, tl.sum(g7, 0), mask=known)
    tl.store(partial + 8, tl.sum(g8, 0), mask=known)


def convolve(x_bhwc: Tensor, kernel: Tensor, out: Tensor | None = None) -> Tensor:
    """x ⊛ kernel.

    Args:
        x_bhwc: (B, H, W, C); pixels may lie further apart than C.
        kernel: (C, 1, 3, 3) or (C, 9), fp32, contiguous.
        out: where to write, (B, H, W, C).
    """
    channels = x_bhwc.shape[-1]
    out = x_bhwc.new_empty(x_bhwc.shape) if out is None else out
    grid, sizes = tiling(x_bhwc, channels)
    height, width = x_bhwc.shape[1:3]
    arguments = (x_bhwc, kernel, out, height, width, x_bhwc.stride(2), out.stride(2))
    launch(_convolve, grid, *arguments, *[kernel] * 5, C=channels, NORM=False, **sizes)
    return out


def norm_convolve(x_bhwc: Tensor, norm: Norm, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) ⊛ kernel, and its sum over the pixels of each picture, (B, C) fp32.

    Args:
        x_bhwc: (B, H, W, C), contiguous.
        norm: of the channels.
        kernel: (C, 9), fp32, contiguous.
    """
    batch, height, width, channels = x_bhwc.shape
    out = torch.empty_like(x_bhwc)
    grid, sizes = tiling(x_bhwc, channels)
    sums = x_bhwc.new_empty(grid[0], channels, dtype=torch.float32)
    arguments = (x_bhwc, kernel, out, height, width, channels, channels, *norm, sums)
    launch(_convolve, grid, *arguments, C=channels, NORM=True, **sizes)
    return out, sums.view(batch, -1, channels).sum(1)


def gate(planes_bhwc: Tensor, kernel: Tensor) -> Tensor:
    """gelu(a) · b, where a and b are the halves of planes ⊛ kernel.

    Args:
        planes_bhwc: (B, H, W, 2 · hidden), contiguous.
        kernel: (2 · hidden, 9), fp32, contiguous.

    Returns:
        (B, H, W, hidden).
    """
    batch, height, width, both = planes_bhwc.shape
    out = planes_bhwc.new_empty(batch, height, width, both // 2)
    grid, sizes = tiling(planes_bhwc, both // 2)
    arguments = (planes_bhwc, kernel, out, out, out, height, width)
    launch(_gate, grid, *arguments, C=both // 2, BACK=False, **sizes)
    return out


def gate_back(planes_bhwc: Tensor, kernel: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of planes ⊛ kernel, (B, H, W, 2 · hidden), and what `gate` gave."""
    batch, height, width, both = planes_bhwc.shape
    of_planes = torch.empty_like(planes_bhwc)
    gated = planes_bhwc.new_empty(batch, height, width, both // 2)
    grid, sizes = tiling(planes_bhwc, both // 2)
    arguments = (planes_bhwc, kernel, gated, gradient, of_planes, height, width)
    launch(_gate, grid, *arguments, C=both // 2, BACK=True, **sizes)
    return of_planes, gated


def convolve_back(
    x_bhwc: Tensor, kernel: Tensor, gradient: Tensor, norm: Norm | None = None, halves: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of x, or of norm(x), and of the kernel as (C, 9) fp32, without padding.

    Args:
        x_bhwc: (B, H, W, C); pixels may lie further apart than C.
        kernel: (C, 9), fp32, contiguous.
        gradient: of the result, (B, H, W, C); pixels may lie further apart than C.
        norm: of the channels, where `norm_convolve` gave the result.
        halves: channels that count in each half of C, if the rest of it is padding.
    """
    channels = x_bhwc.shape[-1]
    group, own = channels // 2 if halves else channels, halves or channels
    grid, sizes = tiling(x_bhwc, channels)
    of_x = torch.empty_like(x_bhwc, memory_format=torch.contiguous_format)
    of_kernel = x_bhwc.new_empty(grid[0], channels // group * own, 9, dtype=torch.float32)
    arguments = (x_bhwc, kernel, gradient, of_x, of_kernel, *x_bhwc.shape[1:3])
    steps = (x_bhwc.stride(2), gradient.stride(2), of_x.stride(2))
    given = [kernel] * 4 if norm is None else norm
    constants = {"C": channels, "NORM": norm is not None, "GROUP": group, "OWN": own, **sizes}
    launch(_convolve_back, grid, *arguments, *steps, *given, **constants)
    return of_x, of_kernel.sum(0)


class Depthwise(torch.autograd.Function):
    """`convolve` and its gradients."""

    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, kernel: Tensor) -> Tensor:
        """`x_bhwc` (B, H, W, C), contiguous; `kernel` (C, 1, 3, 3)."""
        taps = kernel.flatten(1).float().contiguous()
        ctx.save_for_backward(x_bhwc, taps)
        return convolve(x_bhwc, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of the features and the kernel."""
        x, taps = ctx.saved_tensors
        of_x, of_taps = convolve_back(x, taps, gradient.contiguous())
        return of_x, of_taps.view(-1, 1, 3, 3)


def tiling(x_bhwc: Tensor, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants of a kernel that slides down rows."""
    batch, height, width, _ = x_bhwc.shape
    block = min(CHANNELS, power_of_two(channels))
    tiles = batch * ceil_div(height, ROWS) * ceil_div(width, COLUMNS)
    sizes = {"R": ROWS, "BW": COLUMNS, "BC": block, "STAGES": STAGES, "num_warps": WARPS}
    return (tiles, ceil_div(channels, block)), sizes
