"""Products of features with small matrices: 1×1 convolutions, with the layer norm before them.

The matrices are thin (48 to 2,048 channels) and the pixels many, so memory traffic sets the time.
A layer norm is computed by the kernel of the product that reads it and is never written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from measnet.ops.gpu_library import ceil_div, launch, power_of_two, products

PROGRAMS = 512
"""Programs that a kernel is split into where there is a choice: two to four for each
multiprocessor of a large card. Not taken from the card, so that sums repeat on all cards."""


class Normalised(NamedTuple):
    """What the backward pass of a layer norm needs besides its input."""

    mean: Tensor
    """Over the channels of each pixel, (P,) fp32."""
    rstd: Tensor
    """1 / standard deviation, (P,) fp32."""


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _norm_project(
    x, gamma, beta, matrix, out, mean_out, rstd_out, pixels, epsilon, tiles,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[p, n] = Σ_c norm(x)[p, c] · matrix[n, c]; each program makes `tiles` tiles of a row."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = rows < pixels
    # Relative to the pixel's first channel: a large common mean must not swallow the variance.
    first = tl.load(x + rows * C, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for k in range(0, C, BK):
        c = k + tl.arange(0, BK)
        known = inside[:, None] & (c < C)[None, :]
        tile = tl.load(x + rows[:, None] * C + c[None, :], mask=known, other=0.0).to(tl.float32)
        apart = tl.where(known, tile - first[:, None], 0.0)
        total += tl.sum(apart, 1)
        squares += tl.sum(apart * apart, 1)
    mean = total / C
    rstd = tl.rsqrt(tl.maximum(squares / C - mean * mean, 0.0) + epsilon)
    mean += first
    if tl.program_id(1) == 0:
        tl.store(mean_out + rows, mean, mask=inside)
        tl.store(rstd_out + rows, rstd, mask=inside)
    for t in range(tiles):
        n = (tl.program_id(1) * tiles + t) * BN + tl.arange(0, BN)
        sums = tl.zeros([BM, BN], tl.float32)
        for k in range(0, C, BK):
            c = k + tl.arange(0, BK)
            known = inside[:, None] & (c < C)[None, :]
            tile = tl.load(x + rows[:, None] * C + c[None, :], mask=known, other=0.0)
            scale = tl.load(gamma + c, mask=c < C, other=0.0)
            shift = tl.load(beta + c, mask=c < C, other=0.0)
            normal = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
            normal = (normal * scale[None, :] + shift[None, :]).to(out.dtype.element_ty)
            known_weight = (c < C)[:, None] & (n < N)[None, :]
            weight = tl.load(matrix + n[None, :] * C + c[:, None], mask=known_weight, other=0.0)
            sums = tl.dot(normal, weight, sums, input_precision=PRECISION)
        known_out = inside[:, None] & (n < N)[None, :]
        address = out + rows[:, None] * N + n[None, :]
        tl.store(address, sums.to(out.dtype.element_ty), mask=known_out)


@triton.jit(do_not_specialize=["pixels"])
def _multiply(
    x, matrix, other, out, pixels, x_step, out_step, matrix_picture, matrix_n, matrix_k,
    K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ADD: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, p, n] = Σ_k x[b, p, k] · matrix[b, n, k].

    `ADD`: plus other[b, p, n]; `SCALE`: times 1 + other[b, p, n].
    """
    picture = tl.program_id(2)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < pixels
    at = picture.to(tl.int64) * pixels + rows
    matrix += picture.to(tl.int64) * matrix_picture
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        known = inside[:, None] & (k < K)[None, :]
        tile = tl.load(x + at[:, None] * x_step + k[None, :], mask=known, other=0.0)
        known_weight = (k < K)[:, None] & (n < N)[None, :]
        address = matrix + n[None, :] * matrix_n + k[:, None] * matrix_k
        weight = tl.load(address, mask=known_weight, other=0.0)
        sums = tl.dot(tile, weight, sums, input_precision=PRECISION)
    known_out = inside[:, None] & (n < N)[None, :]
    if ADD or SCALE:
        address = other + at[:, None] * N + n[None, :]
        beside = tl.load(address, mask=known_out, other=0.0).to(tl.float32)
        sums = sums + beside if ADD else sums * (1.0 + beside)
    address = out + at[:, None] * out_step + n[None, :]
    tl.store(address, sums.to(out.dtype.element_ty), mask=known_out)


