"""A library of expert MLPs averaged in log space: the ensemble of the released program.

out[p] = log Σ_n gate[p, n] · exp(E_n(x[p])), each E_n an MLP C → hidden → C with GELU

Each expert's output is summed completely, then taken into a running log-sum-exp. Neither hidden
values nor the experts' outputs are written in the forward pass. As in `experts`, an expert that no
pixel of a tile chose is skipped there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu.depthwise import gelu, gelu_slope
from measnet.ops.gpu.experts import HIDDEN, layout, pack, tile_sizes, weight_gradients
from measnet.ops.gpu_library import ceil_div, feature_dtype, launch

LEAST = tl.constexpr(-3.0e38)
"""The running maximum before the first expert: finite, so that no difference is NaN."""


@triton.jit
def _chosen(log_gate):
    """Whether any of the gates is not 0; its logarithm may be NaN, which is not hidden."""
    return tl.max((log_gate != -float("inf")).to(tl.int32), 0) > 0


@triton.jit
def _output(
    features, w_in, b_in, w_out, b_out, starts, n,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of expert n for a tile of pixels, fp32."""
    c = tl.arange(0, BC)
    bias = tl.load(b_out + n * C + c, mask=c < C, other=0.0)
    sums = tl.zeros([BM, BC], tl.float32) + bias[None, :]
    for tile in range(tl.load(starts + n), tl.load(starts + n + 1)):
        h = tile * BH + tl.arange(0, BH)
        weight = tl.load(w_in + h[None, :] * C + c[:, None], mask=(c < C)[:, None], other=0.0)
        hidden = tl.dot(features, weight, input_precision=PRECISION)
        hidden = gelu(hidden + tl.load(b_in + h)[None, :]).to(features.dtype)
        weight = tl.load(w_out + h[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
        sums = tl.dot(hidden, weight, sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["pixels"])
def _log_forward(
    x, log_gates, residual, w_in, b_in, w_out, b_out, starts, out, total, pixels, underflow, floor,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The ensemble of a tile of pixels, plus the residual."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    known = inside[:, None] & (c < C)[None, :]
    at = rows[:, None] * C + c[None, :]
    features = tl.load(x + at, mask=known, other=0.0)
    most = tl.zeros([BM, BC], tl.float32) + LEAST
    sums = tl.zeros([BM, BC], tl.float32)
    for n in range(N):
        log_gate = tl.load(log_gates + rows * N + n, mask=inside, other=-float("inf"))
        if _chosen(log_gate):
            term = _output(features, w_in, b_in, w_out, b_out, starts, n, C, BM, BC, BH, PRECISION)
            term += log_gate[:, None]
            now = tl.maximum(most, term)
            sums = sums * tl.exp(most - now) + tl.exp(term - now)
            most = now
    result = most + tl.log(sums)
    if KEEP:
        tl.store(total + at, result, mask=known)
    result = tl.where(result < underflow, floor, result)
    result += tl.load(residual + at, mask=known, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["pixels"])
def _log_backward(
    x, log_gates, gradient, total, w_in, b_in, w_out, b_out, starts,
    of_x, of_log_gates, of_outputs, of_b_out, pixels, apart, underflow,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the features, the gates' logarithms, and each chosen expert's output."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = rows < pixels
    known = inside[:, None] & (c < C)[None, :]
    at = rows[:, None] * C + c[None, :]
    features = tl.load(x + at, mask=known, other=0.0)
    result = tl.load(total + at, mask=known, other=0.0)
    wanted = tl.load(gradient + at, mask=known, other=0.0).to(tl.float32)
    wanted = tl.where(result < underflow, 0.0, wanted)  # the floor is a constant
    sums = tl.zeros([BM, BC], tl.float32)
    for n in range(N):
        log_gate = tl.load(log_gates + rows * N + n, mask=inside, other=-float("inf"))
        of_log_gate = tl.zeros([BM], tl.float32)
        of_bias = tl.zeros([BC], tl.float32)
        if _chosen(log_gate):
            term = _output(features, w_in, b_in, w_out, b_out, starts, n, C, BM, BC, BH, PRECISION)
            # The expert's share of the sum; 0 for a pixel that did not choose it.
            of_output = wanted * tl.exp(term + log_gate[:, None] - result)
            of_log_gate += tl.sum(of_output, 1)
            of_bias += tl.sum(of_output, 0)
            rounded = of_output.to(features.dtype)
            tl.store(of_outputs + at, rounded, mask=known)
            for tile in range(tl.load(starts + n), tl.load(starts + n + 1)):
                h = tile * BH + tl.arange(0, BH)
                address = w_in + h[None, :] * C + c[:, None]
                weight = tl.load(address, mask=(c < C)[:, None], other=0.0)
                hidden = tl.dot(features, weight, input_precision=PRECISION)
                hidden += tl.load(b_in + h)[None, :]
                address = w_out + h[None, :] * C + c[:, None]
                weight = tl.load(address, mask=(c < C)[:, None], other=0.0)
                of_hidden = tl.dot(rounded, weight, input_precision=PRECISION)
                of_hidden = (of_hidden * gelu_slope(hidden)).to(features.dtype)
                address = w_in + h[:, None] * C + c[None, :]
                weight = tl.load(address, mask=(c < C)[None, :], other=0.0)
                sums = tl.dot(of_hidden, weight, sums, input_precision=PRECISION)
        tl.store(of_log_gates + rows * N + n, of_log_gate, mask=inside)
        part = of_b_out + (tl.program_id(0).to(tl.int64) * N + n) * C + c
        tl.store(part, of_bias, mask=c < C)
        of_outputs += apart  # in steps, because n · apart may exceed int32
    tl.store(of_x + at, sums.to(of_x.dtype.element_ty), mask=known)


def log_mixture(
    x: Tensor,
    log_gates: Tensor,
    residual: Tensor,
    widths: tuple[int, ...],
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    limits: tuple[float, float],
) -> Tensor:
    """residual + log Σ_n exp(log_gates[n] + E_n(x)).

    Args:
        x: (..., C), what the experts see.
        log_gates: (P, N) fp32 for the P pixels of x; -inf where an expert is not chosen. Each pixel
            has chosen at least one.
        residual: (..., C).
        widths: hidden channels of each expert; the weights are those of `experts.mixture`.
        weight_in: (sum of widths, C).
        bias_in: (sum of widths,).
        weight_out: (sum of widths, C).
        bias_out: (N, C).
        limits: below the first, the ensemble gives the second, a constant.
    """
    dtype = feature_dtype(x)
    keep = torch.is_grad_enabled()  # inside the function it is always off
    inputs = (x.to(dtype), log_gates.float(), residual.to(dtype), widths, limits, keep)
    out: Tensor = _LogMixture.apply(*inputs, weight_in, bias_in, weight_out, bias_out)
    return out


class _LogMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_gates: Tensor,
        residual: Tensor,
        widths: tuple[int, ...],
        limits: tuple[float, float],
        keep: bool,
        *weights: Tensor,
    ) -> Tensor:
        x, log_gates, residual = x.contiguous(), log_gates.contiguous(), residual.contiguous()
        where = layout(widths, HIDDEN[x.dtype], x.device)
        packed = pack(x.dtype, where, *weights)
        out = torch.empty_like(x)
        total = torch.empty_like(x, dtype=torch.float32) if keep else out
        pixels, sizes = x.numel() // x.shape[-1], tile_sizes(x, len(widths), 32)
        launch(
            _log_forward,
            (ceil_div(pixels, sizes["BM"]),),
            *(x, log_gates, residual, *packed, where.starts, out, total, pixels, *limits),
            **(sizes | {"KEEP": keep}),
        )
        ctx.save_for_backward(x, log_gates, total, *packed)
        ctx.widths, ctx.underflow = widths, limits[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, log_gates, total, *packed = ctx.saved_tensors
        gradient = gradient.contiguous()
        where = layout(ctx.widths, HIDDEN[x.dtype], x.device)
        pixels, experts = x.numel() // x.shape[-1], len(ctx.widths)
        sizes = tile_sizes(x, experts, 32)
        programs = ceil_div(pixels, sizes["BM"])
        of_x, of_log_gates = torch.empty_like(x), torch.empty_like(log_gates)
        of_outputs = x.new_empty(experts, *x.shape)
        of_bias_out = total.new_empty(programs, experts, x.shape[-1])
        launch(
            _log_backward,
            (programs,),
            *(x, log_gates, gradient, total, *packed, where.starts),
            *(of_x, of_log_gates, of_outputs, of_bias_out, pixels, x.numel(), ctx.underflow),
            **sizes,
        )
        # The gates are in the outputs' gradients already: 1 for the chosen.
        chosen = (log_gates != -torch.inf).float()
        three = (packed[0], packed[1], packed[2])
        of_weights = weight_gradients(x, chosen, of_outputs, three, where, experts, x.numel())
        return of_x, of_log_gates, gradient, None, None, None, *of_weights, of_bias_out.sum(0)
