"""A library of expert MLPs: C → hidden → C with GELU, weighted by gates, all experts in one kernel.

out[p] = Σ_n gate[p, n] · (gelu(x[p] · W_in[n]ᵀ + b_in[n]) · W_out[n] + b_out[n])

Hidden values are never written. A program has a tile of pixels and goes through the hidden channels
of all experts; where no pixel of the tile chose an expert, its hidden channels are skipped. So a
picture pays only for the experts that it chose, and the host need not know which.

Where each pixel chooses for itself, nearly every tile of neighbours has a pixel of each expert. If
there are many experts, a tile is made of pixels that chose the same ones: the kernels go through
the pixels in an order by choice, and read and write each where it lies.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu.depthwise import gelu, gelu_slope
from measnet.ops.gpu.products import weight_gradient
from measnet.ops.gpu_library import ceil_div, feature_dtype, launch, power_of_two, products

HIDDEN = {torch.bfloat16: 32, torch.float32: 16}
"""Hidden channels of a tile. Each expert's are padded to a multiple of it."""
PROGRAMS = 512
"""Programs that sum the gradients of weights; not taken from the card, so that sums repeat."""
SORT_FROM = 3
"""Pixels are sorted if there are so many times more experts than a pixel chooses. The products that
this saves are counted, not measured: `bench/gpu.py --sections operations` has both ways."""


class Layout(NamedTuple):
    """Where the experts' hidden channels lie, each expert's padded to whole tiles."""

    starts: Tensor
    """First tile of each expert, and the end of the last, (N + 1,) int32."""
    owners: Tensor
    """Expert of each tile, (tiles,) int32."""
    packed: Tensor
    """Source row of each padded row; the count of source rows where there is none."""
    places: Tensor
    """Padded row of each source row."""


