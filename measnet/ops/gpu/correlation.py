"""Attention among the channels, without the products around it.

Queries and keys after their depth-wise convolution are never written: the kernel that convolves
them sums their product and their squares over the pixels. What attention and its output projection
do to v is one small matrix for each picture.

A head of more than `WIDEST_TILE` channels does not fit into the memory that the processors of most
cards share. There a program has half of the head's queries and half of its keys, and torch computes
the small matrix.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from measnet.autocast import autocast_off
from measnet.ops.gpu.depthwise import (
    COLUMNS,
    ROWS,
    STAGES,
    WARPS,
    load_columns,
    load_taps,
    slide,
    start_of,
)
from measnet.ops.gpu_library import MULTIPLE, ceil_div, launch, power_of_two, products

WIDEST_TILE = 64
"""Most channels of a head in one kernel: at 65 to 128 it would take up to 224 KiB of shared memory,
and an RTX 4090 has 99."""
LEAST_SQUARE = 1e-24
"""The square of `measnet.ops.attention.EPSILON`."""


class Correlation(NamedTuple):
    """Sums over all pixels of each picture, fp32."""

    gram: Tensor
    """qᵀk, (B, heads, C/heads, C/heads)."""
    squares: Tensor
    """Σ q² and Σ k², (B, 2, C)."""


@triton.jit(do_not_specialize=["B", "H", "W"])
def _correlate(
    q, k, q_kernel, k_kernel, gram, squares, of_gram, of_squares, of_q, of_k,
    B, H, W, step, out_step,
    C: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of this tile of one head; or `BACK`, the gradients of q and k convolved.

    `PARTS`: a program has one part of the queries, and one of the keys, of `PART` channels each.
    """
    picture, row, start = start_of(H, W, R, BW)
    part = tl.program_id(0) - picture * (tl.num_programs(0) // B)
    column = start + tl.arange(0, BW)
    heads = tl.num_programs(1) // (PARTS * PARTS)
    head = tl.program_id(1) // (PARTS * PARTS)
    q_part = tl.program_id(1) // PARTS % PARTS
    k_part = tl.program_id(1) % PARTS
    q_own = q_part * PART + tl.arange(0, BC)
    k_own = k_part * PART + tl.arange(0, BC)
    q_known = (tl.arange(0, BC) < PART) & (q_own < HEAD)
    k_known = (tl.arange(0, BC) < PART) & (k_own < HEAD)
    q_c = head * HEAD + q_own
    k_c = head * HEAD + k_own
    q_taps = load_taps(q_kernel, q_c, q_known)
    k_taps = load_taps(k_kernel, k_c, k_known)
    q_above = tl.zeros([BW, BC], tl.float32)
    q_here = tl.zeros([BW, BC], tl.float32)
    k_above = tl.zeros([BW, BC], tl.float32)
    k_here = tl.zeros([BW, BC], tl.float32)
    dtype = q.dtype.element_ty
    both = q_known[:, None] & k_known[None, :]
    square = q_own[:, None] * HEAD + k_own[None, :]
    if BACK:
        address = of_gram + (picture * heads + head) * HEAD * HEAD + square
        of_product = tl.load(address, mask=both, other=0.0).to(dtype)
        address = of_squares + picture * 2 * C
        of_q_square = tl.load(address + q_c, mask=q_known, other=0.0)[None, :]
        of_k_square = tl.load(address + C + k_c, mask=k_known, other=0.0)[None, :]
    else:
        sums = tl.zeros([BC, BC], tl.float32)
        q_squares = tl.zeros([BW, BC], tl.float32)
        k_squares = tl.zeros([BW, BC], tl.float32)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        beside = load_columns(q, picture, r, column, q_c, q_known, step, H, W)
        query, q_above, q_here = slide(beside, q_above, q_here, q_taps)
        beside = load_columns(k, picture, r, column, k_c, k_known, step, H, W)
        key, k_above, k_here = slide(beside, k_above, k_here, k_taps)
        made = ((i >= 2) & (r - 1 < H) & (column < W))[:, None]
        # Rounded as if they had been written, so that no cosine is above 1.
        query = tl.where(made & q_known[None, :], query, 0.0).to(dtype)
        key = tl.where(made & k_known[None, :], key, 0.0).to(dtype)
        if BACK:
            at = ((picture * H + r - 1) * W + column)[:, None] * out_step
            of_query = tl.dot(key, tl.trans(of_product), input_precision=PRECISION)
            of_query += 2.0 * of_q_square * query.to(tl.float32)
            tl.store(of_q + at + q_c[None, :], of_query.to(dtype), mask=made & q_known[None, :])
            of_key = tl.dot(query, of_product, input_precision=PRECISION)
            of_key += 2.0 * of_k_square * key.to(tl.float32)
            tl.store(of_k + at + k_c[None, :], of_key.to(dtype), mask=made & k_known[None, :])
        else:
            sums = tl.dot(tl.trans(query), key, sums, input_precision=PRECISION)
            q_squares += query.to(tl.float32) * query.to(tl.float32)
            k_squares += key.to(tl.float32) * key.to(tl.float32)
    if not BACK:
        at = part * B + picture
        tl.store(gram + (at * heads + head) * HEAD * HEAD + square, sums, mask=both)
        address = squares + at * 2 * C
        tl.store(address + q_c, tl.sum(q_squares, 0), mask=q_known & (k_part == 0))
        tl.store(address + C + k_c, tl.sum(k_squares, 0), mask=k_known & (q_part == 0))


@triton.jit(do_not_specialize=["H", "W"])
def _correlate_back_half(
    mine, other, my_kernel, other_kernel, of_gram, of_squares, of_mine, H, W, step, out_step,
    C: tl.constexpr, HEAD: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PART: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one half of a head's queries, or of its keys (`KEYS`), after the convolution.

    `mine` are the queries then and `other` the keys, of which it needs both halves; or the reverse.
    """
    picture, row, start = start_of(H, W, R, BW)
    column = start + tl.arange(0, BW)
    heads = tl.num_programs(1) // 2
    head = tl.program_id(1) // 2
    own = tl.program_id(1) % 2 * PART + tl.arange(0, BC)
    first = tl.arange(0, BC)
    second = PART + first
    known = (first < PART) & (own < HEAD)
    first_known = first < PART
    second_known = first_known & (second < HEAD)
    c = head * HEAD + own
    first_c = head * HEAD + first
    second_c = head * HEAD + second
    taps = load_taps(my_kernel, c, known)
    first_taps = load_taps(other_kernel, first_c, first_known)
    second_taps = load_taps(other_kernel, second_c, second_known)
    dtype = mine.dtype.element_ty
    product = of_gram + (picture * heads + head) * HEAD * HEAD
    mine_at = HEAD
    other_at = 1
    if KEYS:
        mine_at = 1
        other_at = HEAD
    address = product + first[:, None] * other_at + own[None, :] * mine_at
    both = first_known[:, None] & known[None, :]
    of_first = tl.load(address, mask=both, other=0.0).to(dtype)
    both = second_known[:, None] & known[None, :]
    of_second = tl.load(address + PART * other_at, mask=both, other=0.0).to(dtype)
    square = of_squares + picture * 2 * C + c
    if KEYS:
        square += C
    above = tl.zeros([BW, BC], tl.float32)
    here = tl.zeros([BW, BC], tl.float32)
    first_above = tl.zeros([BW, BC], tl.float32)
    first_here = tl.zeros([BW, BC], tl.float32)
    second_above = tl.zeros([BW, BC], tl.float32)
    second_here = tl.zeros([BW, BC], tl.float32)
    for i in tl.range(R + 2, num_stages=STAGES):
        r = row + i - 1
        made = ((i >= 2) & (r - 1 < H) & (column < W))[:, None]
        beside = load_columns(mine, picture, r, column, c, known, step, H, W)
        done, above, here = slide(beside, above, here, taps)
        # Loaded in each row, because registers are few; rounded as in the forward pass.
        of_square = 2.0 * tl.load(square, mask=known, other=0.0)[None, :]
        sums = of_square * tl.where(made, done, 0.0).to(dtype).to(tl.float32)
        beside = load_columns(other, picture, r, column, first_c, first_known, step, H, W)
        done, first_above, first_here = slide(beside, first_above, first_here, first_taps)
        done = tl.where(made, done, 0.0).to(dtype)
        sums = tl.dot(done, of_first, sums, input_precision=PRECISION)
        beside = load_columns(other, picture, r, column, second_c, second_known, step, H, W)
        done, second_above, second_here = slide(beside, second_above, second_here, second_taps)
        done = tl.where(made, done, 0.0).to(dtype)
        sums = tl.dot(done, of_second, sums, input_precision=PRECISION)
        at = ((picture * H + r - 1) * W + column)[:, None] * out_step + c[None, :]
        tl.store(of_mine + at, sums.to(dtype), mask=made & known[None, :])


@triton.jit
def _attend(gram, squares, temperature, at, picture, head, own, C, HEAD: tl.constexpr):
    """Of one head: cosines, attention (rows sum to 1), and the norms of q and k."""
    known = own < HEAD
    both = known[:, None] & known[None, :]
    product = tl.load(
        gram + at * HEAD * HEAD + own[:, None] * HEAD + own[None, :], mask=both, other=0.0
    )
    address = squares + picture * 2 * C + head * HEAD + own
    least = 1e-24  # the square of measnet.ops.attention.EPSILON
    q_norm = tl.sqrt(tl.maximum(tl.load(address, mask=known, other=1.0), least))
    k_norm = tl.sqrt(tl.maximum(tl.load(address + C, mask=known, other=1.0), least))
    cosine = product / q_norm[:, None] / k_norm[None, :]
    scaled = tl.where(both, cosine * tl.load(temperature + head), -float("inf"))
    scaled = tl.where(known[:, None], scaled, 0.0)
    power = tl.exp(scaled - tl.max(scaled, 1)[:, None])
    return cosine, power / tl.sum(power, 1)[:, None], q_norm, k_norm


@triton.jit
def _mixer(
    gram, squares, temperature, project, out,
    C: tl.constexpr, HEAD: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[o, j] = Σ_i project[o, i] · attention[i, j] within one head of one picture."""
    picture = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = tl.arange(0, BC)
    known = own < HEAD
    at = picture * tl.num_programs(1) + head
    _, attention, _, _ = _attend(gram, squares, temperature, at, picture, head, own, C, HEAD)
    dtype = out.dtype.element_ty
    c = head * HEAD + own
    for start in range(0, C, BO):
        o = start + tl.arange(0, BO)
        inside = (o < C)[:, None] & known[None, :]
        weight = tl.load(project + o[:, None] * C + c[None, :], mask=inside, other=0.0).to(dtype)
        mixed = tl.dot(weight, attention.to(dtype), input_precision=PRECISION)
        address = out + picture * C * C + o[:, None] * C + c[None, :]
        tl.store(address, mixed.to(dtype), mask=inside)


@triton.jit
def _mixer_back(
    gram, squares, temperature, project, of_mixer, of_gram, of_squares, of_temperature, of_project,
    C: tl.constexpr, HEAD: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """From the gradient of the matrix: those of the sums, the temperature and the projection."""
    picture = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    own = tl.arange(0, BC)
    known = own < HEAD
    both = known[:, None] & known[None, :]
    at = picture * tl.num_programs(1) + head
    cosine, attention, q_norm, k_norm = _attend(
        gram, squares, temperature, at, picture, head, own, C, HEAD
    )
    c = head * HEAD + own
    of_attention = tl.zeros([BC, BC], tl.float32)
    for start in range(0, C, BO):
        o = start + tl.arange(0, BO)
        inside = (o < C)[:, None] & known[None, :]
        here = o[:, None] * C + c[None, :]
        weight = tl.load(project + here, mask=inside, other=0.0).to(tl.float32)
        wanted = tl.load(of_mixer + picture * C * C + here, mask=inside, other=0.0)
        of_attention = tl.dot(tl.trans(weight), wanted, of_attention, input_precision="tf32x3")
        given = tl.dot(wanted, tl.trans(attention), input_precision="tf32x3")
        tl.store(of_project + picture * C * C + here, given, mask=inside)
    of_attention = tl.where(both, of_attention, 0.0)
    along = tl.sum(of_attention * attention, 1)
    of_scaled = tl.where(both, attention * (of_attention - along[:, None]), 0.0)
    tl.store(of_temperature + at, tl.sum(tl.sum(of_scaled * cosine, 1), 0))
    of_cosine = of_scaled * tl.load(temperature + head)
    of_product = of_cosine / q_norm[:, None] / k_norm[None, :]
    tl.store(of_gram + at * HEAD * HEAD + own[:, None] * HEAD + own[None, :], of_product, mask=both)
    # d cos / d Σq² = −cos / (2 Σq²); where the norm is held at its least value there is none.
    least = 1e-24
    q_square = q_norm * q_norm
    k_square = k_norm * k_norm
    of_q = tl.where(q_square > least, -0.5 * tl.sum(of_cosine * cosine, 1) / q_square, 0.0)
    of_k = tl.where(k_square > least, -0.5 * tl.sum(of_cosine * cosine, 0) / k_square, 0.0)
    address = of_squares + picture * 2 * C + c
    tl.store(address, of_q, mask=known)
    tl.store(address + C, of_k, mask=known)


def correlate(
    q_bhwc: Tensor, k_bhwc: Tensor, q_kernel: Tensor, k_kernel: Tensor, heads: int
) -> Correlation:
    """Product and squares of q and k, convolved first, over all pixels of each picture.

    Args:
        q_bhwc: (B, H, W, C); pixels may lie further apart than C.
        k_bhwc: the same, with its pixels as far apart.
        q_kernel: (C, 9) fp32, contiguous.
        k_kernel: the same.
        heads: they split the channels.
    """
    batch, _, _, channels = q_bhwc.shape
    head = channels // heads
    parts = _tiles(q_bhwc)
    gram = q_bhwc.new_empty(parts, batch, heads, head, head, dtype=torch.float32)
    squares = q_bhwc.new_empty(parts, batch, 2, channels, dtype=torch.float32)
    planes = (q_bhwc, k_bhwc, q_kernel, k_kernel)
    unused = (gram, squares, q_bhwc, k_bhwc)
    _launch_correlate(planes, (gram, squares), unused, heads, q_bhwc.stride(2), back=False)
    return Correlation(gram.sum(0), squares.sum(0))


def correlate_back(
    q_bhwc: Tensor,
    k_bhwc: Tensor,
    q_kernel: Tensor,
    k_kernel: Tensor,
    gradient: Correlation,
    of_q: Tensor,
    of_k: Tensor,
) -> None:
    """Write the gradients of q and k after their convolution.

    Args:
        q_bhwc: see `correlate`.
        k_bhwc: see `correlate`.
        q_kernel: see `correlate`.
        k_kernel: see `correlate`.
        gradient: of what `correlate` gave.
        of_q: (B, H, W, C); pixels may lie further apart than C.
        of_k: the same, with its pixels as far apart.
    """
    planes = (q_bhwc, k_bhwc, q_kernel, k_kernel)
    _, heads, head, _ = gradient.gram.shape
    if head > WIDEST_TILE:
        queries, keys = (q_bhwc, q_kernel, of_q), (k_bhwc, k_kernel, of_k)
        _back_by_halves(queries, keys, gradient, of_keys=False)
        _back_by_halves(keys, queries, gradient, of_keys=True)
        return
    to = (*gradient, of_q, of_k)
    _launch_correlate(planes, gradient, to, heads, of_q.stride(2), back=True)


def mixer(
    sums: Correlation, temperature: Tensor, project_out: Tensor, dtype: torch.dtype
) -> Tensor:
    """What attention and its output projection do to v, one matrix a picture: (B, C out, C of v).

    Args:
        sums: of queries and keys.
        temperature: (heads, 1, 1) fp32.
        project_out: (C, C) fp32.
        dtype: of the result.
    """
    batch, heads, head, _ = sums.gram.shape
    channels = len(project_out)
    if head > WIDEST_TILE:
        with autocast_off(project_out):
            attention = _attention(sums, temperature).attention
            weight = project_out.view(channels, heads, head).permute(1, 0, 2)
            mixed = (weight @ attention).transpose(1, 2)
        return mixed.reshape(batch, channels, channels).to(dtype)
    out = project_out.new_empty(batch, channels, channels, dtype=dtype)
    launch(
        _mixer,
        (batch, heads),
        *(*sums, temperature, project_out, out),
        **{"C": channels, "HEAD": head, "BC": power_of_two(head), "BO": 64},
        PRECISION=products(dtype),
        num_warps=4,
    )
    return out


def mixer_back(
    sums: Correlation, temperature: Tensor, project_out: Tensor, of_mixer: Tensor
) -> tuple[Correlation, Tensor, Tensor]:
    """Gradients of the sums, the temperature and the projection, from (B, C, C) fp32."""
    batch, heads, head, _ = sums.gram.shape
    channels = len(project_out)
    if head > WIDEST_TILE:
        with autocast_off(project_out):
            return _wide_mixer_back(sums, temperature, project_out, of_mixer)
    of_sums = Correlation(*(torch.empty_like(one) for one in sums))
    of_temperature = temperature.new_empty(batch, heads, 1, 1)
    of_project = project_out.new_empty(batch, channels, channels)
    launch(
        _mixer_back,
        (batch, heads),
        *(*sums, temperature, project_out, of_mixer, *of_sums, of_temperature, of_project),
        **{"C": channels, "HEAD": head, "BC": power_of_two(head), "BO": 32},
        num_warps=8,
    )
    return of_sums, of_temperature.sum(0), of_project.sum(0)


class _Attention(NamedTuple):
    """Of each head of each picture: (B, heads, C/heads, C/heads), and norms (B, heads, C/heads)."""

    cosine: Tensor
    attention: Tensor
    """Its rows sum to 1."""
    q_norm: Tensor
    k_norm: Tensor


def _attention(sums: Correlation, temperature: Tensor) -> _Attention:
    """What the kernels' `_attend` computes, by torch."""
    batch, heads, head, _ = sums.gram.shape
    norms = sums.squares.clamp(min=LEAST_SQUARE).sqrt().view(batch, 2, heads, head)
    q_norm, k_norm = norms.unbind(1)
    cosine = sums.gram / q_norm[..., None] / k_norm[..., None, :]
    return _Attention(cosine, (cosine * temperature).softmax(-1), q_norm, k_norm)


def _wide_mixer_back(
    sums: Correlation, temperature: Tensor, project_out: Tensor, of_mixer: Tensor
) -> tuple[Correlation, Tensor, Tensor]:
    """What `_mixer_back` computes, by torch."""
    batch, heads, head, _ = sums.gram.shape
    channels = len(project_out)
    cosine, attention, *norms = _attention(sums, temperature)
    weight = project_out.view(channels, heads, head).permute(1, 2, 0)
    wanted = of_mixer.view(batch, channels, heads, head).transpose(1, 2)
    of_attention = weight @ wanted
    of_project = (wanted @ attention.transpose(-1, -2)).sum(0).transpose(0, 1)
    along = (of_attention * attention).sum(-1, keepdim=True)
    of_scaled = attention * (of_attention - along)
    of_temperature = (of_scaled * cosine).sum((0, 2, 3)).view(heads, 1, 1)
    of_cosine = of_scaled * temperature
    of_gram = of_cosine / norms[0][..., None] / norms[1][..., None, :]
    # d cos / d Σq² = −cos / (2 Σq²); where the norm is held at its least value there is none.
    both = of_cosine * cosine
    of_squares = torch.stack([both.sum(-1), both.sum(-2)], 1).flatten(2)
    squares = torch.stack(norms, 1).flatten(2).square()
    of_squares = torch.where(squares > LEAST_SQUARE, -0.5 * of_squares / squares, 0.0)
    return Correlation(of_gram, of_squares), of_temperature, of_project.reshape_as(project_out)


def _tiles(x_bhwc: Tensor) -> int:
    """Tiles of one picture."""
    return ceil_div(x_bhwc.shape[1], ROWS) * ceil_div(x_bhwc.shape[2], COLUMNS)


def _launch_correlate(
    planes: tuple[Tensor, Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: int,
    out_step: int,
    *,
    back: bool,
) -> None:
    x = planes[0]
    batch, height, width, channels = x.shape
    head = channels // heads
    parts = 1 if head <= WIDEST_TILE else 2
    part = _part(head, parts)
    launch(
        _correlate,
        (batch * _tiles(x), heads * parts * parts),
        *(*planes, *sums, *gradients, batch, height, width, x.stride(2), out_step),
        **{"C": channels, "HEAD": head, "R": ROWS, "BW": COLUMNS, "BC": power_of_two(part)},
        **{"PARTS": parts, "PART": part, "STAGES": STAGES},
        BACK=back,
        PRECISION=_precision(x, back=back),
        num_warps=WARPS,
    )


def _back_by_halves(
    mine: tuple[Tensor, Tensor, Tensor],
    other: tuple[Tensor, Tensor, Tensor],
    gradient: Correlation,
    *,
    of_keys: bool,
) -> None:
    """Write the gradient of `mine`, which are the keys or, without `of_keys`, the queries.

    Both are features, the convolution's kernel, and where the gradient goes.
    """
    x, my_kernel, of_mine = mine
    batch, height, width, channels = x.shape
    _, heads, head, _ = gradient.gram.shape
    part = _part(head, 2)
    launch(
        _correlate_back_half,
        (batch * _tiles(x), 2 * heads),
        *(x, other[0], my_kernel, other[1], *gradient, of_mine),
        *(height, width, x.stride(2), of_mine.stride(2)),
        **{"C": channels, "HEAD": head, "R": ROWS, "BW": COLUMNS, "BC": power_of_two(part)},
        **{"PART": part, "KEYS": of_keys, "STAGES": STAGES},
        PRECISION=_precision(x, back=True),
        num_warps=WARPS,
    )


def _part(head: int, parts: int) -> int:
    """Channels of a part of a head; the last part may have fewer."""
    return ceil_div(ceil_div(head, parts), MULTIPLE) * MULTIPLE


def _precision(x: Tensor, *, back: bool) -> str:
    # Back, a product in three parts would not fit into the memory that an RTX 4090 shares.
    return "ieee" if back and x.dtype == torch.float32 else products(x.dtype)
