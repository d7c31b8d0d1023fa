"""FD's low-pass: every picture by kernels of its own, all pictures at once (Eq. 7-8).

As in `depthwise`, a program slides down the rows of a tile. Outside the picture the features are
reflected. The gradient is gathered and not scattered: a pixel beside the edge is read once more
through its reflection.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu.depthwise import (
    add_row,
    load_row,
    load_taps,
    start_of,
    tiling,
)
from measnet.ops.gpu_library import feature_dtype, launch


@triton.jit
def _reflect(at, size):
    """-1 -> 1 and size -> size - 2."""
    at = tl.where(at < 0, -at, at)
    return tl.where(at >= size, 2 * size - 2 - at, at)


@triton.jit(do_not_specialize=["H", "W"])
def _low_pass(
    x, taps, low, high, H, W,
    C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """low = x ⊛ taps, high = x − low."""
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    k = load_taps(taps + picture * C * 9, c, known)
    before, after = _reflect(column - 1, W), _reflect(column + 1, W)
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    was = tl.zeros([BW, BC], tl.float32)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        source = _reflect(r, H)
        left = load_row(x, picture, source, before, c, known, C, H, W)
        middle = load_row(x, picture, source, column, c, known, C, H, W)
        right = load_row(x, picture, source, after, c, known, C, H, W)
        beside = (left, middle, right)
        done = above + add_row(beside, k[6], k[7], k[8])
        above = here + add_row(beside, k[3], k[4], k[5])
        here = add_row(beside, k[0], k[1], k[2])
        made = ((i >= 2) & (r - 1 < H) & (column < W))[:, None] & known[None, :]
        at = ((picture * H + r - 1) * W + column)[:, None] * C + c[None, :]
        done = done.to(low.dtype.element_ty)
        tl.store(low + at, done, mask=made)
        tl.store(high + at, (was - done.to(tl.float32)).to(low.dtype.element_ty), mask=made)
        was = middle


@triton.jit
def _difference(of_low, of_high, picture, row, column, c, known, C, H, W):
    """What the filtered features' gradient is: that of low, less that of high."""
    low = load_row(of_low, picture, row, column, c, known, C, H, W)
    return low - load_row(of_high, picture, row, column, c, known, C, H, W)


@triton.jit
def _read_by(row, reads, given, left_tap, middle_tap, right_tap):
    """What one row of the result gives to the gradient of a row that it reads."""
    of_low, of_high, picture, column, first, last, c, C, H, W = given
    left = _difference(of_low, of_high, picture, row, column - 1, c, reads, C, H, W)
    middle = _difference(of_low, of_high, picture, row, column, c, reads, C, H, W)
    right = _difference(of_low, of_high, picture, row, column + 1, c, reads, C, H, W)
    direct = right * left_tap + middle * middle_tap + left * right_tap
    return direct + tl.where(first, left, 0.0) * left_tap + tl.where(last, right, 0.0) * right_tap


