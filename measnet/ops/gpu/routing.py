"""The gate of the pixel experts: logits, softmax, top-K, and what the balance loss sums (Eq. 2-5).

One kernel reads the features once. Of two experts with the same probability it takes the one with
the lower number.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu_library import ceil_div, feature_dtype, launch, power_of_two, products


class Gates(NamedTuple):
    """What each pixel chose."""

    gates: Tensor
    """Probabilities of the chosen, 0 elsewhere: (P, N) fp32."""
    probability: Tensor
    """Summed over the pixels of each picture, (B, N) fp32."""
    counts: Tensor
    """Pixels of each picture that chose expert n, (B, N) fp32; without a gradient."""


@triton.jit
def _load(x, weight, rows, inside, c, n, C: tl.constexpr, N: tl.constexpr):
    """Some channels of a tile of pixels, and their rows of the weights; fp32."""
    known = inside[:, None] & (c < C)[None, :]
    features = tl.load(x + rows[:, None] * C + c[None, :], mask=known, other=0.0).to(tl.float32)
    matrix = (c < C)[:, None] & (n < N)[None, :]
    return features, tl.load(weight + c[:, None] * N + n[None, :], mask=matrix, other=0.0)


@triton.jit
def _probability(
    x, weight, prompt, picture, rows, inside, n,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of [features, prompt] · weight for a tile of pixels; 0 where there is no pixel."""
    logits = tl.zeros([BM, BN], tl.float32)
    for start in range(0, C, BC):
        features, weights = _load(x, weight, rows, inside, start + tl.arange(0, BC), n, C, N)
        logits = tl.dot(features, weights, logits, input_precision=PRECISION)
    logits += tl.load(prompt + picture * N + n, mask=n < N, other=-float("inf"))[None, :]
    power = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(inside[:, None], power / tl.sum(power, 1)[:, None], 0.0)


@triton.jit(do_not_specialize=["pixels"])
def _route(
    x, weight, prompt, gates, probability_out, counts_out, pixels,
    C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gates of a tile of pixels of one picture, and its part of the sums."""
    picture = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = own < pixels
    rows = picture * pixels + own
    n = tl.arange(0, BN)
    probability = _probability(
        x, weight, prompt, picture, rows, inside, n, C, N, BM, BC, BN, PRECISION
    )
    left = tl.where((n < N)[None, :], probability, -1.0)
    for _ in range(K):
        best = tl.argmax(left, 1, tie_break_left=True)
        left = tl.where(n[None, :] == best[:, None], -2.0, left)
    chosen = (left == -2.0) & inside[:, None]
    # NaN has no order: it goes on, whichever experts were chosen, so that damage is not hidden.
    gate = tl.where(chosen | (probability != probability), probability, 0.0)
    known = inside[:, None] & (n < N)[None, :]
    tl.store(gates + rows[:, None] * N + n[None, :], gate, mask=known)
    part = (picture * tl.num_programs(0) + tl.program_id(0)) * N + n
    tl.store(probability_out + part, tl.sum(probability, 0), mask=n < N)
    tl.store(counts_out + part, tl.sum(chosen.to(tl.float32), 0), mask=n < N)


@triton.jit(do_not_specialize=["pixels"])
def _route_back(
    x, weight, prompt, gates, of_gates, of_probability, of_x, of_weight, of_prompt, pixels,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the features and, of this tile, of the weights and the prompt's logits."""
    picture = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = own < pixels
    rows = picture * pixels + own
    n = tl.arange(0, BN)
    probability = _probability(
        x, weight, prompt, picture, rows, inside, n, C, N, BM, BC, BN, PRECISION
    )
    known = inside[:, None] & (n < N)[None, :]
    at = rows[:, None] * N + n[None, :]
    chosen = tl.load(gates + at, mask=known, other=0.0) > 0.0
    wanted = tl.where(chosen, tl.load(of_gates + at, mask=known, other=0.0), 0.0)
    wanted += tl.load(of_probability + picture * N + n, mask=n < N, other=0.0)[None, :]
    along = tl.sum(probability * wanted, 1)
    of_logits = probability * (wanted - along[:, None])
    part = picture * tl.num_programs(0) + tl.program_id(0)
    tl.store(of_prompt + part * N + n, tl.sum(of_logits, 0), mask=n < N)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        features, weights = _load(x, weight, rows, inside, c, n, C, N)
        back = tl.dot(of_logits, tl.trans(weights), input_precision=PRECISION)
        written = inside[:, None] & (c < C)[None, :]
        address = of_x + rows[:, None] * C + c[None, :]
        tl.store(address, back.to(of_x.dtype.element_ty), mask=written)
        summed = tl.dot(tl.trans(features), of_logits, input_precision=PRECISION)
        matrix = (c < C)[:, None] & (n < N)[None, :]
        address = of_weight + part * C * N + c[:, None] * N + n[None, :]
        tl.store(address, summed, mask=matrix)


def route(x_bhwc: Tensor, weight_cn: Tensor, prompt_bn: Tensor, top_k: int) -> Gates:
    """The gates of all pixels, not renormalised over the chosen.

    Args:
        x_bhwc: (B, H, W, C).
        weight_cn: what the features are multiplied with, (C, N).
        prompt_bn: the prompt's part of the logits, (B, N) fp32.
        top_k: K.
    """
    x = x_bhwc.to(feature_dtype(x_bhwc))
    return Gates(*_Route.apply(x, weight_cn, prompt_bn, top_k))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_bhwc: Tensor, weight_cn: Tensor, prompt_bn: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x_bhwc.contiguous()
        weight, prompt = weight_cn.float().contiguous(), prompt_bn.float().contiguous()
        batch, experts = prompt.shape
        grid, sizes = _tiling(x, experts)
        gates = weight.new_empty(x.numel() // x.shape[-1], experts)
        probability, counts = (weight.new_empty(batch, grid[0], experts) for _ in range(2))
        pixels = x.shape[1] * x.shape[2]
        arguments = (x, weight, prompt, gates, probability, counts, pixels)
        launch(_route, grid, *arguments, K=top_k, **sizes)
        ctx.save_for_backward(x, weight, prompt, gates)
        counts = counts.sum(1)
        ctx.mark_non_differentiable(counts)
        return gates, probability.sum(1), counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_gates: Tensor, of_probability: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, prompt, gates = ctx.saved_tensors
        grid, sizes = _tiling(x, prompt.shape[1])
        of_x = torch.empty_like(x)
        of_weight = weight.new_empty(len(x), grid[0], *weight.shape)
        of_prompt = prompt.new_empty(len(x), grid[0], prompt.shape[1])
        given = (x, weight, prompt, gates, of_gates.contiguous(), of_probability.contiguous())
        pixels = x.shape[1] * x.shape[2]
        launch(_route_back, grid, *given, of_x, of_weight, of_prompt, pixels, **sizes)
        return of_x, of_weight.sum((0, 1)), of_prompt.sum(1), None


def _tiling(x_bhwc: Tensor, experts: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs for each picture, and constants."""
    batch, height, width, channels = x_bhwc.shape
    block, rows = min(power_of_two(channels), 64), 64
    sizes = {
        **{"C": channels, "N": experts, "BM": rows, "BC": block, "BN": power_of_two(experts)},
        **{"PRECISION": products(torch.float32), "num_warps": 8},
    }
    return (ceil_div(height * width, rows), batch), sizes
