"""The two halves of a transformer block, forward and backward.

Kept for the backward pass are the input, the projections (q, k, v, or a and b), v after its
convolution, and small matrices. The rest is computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.gpu import packing
from measnet.ops.gpu.correlation import (
    Correlation,
    correlate,
    correlate_back,
    mixer,
    mixer_back,
)
from measnet.ops.gpu.depthwise import convolve, convolve_back, gate_back
from measnet.ops.gpu.gated import gate_project
from measnet.ops.gpu.products import (
    Normalised,
    multiply,
    norm_project,
    norm_project_back,
    weight_gradient,
)
from measnet.ops.gpu_library import MULTIPLE, feature_dtype


def attention(
    x_bhwc: Tensor,
    norm: torch.nn.LayerNorm,
    qkv: Tensor,
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
) -> Tensor:
    """x + channel attention of q, k and v, which are norm(x) projected and convolved.

    Args:
        x_bhwc: (B, H, W, C).
        norm: over the channels.
        qkv: (3, C, C).
        depthwise: (3, C, 1, 3, 3).
        temperature: (heads, 1, 1); the heads split the channels.
        project_out: (C, C).
    """
    x = x_bhwc.to(feature_dtype(x_bhwc))
    inputs = (norm.weight, norm.bias, norm.eps, qkv, depthwise, temperature, project_out)
    out: Tensor = _Attention.apply(x, *inputs, packing.of(qkv))
    return out


def attend_planes(
    q_bhwc: Tensor,
    k_bhwc: Tensor,
    v_bhwc: Tensor,
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
) -> Tensor:
    """Channel attention of q, k and v that are projected already, from anything; without x."""
    dtype = feature_dtype(v_bhwc)
    planes = (one.to(dtype) for one in (q_bhwc, k_bhwc, v_bhwc))
    out: Tensor = _AttendPlanes.apply(*planes, depthwise, temperature, project_out)
    return out


def feed_forward(
    x_bhwc: Tensor,
    norm: torch.nn.LayerNorm,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
) -> Tensor:
    """x + project_out(gelu(a) · b), where a and b are norm(x) projected and convolved.

    Args:
        x_bhwc: (B, H, W, C).
        norm: over the channels.
        project_in: (2, hidden, C).
        depthwise: (2, hidden, 1, 3, 3).
        project_out: (C, hidden).
    """
    x = x_bhwc.to(feature_dtype(x_bhwc))
    weights = (project_in, depthwise, project_out)
    packed = tuple(map(packing.of, weights))
    inputs = (norm.weight, norm.bias, norm.eps, *weights, *packed)
    out: Tensor = _FeedForward.apply(x, *inputs)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_bhwc: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        qkv: Tensor,
        depthwise: Tensor,
        temperature: Tensor,
        project_out: Tensor,
        packed: Tensor | None,
    ) -> Tensor:
        x = x_bhwc.contiguous()
        matrix = (qkv if packed is None else packed).flatten(0, 1).to(x.dtype)
        planes, kept = norm_project(x, (weight, bias, epsilon), matrix)
        q, k, v = planes.chunk(3, dim=-1)
        kernels = _kernels(depthwise)
        sums = correlate(q, k, kernels[0], kernels[1], len(temperature))
        v = convolve(v, kernels[2])
        mixed = mixer(sums, temperature, project_out, x.dtype)
        tensors = (x, *kept, weight, bias, matrix, planes, kernels, *sums, v, mixed)
        ctx.save_for_backward(*tensors, temperature, project_out)
        return multiply(v, mixed, residual=x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, matrix, planes, kernels, gram, squares, v, mixed, *rest = (
            ctx.saved_tensors
        )
        gradient = gradient.contiguous()
        kept, sums = Normalised(mean, rstd), Correlation(gram, squares)
        temperature, project_out = rest
        of_mixer = weight_gradient(gradient, v, per_picture=True)
        of_sums, of_temperature, of_project = mixer_back(sums, temperature, project_out, of_mixer)
        of_convolved = torch.empty_like(planes)
        of_q, of_k, of_v = of_convolved.chunk(3, dim=-1)
        multiply(gradient, mixed.transpose(1, 2), out=of_v)
        q, k, _ = planes.chunk(3, dim=-1)
        correlate_back(q, k, kernels[0], kernels[1], of_sums, of_q, of_k)
        of_planes, of_kernels = convolve_back(planes, kernels.flatten(0, 1), of_convolved)
        of_x, of_norm = norm_project_back(of_planes, matrix, x, kept, weight, gradient)
        of_qkv = weight_gradient(of_planes, x, norm=(kept, weight, bias))
        return (
            *(of_x, *of_norm.unbind(), None, of_qkv.unflatten(0, (3, -1))),
            *(of_kernels.view(3, -1, 1, 3, 3), of_temperature, of_project, None),
        )


class _AttendPlanes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_bhwc: Tensor,
        k_bhwc: Tensor,
        v_bhwc: Tensor,
        depthwise: Tensor,
        temperature: Tensor,
        project_out: Tensor,
    ) -> Tensor:
        q, k, v = (one.contiguous() for one in (q_bhwc, k_bhwc, v_bhwc))
        kernels = _kernels(depthwise)
        sums = correlate(q, k, kernels[0], kernels[1], len(temperature))
        convolved = convolve(v, kernels[2])
        mixed = mixer(sums, temperature, project_out, v.dtype)
        tensors = (q, k, v, kernels, *sums, convolved, mixed, temperature, project_out)
        ctx.save_for_backward(*tensors)
        return multiply(convolved, mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kernels, gram, squares, convolved, mixed, *rest = ctx.saved_tensors
        temperature, project_out = rest
        gradient = gradient.contiguous()
        of_mixer = weight_gradient(gradient, convolved, per_picture=True)
        of_sums, of_temperature, of_project = mixer_back(
            Correlation(gram, squares), temperature, project_out, of_mixer
        )
        of_v = multiply(gradient, mixed.transpose(1, 2))
        of_q, of_k = torch.empty_like(q), torch.empty_like(k)
        correlate_back(q, k, kernels[0], kernels[1], of_sums, of_q, of_k)
        planes = zip((q, k, v), kernels, (of_q, of_k, of_v), strict=True)
        of_planes, of_kernels = zip(*(convolve_back(*one) for one in planes), strict=True)
        of_depthwise = torch.stack(of_kernels).view(3, -1, 1, 3, 3)
        return *of_planes, of_depthwise, of_temperature, of_project


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_bhwc: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        project_in: Tensor,
        depthwise: Tensor,
        project_out: Tensor,
        packed_in: Tensor | None,
        packed_kernels: Tensor | None,
        packed_out: Tensor | None,
    ) -> Tensor:
        x = x_bhwc.contiguous()
        hidden = project_in.shape[1]
        padded = hidden + -hidden % MULTIPLE
        if packed_in is None or packed_kernels is None or packed_out is None:
            packed_in = _padded(project_in, 1, padded, x.dtype)
            packed_kernels = _padded(depthwise.flatten(2), 1, padded, torch.float32)
            packed_out = _padded(project_out, 1, padded, x.dtype)
        into, kernels = packed_in.flatten(0, 1), packed_kernels.flatten(0, 1)
        out = packed_out.view(-1, padded)
        planes, kept = norm_project(x, (weight, bias, epsilon), into)
        result = gate_project(planes, kernels, out, x)
        ctx.save_for_backward(x, *kept, weight, bias, into, planes, kernels, out)
        ctx.hidden = hidden
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, into, planes, kernels, out = ctx.saved_tensors
        gradient, kept, hidden = gradient.contiguous(), Normalised(mean, rstd), ctx.hidden
        of_gated = multiply(gradient, out.t())
        of_convolved, gated = gate_back(planes, kernels, of_gated)
        of_out = weight_gradient(gradient, gated, inner=hidden)
        of_planes, of_kernels = convolve_back(planes, kernels, of_convolved, halves=hidden)
        of_x, of_norm = norm_project_back(of_planes, into, x, kept, weight, gradient)
        of_into = weight_gradient(of_planes, x, norm=(kept, weight, bias), halves=hidden)
        return (
            *(of_x, *of_norm.unbind(), None, of_into.unflatten(0, (2, -1))),
            *(of_kernels.view(2, -1, 1, 3, 3), of_out, None, None, None),
        )


def _kernels(depthwise: Tensor) -> Tensor:
    """(3, C, 1, 3, 3) -> (3, C, 9) fp32."""
    return depthwise.flatten(2).float().contiguous()


def _padded(weight: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, contiguous, with zeros behind it up to `size` along `dim`."""
    if weight.shape[dim] == size:
        return weight.to(dtype).contiguous()
    shape = list(weight.shape)
    shape[dim] = size
    whole = weight.new_zeros(shape, dtype=dtype)
    whole.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return whole