@cache
def layout(widths: tuple[int, ...], tile: int, device: torch.device) -> Layout:
    """For experts of `widths` hidden channels, one after the other, in tiles of `tile`."""
    packed: list[int] = []
    places: list[int] = []
    owners: list[int] = []
    starts = [0]
    hidden = sum(widths)
    for expert, width in enumerate(widths):
        places += range(len(packed), len(packed) + width)
        packed += range(len(places) - width, len(places))
        packed += [hidden] * (-width % tile)
        starts.append(len(packed) // tile)
        owners += [expert] * (starts[-1] - starts[-2])
    short = [torch.tensor(one, dtype=torch.int32, device=device) for one in (starts, owners)]
    long = [torch.tensor(one, device=device) for one in (packed, places)]
    return Layout(*short, *long)


def pack(
    dtype: torch.dtype,
    where: Layout,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights as the kernels read them: padded to whole tiles, matrices in `dtype`."""
    into, bias, back = (
        torch.cat([one, one.new_zeros(1, *one.shape[1:])]).index_select(0, where.packed)
        for one in (weight_in, bias_in, weight_out)
    )
    return into.to(dtype), bias.float(), back.to(dtype), bias_out.float().contiguous()


@triton.jit
def any_chosen(gate):
    """Whether a pixel of the tile has a gate other than 0. NaN is other: damage is not hidden."""
    return tl.max((gate != 0.0).to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=["span"])
def _forward(
    x, gates, residual, w_in, b_in, w_out, b_out, starts, order, out, pixels, span,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    SORTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The experts' weighted sum for a tile of pixels, plus the residual."""
    # Rows after the last are the last once more: they write what it writes, and need no mask,
    # which would take registers.
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rows = tl.minimum(rows, pixels - 1)
    if SORTED:
        rows = tl.load(order + rows)
    c = tl.arange(0, BC)
    known = (c < C)[None, :]
    at = rows[:, None] * C + c[None, :]
    features = tl.load(x + at, mask=known, other=0.0)
    sums = tl.load(residual + at, mask=known, other=0.0).to(tl.float32)
    for n in range(N):
        gate = tl.load(gates + (rows // span) * N + n)
        if any_chosen(gate):
            bias = tl.load(b_out + n * C + c, mask=c < C, other=0.0).to(tl.float32)
            sums += gate[:, None] * bias[None, :]
            for tile in range(tl.load(starts + n), tl.load(starts + n + 1)):
                h = tile * BH + tl.arange(0, BH)
                address = w_in + h[None, :] * C + c[:, None]
                weight = tl.load(address, mask=(c < C)[:, None], other=0.0)
                hidden = tl.dot(features, weight, input_precision=PRECISION)
                hidden = gelu(hidden + tl.load(b_in + h)[None, :]) * gate[:, None]
                address = w_out + h[:, None] * C + c[None, :]
                weight = tl.load(address, mask=(c < C)[None, :], other=0.0)
                hidden = hidden.to(features.dtype)
                sums = tl.dot(hidden, weight, sums, input_precision=PRECISION)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=["span"])
def _backward(
    x, gates, gradient, w_in, b_in, w_out, b_out, starts, order, of_x, of_gates, pixels, span,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    SORTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the features and, for each pixel, of the gates."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rows = tl.minimum(rows, pixels - 1)  # as in `_forward`
    if SORTED:
        rows = tl.load(order + rows)
    c = tl.arange(0, BC)
    known = (c < C)[None, :]
    at = rows[:, None] * C + c[None, :]
    features = tl.load(x + at, mask=known, other=0.0)
    wanted = tl.load(gradient + at, mask=known, other=0.0)
    sums = tl.zeros([BM, BC], tl.float32)
    for n in range(N):
        gate = tl.load(gates + (rows // span) * N + n)
        of_gate = tl.zeros([BM], tl.float32)
        if any_chosen(gate):
            bias = tl.load(b_out + n * C + c, mask=c < C, other=0.0).to(tl.float32)
            of_gate += tl.sum(wanted.to(tl.float32) * bias[None, :], 1)
            for tile in range(tl.load(starts + n), tl.load(starts + n + 1)):
                h = tile * BH + tl.arange(0, BH)
                address = w_in + h[None, :] * C + c[:, None]
                weight = tl.load(address, mask=(c < C)[:, None], other=0.0)
                hidden = tl.dot(features, weight, input_precision=PRECISION)
                hidden += tl.load(b_in + h)[None, :]
                address = w_out + h[None, :] * C + c[:, None]
                weight = tl.load(address, mask=(c < C)[:, None], other=0.0)
                of_hidden = tl.dot(wanted, weight, input_precision=PRECISION)
                of_gate += tl.sum(gelu(hidden) * of_hidden, 1)
                of_hidden = of_hidden * gate[:, None] * gelu_slope(hidden)
                address = w_in + h[:, None] * C + c[None, :]
                weight = tl.load(address, mask=(c < C)[None, :], other=0.0)
                of_hidden = of_hidden.to(features.dtype)
                sums = tl.dot(of_hidden, weight, sums, input_precision=PRECISION)
        tl.store(of_gates + rows * N + n, of_gate)
    tl.store(of_x + at, sums.to(of_x.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels"], do_not_specialize_on_alignment=["span"])
def _weights_backward(
    x, gates, gradient, w_in, b_in, w_out, owners, order, of_w_in, of_b_in, of_w_out,
    pixels, span, part, apart,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    SORTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of hidden channels, over one part of the pixels."""
    tile = tl.program_id(0)
    h = tile * BH + tl.arange(0, BH)
    c = tl.arange(0, BC)
    n = tl.load(owners + tile)
    of_in = tl.zeros([BH, BC], tl.float32)
    of_out = tl.zeros([BH, BC], tl.float32)
    of_bias = tl.zeros([BH], tl.float32)
    bias = tl.load(b_in + h)[None, :]
    weight_in = tl.load(w_in + h[None, :] * C + c[:, None], mask=(c < C)[:, None], other=0.0)
    weight_out = tl.load(w_out + h[None, :] * C + c[:, None], mask=(c < C)[:, None], other=0.0)
    gradient += n.to(tl.int64) * apart
    start = tl.program_id(1) * part
    for step in range(0, part, BM):
        rows = start.to(tl.int64) + step + tl.arange(0, BM)
        inside = (rows < pixels) & (rows < start + part)
        if SORTED:
            rows = tl.load(order + rows, mask=inside, other=0)
        gate = tl.load(gates + (rows // span) * N + n, mask=inside, other=0.0)
        if any_chosen(gate):
            known = inside[:, None] & (c < C)[None, :]
            at = rows[:, None] * C + c[None, :]
            features = tl.load(x + at, mask=known, other=0.0)
            known = known & (gate != 0.0)[:, None]
            wanted = tl.load(gradient + at, mask=known, other=0.0)
            hidden = tl.dot(features, weight_in, input_precision=PRECISION) + bias
            of_hidden = tl.dot(wanted, weight_out, input_precision=PRECISION)
            active = (gelu(hidden) * gate[:, None]).to(features.dtype)
            of_out = tl.dot(tl.trans(active), wanted, of_out, input_precision=PRECISION)
            of_hidden = of_hidden * gate[:, None] * gelu_slope(hidden)
            of_bias += tl.sum(of_hidden, 0)
            of_hidden = tl.trans(of_hidden.to(features.dtype))
            of_in = tl.dot(of_hidden, features, of_in, input_precision=PRECISION)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * BH + h
    at = row[:, None] * C + c[None, :]
    tl.store(of_w_in + at, of_in, mask=(c < C)[None, :])
    tl.store(of_w_out + at, of_out, mask=(c < C)[None, :])
    tl.store(of_b_in + row, of_bias)


def mixture(
    x: Tensor,
    gates: Tensor,
    residual: Tensor,
    widths: tuple[int, ...],
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    top_k: int | None = None,
) -> Tensor:
    """residual + the experts' weighted sum.

    Args:
        x: (..., C), what the experts see.
        gates: (P, N) fp32 for the P pixels of x, or (B, N) for its pictures; 0 where an expert is
            not chosen.
        residual: (..., C).
        widths: hidden channels of each expert.
        weight_in: (sum of widths, C), one expert after the other.
        bias_in: (sum of widths,).
        weight_out: (sum of widths, C), transposed as `weight_in` is.
        bias_out: (N, C).
        top_k: K, if each pixel chose for itself.
    """
    dtype = feature_dtype(x)
    inputs = (x.to(dtype), gates, residual.to(dtype), widths)
    apart = top_k is not None and sorts(top_k, len(widths))
    order = by_choice(gates.detach()) if apart else None
    out: Tensor = _Mixture.apply(*inputs, weight_in, bias_in, weight_out, bias_out, order)
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        residual: Tensor,
        widths: tuple[int, ...],
        weight_in: Tensor,
        bias_in: Tensor,
        weight_out: Tensor,
        bias_out: Tensor,
        order: Tensor | None,
    ) -> Tensor:
        x, gates, residual = x.contiguous(), gates.contiguous(), residual.contiguous()
        where = layout(widths, HIDDEN[x.dtype], x.device)
        weights = pack(x.dtype, where, weight_in, bias_in, weight_out, bias_out)
        out = torch.empty_like(x)
        pixels = x.numel() // x.shape[-1]
        sizes = tile_sizes(x, len(widths), 64) | ({"num_warps": 4} if x.shape[-1] <= 64 else {})
        launch(
            _forward,
            (ceil_div(pixels, sizes["BM"]),),
            *(x, gates, residual, *weights, where.starts, gates if order is None else order, out),
            *(pixels, pixels // len(gates)),
            SORTED=order is not None,
            **sizes,
        )
        ctx.save_for_backward(x, gates, order, *weights)
        ctx.widths = widths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, order, into, bias, back, bias_out = ctx.saved_tensors
        gradient = gradient.contiguous()
        where = layout(ctx.widths, HIDDEN[x.dtype], x.device)
        pixels, experts = x.numel() // x.shape[-1], len(ctx.widths)
        span = pixels // len(gates)
        of_x = torch.empty_like(x)
        of_gates = x.new_empty(pixels, experts, dtype=torch.float32)
        sizes = tile_sizes(x, experts, 32)
        given = (x, gates, gradient, into, bias, back)
        launch(
            _backward,
            (ceil_div(pixels, sizes["BM"]),),
            *(*given, bias_out, where.starts, gates if order is None else order, of_x, of_gates),
            *(pixels, span),
            SORTED=order is not None,
            **sizes,
        )
        of_weights = weight_gradients(
            x, gates, gradient, (into, bias, back), where, experts, order=order
        )
        of_bias_out = _bias_gradient(gates, gradient)
        if span > 1:
            of_gates = of_gates.view(len(gates), span, experts).sum(1)
        return of_x, of_gates, gradient, None, *of_weights, of_bias_out, None


def weight_gradients(
    x: Tensor,
    gates: Tensor,
    gradient: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    where: Layout,
    experts: int,
    apart: int = 0,
    order: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `weight_in`, `bias_in` and `weight_out`, as `mixture` takes them, in fp32.

    Args:
        x: what the experts see, (..., C), contiguous.
        gates: see `mixture`.
        gradient: of the weighted sum; or of each expert's output, one after the other.
        weights: the first three of `pack`.
        where: their layout.
        experts: N.
        apart: elements from one expert's gradient to the next; 0: all have the same. Where a gate
            is 0 the gradient is not read.
        order: of the pixels, see `by_choice`.
    """
    into, bias, _ = weights
    pixels, tiles = x.numel() // x.shape[-1], len(where.owners)
    sizes = tile_sizes(x, experts, 32)
    parts = max(1, min(PROGRAMS // tiles, ceil_div(pixels, 4 * sizes["BM"])))
    part = ceil_div(ceil_div(pixels, parts), sizes["BM"]) * sizes["BM"]
    parts = ceil_div(pixels, part)
    of_in, of_out = (x.new_empty(parts, *into.shape, dtype=torch.float32) for _ in range(2))
    of_bias = bias.new_empty(parts, *bias.shape)
    launch(
        _weights_backward,
        (tiles, parts),
        *(x, gates, gradient, *weights, where.owners, gates if order is None else order),
        *(of_in, of_bias, of_out, pixels, pixels // len(gates), part, apart),
        SORTED=order is not None,
        **sizes,
    )
    return tuple(one.sum(0)[where.places] for one in (of_in, of_bias, of_out))


def sorts(top_k: int, experts: int) -> bool:
    """Whether pixels are sorted by their choice."""
    return experts >= SORT_FROM * top_k


def by_choice(gates: Tensor) -> Tensor:
    """An order in which pixels that chose the same experts follow each other, (P,) int64.

    Args:
        gates: (P, N); 0 where an expert is not chosen.
    """
    experts = gates.shape[1]
    kind = torch.int32 if experts < 32 else torch.int64  # fewer bits are sorted in fewer passes
    bits = torch.ones((), dtype=kind, device=gates.device) << torch.arange(
        experts, dtype=kind, device=gates.device
    )
    chosen = torch.where(gates != 0, bits, 0).sum(1, dtype=kind)
    return chosen.argsort(stable=True)


def _bias_gradient(gates: Tensor, gradient: Tensor) -> Tensor:
    """Σ gate ⊗ gradient over the pixels, (N, C) fp32."""
    flat = gradient.flatten(0, -2)
    if len(gates) != len(flat):
        flat = flat.unflatten(0, (len(gates), -1)).sum(1, dtype=torch.float32)
        return gates.t() @ flat
    # Not by torch, which sums products of bf16 over many pixels in bf16, or copies the features.
    picture = (1, 1, len(flat), -1)
    return weight_gradient(gates.to(flat.dtype).view(picture), flat.view(picture))


def tile_sizes(x: Tensor, experts: int, rows: int) -> dict[str, Any]:
    """Constants of a kernel; `rows` pixels of 128 channels in a tile, more of fewer."""
    channels = x.shape[-1]
    block = power_of_two(channels)
    most = 64 if x.dtype == torch.float32 else 128
    rows = max(16, min(most, rows * 128 // block))
    if x.dtype == torch.float32:
        rows = max(16, rows // (2 if block <= 64 else 4))
    return {
        **{"C": channels, "N": experts, "BM": rows, "BC": block, "BH": HIDDEN[x.dtype]},
        **{"PRECISION": products(x.dtype), "num_warps": 8, "num_stages": 2},
    }
