"""The end of the gated feed-forward in one kernel: convolution, gate, 1×1 convolution, residual.

Between them are 2.66 times as many hidden channels as the features have. They are never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measnet.ops.gpu.depthwise import gate, gelu, start_of
from measnet.ops.gpu.products import multiply
from measnet.ops.gpu_library import ceil_div, launch, power_of_two, products

ROWS = {torch.bfloat16: 4, torch.float32: 2}
"""Rows of a tile."""
COLUMNS = 16
"""Columns of a tile."""
HIDDEN = {torch.bfloat16: 32, torch.float32: 16}
"""Hidden channels that a program convolves at a time."""
WIDEST = 128
"""Most channels of the features: a tile of the result stays in registers. With more, pixels
are few, and two kernels take over."""


@triton.jit(do_not_specialize=["H", "W"])
def _gate_project(
    planes, kernel, matrix, residual, out, H, W,
    C: tl.constexpr, HIDDEN: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = residual + matrix · (gelu(a) · b), of the halves a and b of planes ⊛ kernel.

    A pixel's nine neighbours are loaded for each hidden channel. Pixels of a tile share most of
    their neighbours, so the cache should serve most of these loads.
    """
    picture, row, start = start_of(H, W, R, BW)
    place = tl.arange(0, R * BW)
    y = row + place // BW
    x = start + place % BW
    c = tl.arange(0, BC)
    dtype = out.dtype.element_ty
    sums = tl.zeros([R * BW, BC], tl.float32)
    for first in range(0, HIDDEN, BH):
        h = first + tl.arange(0, BH)
        known = h < HIDDEN
        a = tl.zeros([R * BW, BH], tl.float32)
        b = tl.zeros([R * BW, BH], tl.float32)
        for down in range(3):  # not unrolled: all loads at once would take too many registers
            beside_y = y + down - 1
            for across in tl.static_range(3):
                beside_x = x + across - 1
                there = (beside_y >= 0) & (beside_y < H) & (beside_x >= 0) & (beside_x < W)
                there = there[:, None] & known[None, :]
                at = (picture * H + beside_y) * W + beside_x
                address = planes + at[:, None] * 2 * HIDDEN + h[None, :]
                of_a = tl.load(address, mask=there, other=0.0).to(tl.float32)
                of_b = tl.load(address + HIDDEN, mask=there, other=0.0).to(tl.float32)
                taps = kernel + h * 9 + 3 * down + across
                a += of_a * tl.load(taps, mask=known, other=0.0)[None, :]
                b += of_b * tl.load(taps + 9 * HIDDEN, mask=known, other=0.0)[None, :]
        gated = (gelu(a) * b).to(dtype)  # rounded as if it had been written
        known_weight = known[:, None] & (c < C)[None, :]
        address = matrix + c[None, :] * HIDDEN + h[:, None]
        weight = tl.load(address, mask=known_weight, other=0.0)
        sums = tl.dot(gated, weight, sums, input_precision=PRECISION)
    inside = ((y < H) & (x < W))[:, None] & (c < C)[None, :]
    at = ((picture * H + y) * W + x)[:, None] * C + c[None, :]
    sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(dtype), mask=inside)


def gate_project(planes_bhwh: Tensor, kernel: Tensor, matrix: Tensor, residual: Tensor) -> Tensor:
    """residual + (gelu(a) · b) · matrixᵀ, where a and b are the halves of planes ⊛ kernel.

    Args:
        planes_bhwh: (B, H, W, 2 · hidden), contiguous; hidden is a multiple of 16.
        kernel: (2 · hidden, 9), fp32, contiguous.
        matrix: (C, hidden) in the features' type, contiguous.
        residual: (B, H, W, C), contiguous.
    """
    channels, hidden = matrix.shape
    if channels > WIDEST:
        return multiply(gate(planes_bhwh, kernel), matrix, residual=residual)
    batch, height, width, _ = planes_bhwh.shape
    dtype = planes_bhwh.dtype
    rows = ROWS[dtype]
    out = torch.empty_like(residual)
    launch(
        _gate_project,
        (batch * ceil_div(height, rows) * ceil_div(width, COLUMNS),),
        *(planes_bhwh, kernel, matrix, residual, out, height, width),
        **{"C": channels, "HIDDEN": hidden, "R": rows, "BW": COLUMNS},
        **{"BC": power_of_two(channels), "BH": HIDDEN[dtype]},
        PRECISION=products(dtype),
        num_warps=8,
    )
    return out