@triton.jit
def through_norm(gradient, normal, rstd, gamma, C: tl.constexpr):
    """Gradient of a layer norm's input, from that of its result and what it was before `gamma`."""
    gradient *= gamma[None, :]
    along = tl.sum(gradient * normal, 1) / C
    common = tl.sum(gradient, 1) / C
    return (gradient - common[:, None] - normal * along[:, None]) * rstd[:, None]


# Specialised for the number of pixels: at 768 channels in fp32 registers do not suffice without. It
# runs in training only, where sizes are few.
@triton.jit
def _norm_project_back(
    gradient, matrix, x, mean_in, rstd_in, gamma, besides, of_x, of_norm, pixels,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of x: of the norm, from that of the product; plus `besides`, the residual's."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    sums = tl.zeros([BM, BC], tl.float32)
    for start in range(0, N, BK):
        n = start + tl.arange(0, BK)
        known = inside[:, None] & (n < N)[None, :]
        tile = tl.load(gradient + rows[:, None] * N + n[None, :], mask=known, other=0.0)
        known_weight = (n < N)[:, None] & (c < C)[None, :]
        weight = tl.load(matrix + n[:, None] * C + c[None, :], mask=known_weight, other=0.0)
        sums = tl.dot(tile, weight, sums, input_precision=PRECISION)
    known = inside[:, None] & (c < C)[None, :]
    mean = tl.load(mean_in + rows, mask=inside, other=0.0)
    rstd = tl.load(rstd_in + rows, mask=inside, other=0.0)
    at = rows[:, None] * C + c[None, :]
    normal = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    normal = tl.where(known, (normal - mean[:, None]) * rstd[:, None], 0.0)
    partial = of_norm + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(partial + c, tl.sum(sums * normal, 0), mask=c < C)
    tl.store(partial + C + c, tl.sum(sums, 0), mask=c < C)
    sums = through_norm(sums, normal, rstd, tl.load(gamma + c, mask=c < C, other=0.0), C)
    sums += tl.load(besides + at, mask=known, other=0.0).to(tl.float32)
    tl.store(of_x + at, sums.to(of_x.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels"])
def _weight_gradient(
    gradient, x, mean_in, rstd_in, gamma, beta, out, pixels, gradient_step, x_step, part,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
    GROUP: tl.constexpr, OWN_N: tl.constexpr, OWN_K: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, s, n, k] = Σ_p gradient[b, p, n] · x[b, p, k], over the pixels of part `s`.

    Written are the first `OWN_N` of each `GROUP` of n, and the first `OWN_K` of k.
    """
    tiles = (K + BK - 1) // BK
    n = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    start = tl.program_id(1) * part
    picture = tl.program_id(2).to(tl.int64)
    sums = tl.zeros([BN, BK], tl.float32)
    if NORM:
        scale = tl.load(gamma + k, mask=k < K, other=0.0)[None, :]
        shift = tl.load(beta + k, mask=k < K, other=0.0)[None, :]
    for step in range(0, part, BP):
        rows = start + step + tl.arange(0, BP)
        inside = (rows < pixels) & (rows < start + part)
        at = picture * pixels + rows
        known = inside[:, None] & (n < N)[None, :]
        address = gradient + at[:, None] * gradient_step + n[None, :]
        left = tl.load(address, mask=known, other=0.0)
        known = inside[:, None] & (k < K)[None, :]
        right = tl.load(x + at[:, None] * x_step + k[None, :], mask=known, other=0.0)
        if NORM:
            mean = tl.load(mean_in + at, mask=inside, other=0.0)[:, None]
            rstd = tl.load(rstd_in + at, mask=inside, other=0.0)[:, None]
            normal = (right.to(tl.float32) - mean) * rstd * scale + shift
            right = normal.to(left.dtype)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    known = ((n < N) & (n % GROUP < OWN_N))[:, None] & (k < OWN_K)[None, :]
    own = n // GROUP * OWN_N + n % GROUP
    whole = (picture * tl.num_programs(1) + tl.program_id(1)) * (N // GROUP * OWN_N * OWN_K)
    tl.store(out + whole + own[:, None] * OWN_K + k[None, :], sums, mask=known)


def norm_project(
    x_bhwc: Tensor, norm: tuple[Tensor, Tensor, float], matrix: Tensor
) -> tuple[Tensor, Normalised]:
    """norm(x) · matrixᵀ.

    Args:
        x_bhwc: (B, H, W, C), contiguous.
        norm: weight and bias (C,) fp32, and epsilon.
        matrix: (N, C) in the features' type, contiguous.

    Returns:
        (B, H, W, N), and what the backward pass needs of the norm.
    """
    gamma, beta, epsilon = norm
    (count, channels), pixels = matrix.shape, x_bhwc.numel() // x_bhwc.shape[-1]
    out = x_bhwc.new_empty(*x_bhwc.shape[:-1], count)
    kept = Normalised(*(x_bhwc.new_empty(pixels, dtype=torch.float32) for _ in range(2)))
    rows, columns, widest = _norm_tile(x_bhwc.dtype, channels)
    block = power_of_two(channels) if channels <= widest else widest // 2
    tiles, groups = _tiles(ceil_div(pixels, rows), ceil_div(count, columns))
    launch(
        _norm_project,
        (ceil_div(pixels, rows), groups),
        *(x_bhwc, gamma, beta, matrix, out, *kept, pixels, epsilon, tiles),
        **{"C": channels, "N": count, "BM": rows, "BK": block, "BN": columns},
        PRECISION=products(out.dtype),
        num_warps=4,
        num_stages=2,
    )
    return out, kept


def norm_project_back(
    gradient: Tensor,
    matrix: Tensor,
    x_bhwc: Tensor,
    kept: Normalised,
    gamma: Tensor,
    besides: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, where `besides` is the residual's, and of the norm's weight and bias (2, C).

    Args:
        gradient: of the product, (B, H, W, N).
        matrix: see `norm_project`.
        x_bhwc: see `norm_project`.
        kept: see `norm_project`.
        gamma: the norm's weight.
        besides: added to the gradient of x, (B, H, W, C).
    """
    (count, channels), pixels = matrix.shape, x_bhwc.numel() // x_bhwc.shape[-1]
    block = power_of_two(channels)
    rows = max(16, min(64, 8192 // block))  # 32 sums a thread, of 8 warps
    # A row of the matrix of 4 KiB, times 32, is more than an RTX 4090 has of shared memory.
    step = 32 if block * x_bhwc.element_size() <= 2048 else 16
    programs = ceil_div(pixels, rows)
    of_x = torch.empty_like(x_bhwc)
    of_norm = x_bhwc.new_empty(programs, 2, channels, dtype=torch.float32)
    launch(
        _norm_project_back,
        (programs,),
        *(gradient, matrix, x_bhwc, *kept, gamma, besides, of_x, of_norm, pixels),
        **{"C": channels, "N": count, "BM": rows, "BC": block, "BK": step},
        PRECISION=products(x_bhwc.dtype),
        num_warps=8,
        num_stages=2,
    )
    return of_x, of_norm.sum(0)


def multiply(
    x_bhwk: Tensor,
    matrix: Tensor,
    *,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x · matrixᵀ + residual, or x · matrixᵀ ⊙ (1 + factor).

    Args:
        x_bhwk: (B, H, W, K); pixels may lie further apart than K.
        matrix: (N, K) for all pictures, or (B, N, K), any strides.
        residual: (B, H, W, N), contiguous.
        factor: the same.
        out: where to write, (B, H, W, N); pixels may lie further apart than N.
    """
    batch, height, width, inner = x_bhwk.shape
    count = matrix.shape[-2]
    if out is None:
        out = x_bhwk.new_empty(batch, height, width, count)
    other = residual if factor is None else factor
    own = matrix.ndim == 3
    pictures, pixels = (batch, height * width) if own else (1, batch * height * width)
    rows, columns, widest = _tile(x_bhwk.dtype, inner)
    block = min(power_of_two(inner), widest)
    launch(
        _multiply,
        (ceil_div(pixels, rows), ceil_div(count, columns), pictures),
        *(x_bhwk, matrix, out if other is None else other, out, pixels),
        *(x_bhwk.stride(2), out.stride(2)),
        *(matrix.stride(0) if own else 0, matrix.stride(-2), matrix.stride(-1)),
        **{"K": inner, "N": count, "BM": rows, "BK": block, "BN": columns},
        ADD=residual is not None,
        SCALE=factor is not None,
        PRECISION=products(out.dtype),
        num_warps=4,
        num_stages=3,
    )
    return out


def weight_gradient(
    gradient: Tensor,
    x_bhwk: Tensor,
    *,
    per_picture: bool = False,
    norm: tuple[Normalised, Tensor, Tensor] | None = None,
    halves: int = 0,
    inner: int = 0,
) -> Tensor:
    """Σ over the pixels of gradient ⊗ x, in fp32.

    Args:
        gradient: (B, H, W, N); pixels may lie further apart than N.
        x_bhwk: (B, H, W, K); pixels may lie further apart than K.
        per_picture: one sum for each picture.
        norm: what `norm_project` kept, and the norm's weight and bias: x is normalised first.
        halves: channels that count in each half of N, if the rest of it is padding.
        inner: channels that count of K, if the rest is padding.

    Returns:
        (N, K), or (B, N, K) per picture; without the padding.
    """
    batch, height, width, across = x_bhwk.shape
    count = gradient.shape[-1]
    group, own, inner = count // 2 if halves else count, halves or count, inner or across
    pictures, pixels = (batch, height * width) if per_picture else (1, batch * height * width)
    rows, columns = (64 if count <= 192 else 128), 64
    tiles = ceil_div(count, rows) * ceil_div(across, columns)
    step = 64 if x_bhwk.dtype == torch.bfloat16 else 32
    parts = max(1, min(PROGRAMS // (tiles * pictures), ceil_div(pixels, 4 * step)))
    part = ceil_div(ceil_div(pixels, parts), step) * step
    parts = ceil_div(pixels, part)
    out = x_bhwk.new_empty(pictures, parts, count // group * own, inner, dtype=torch.float32)
    kept, gamma, beta = norm if norm else (Normalised(out, out), out, out)
    launch(
        _weight_gradient,
        (tiles, parts, pictures),
        *(gradient, x_bhwk, *kept, gamma, beta, out, pixels),
        *(gradient.stride(2), x_bhwk.stride(2), part),
        **{"N": count, "K": across, "BN": rows, "BK": columns, "BP": step},
        **{"GROUP": group, "OWN_N": own, "OWN_K": inner},
        NORM=norm is not None,
        PRECISION=products(x_bhwk.dtype),
        num_warps=4 if rows == 64 else 8,
        num_stages=2,
    )
    summed = out.sum(1) if parts > 1 else out[:, 0]
    return summed if per_picture else summed[0]


def _norm_tile(dtype: torch.dtype, channels: int) -> tuple[int, int, int]:
    """Pixels and output channels of a tile, and most input channels that are read at once.

    A product of fp32 needs each number in three parts, so its tiles are smaller.
    """
    if dtype == torch.float32:
        return 32, 32, 64
    return (128 if channels <= 64 else 64), 64, 128


def _tile(dtype: torch.dtype, inner: int) -> tuple[int, int, int]:
    """The same for `multiply`."""
    if dtype == torch.float32:
        return 64, 32, 32
    return (128 if inner <= 64 else 64), 64, 64


def _tiles(programs: int, tiles: int) -> tuple[int, int]:
    """Tiles that one program makes, and programs that share a row of tiles."""
    groups = min(tiles, max(1, ceil_div(PROGRAMS, programs)))
    each = ceil_div(tiles, groups)
    return each, ceil_div(tiles, each)