@triton.jit(do_not_specialize=["H", "W"])
def _low_pass_back(
    x, taps, of_low, of_high, of_x, of_taps, H, W,
    C: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of x and, of this tile, of its picture's taps."""
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    k = load_taps(taps + picture * C * 9, c, known)
    before, after = _reflect(column - 1, W), _reflect(column + 1, W)
    t0 = tl.zeros([BW, BC], tl.float32)
    t1 = tl.zeros([BW, BC], tl.float32)
    t2 = tl.zeros([BW, BC], tl.float32)
    t3 = tl.zeros([BW, BC], tl.float32)
    t4 = tl.zeros([BW, BC], tl.float32)
    t5 = tl.zeros([BW, BC], tl.float32)
    t6 = tl.zeros([BW, BC], tl.float32)
    t7 = tl.zeros([BW, BC], tl.float32)
    t8 = tl.zeros([BW, BC], tl.float32)
    # Column 0 reads column 1 on both sides, and the last column that before it.
    first = (column == 1)[:, None]
    last = (column == W - 2)[:, None]
    for i in tl.range(R, num_stages=STAGES):
        r = row + i
        inside = known & (r < H)
        sums = load_row(of_high, picture, r, column, c, inside, C, H, W)
        # Row r is read by the row below through the first row of the kernel, by itself, and by
        # the row above through the last; and at the edges by those that reflect.
        given = (of_low, of_high, picture, column, first, last, c, C, H, W)
        sums += _read_by(r + 1, inside, given, k[0], k[1], k[2])
        sums += _read_by(r, inside, given, k[3], k[4], k[5])
        sums += _read_by(r - 1, inside, given, k[6], k[7], k[8])
        sums += _read_by(r - 1, inside & (r == 1), given, k[0], k[1], k[2])
        sums += _read_by(r + 1, inside & (r == H - 2), given, k[6], k[7], k[8])
        at = ((picture * H + r) * W + column)[:, None] * C + c[None, :]
        made = ((r < H) & (column < W))[:, None] & known[None, :]
        tl.store(of_x + at, sums.to(of_x.dtype.element_ty), mask=made)
        wanted = _difference(of_low, of_high, picture, r, column, c, inside, C, H, W)
        source = _reflect(r - 1, H)
        t0 += wanted * load_row(x, picture, source, before, c, inside, C, H, W)
        t1 += wanted * load_row(x, picture, source, column, c, inside, C, H, W)
        t2 += wanted * load_row(x, picture, source, after, c, inside, C, H, W)
        t3 += wanted * load_row(x, picture, r, before, c, inside, C, H, W)
        t4 += wanted * load_row(x, picture, r, column, c, inside, C, H, W)
        t5 += wanted * load_row(x, picture, r, after, c, inside, C, H, W)
        source = _reflect(r + 1, H)
        t6 += wanted * load_row(x, picture, source, before, c, inside, C, H, W)
        t7 += wanted * load_row(x, picture, source, column, c, inside, C, H, W)
        t8 += wanted * load_row(x, picture, source, after, c, inside, C, H, W)
    part = of_taps + tl.program_id(0).to(tl.int64) * 9 * C + c * 9
    tl.store(part, tl.sum(t0, 0), mask=known)
    tl.store(part + 1, tl.sum(t1, 0), mask=known)
    tl.store(part + 2, tl.sum(t2, 0), mask=known)
    tl.store(part + 3, tl.sum(t3, 0), mask=known)
    tl.store(part + 4, tl.sum(t4, 0), mask=known)
    tl.store(part + 5, tl.sum(t5, 0), mask=known)
    tl.store(part + 6, tl.sum(t6, 0), mask=known)
    tl.store(part + 7, tl.sum(t7, 0), mask=known)
    tl.store(part + 8, tl.sum(t8, 0), mask=known)


def low_pass(x_bhwc: Tensor, taps_bc9: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture convolved with kernels of its own, reflecting at the edges, and the rest of it.

    Args:
        x_bhwc: (B, H, W, C); H and W are 2 or more.
        taps_bc9: (B, C, 9), 3×3 kernels row by row.

    Returns:
        Two of (B, H, W, C), whose sum is the input.

    Raises:
        ValueError: H or W is 1.
    """
    height, width = x_bhwc.shape[1:3]
    if min(height, width) < 2:
        raise ValueError(f"{height}x{width} pixels have none to reflect; a low-pass needs 2x2")
    result: tuple[Tensor, Tensor] = _LowPass.apply(x_bhwc.to(feature_dtype(x_bhwc)), taps_bc9)
    return result


class _LowPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, taps_bc9: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = x_bhwc.contiguous(), taps_bc9.float().contiguous()
        low, high = torch.empty_like(x), torch.empty_like(x)
        _, height, width, channels = x.shape
        grid, sizes = tiling(x, channels)
        launch(_low_pass, grid, x, taps, low, high, height, width, C=channels, **sizes)
        ctx.save_for_backward(x, taps)
        ctx.dtype = taps_bc9.dtype
        return low, high

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_low: Tensor, of_high: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        of_x = torch.empty_like(x)
        batch, height, width, channels = x.shape
        grid, sizes = tiling(x, channels)
        of_taps = taps.new_empty(grid[0], channels, 9)
        given = (x, taps, of_low.contiguous(), of_high.contiguous(), of_x, of_taps)
        launch(_low_pass_back, grid, *given, height, width, C=channels, **sizes)
        summed = of_taps.view(batch, -1, channels, 9).sum(1)
        return of_x, summed.to(ctx.dtype)
