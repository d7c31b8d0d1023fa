"""Attention among the channels, alone and as the first half of a transformer block."""

from typing import Protocol

import torch
from torch import Tensor, nn

from measnet.ops import cpu, gpu_library
from measnet.ops.convolution import convolve, pointwise
from measnet.ops.cpu_library import fits
from measnet.ops.whole import in_parts, inner, total

EPSILON = 1e-12
"""The least norm that a query or key is divided by."""


class AttentionWeights(Protocol):
    """What `residual_attention` reads of the module that holds the weights."""

    qkv: nn.Parameter
    """(3, C, C)."""
    qkv_depthwise: nn.Parameter
    """(3, C, 1, 3, 3)."""
    temperature: nn.Parameter
    """(heads, 1, 1)."""
    project_out: nn.Parameter
    """(C, C)."""

    def __call__(self, x_bhwc: Tensor) -> Tensor:
        """The attention by itself, (B, H, W, C) -> (B, H, W, C)."""
        ...


def residual_attention(x_bhwc: Tensor, norm: nn.LayerNorm, attention: AttentionWeights) -> Tensor:
    """x + attention(norm(x)), (B, H, W, C) -> (B, H, W, C)."""
    weights = (
        *(attention.qkv, attention.qkv_depthwise),
        *(attention.temperature, attention.project_out),
    )
    heads = len(attention.temperature)
    fused = not in_parts()  # a fused kernel sums over the pixels that it is given
    if fused and fits(x_bhwc, norm.weight, norm.bias, *weights, heads=heads):
        return cpu.attention(x_bhwc, norm, *weights)
    if fused and gpu_library.fits(x_bhwc, norm.weight, norm.bias, *weights, heads=heads):
        from measnet.ops.gpu import block

        return block.attention(x_bhwc, norm, *weights)
    # The module itself is called: ZeRO-3 gathers its weights for its own forward pass only.
    return x_bhwc + attention(norm(x_bhwc))


def attend_planes(
    q_bhwc: Tensor,
    k_bhwc: Tensor,
    v_bhwc: Tensor,
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
) -> Tensor:
    """Channel attention after each plane's own of the depth-wise convolutions (3, C, 1, 3, 3)."""
    heads = len(temperature)
    fused = not in_parts()
    if fused and fits(v_bhwc, depthwise, temperature, project_out, heads=heads):
        planes = (q_bhwc, k_bhwc, v_bhwc)
        return cpu.attend_planes(*planes, depthwise, temperature, project_out)
    if fused and gpu_library.fits(v_bhwc, depthwise, temperature, project_out, heads=heads):
        from measnet.ops.gpu import block

        planes = (q_bhwc, k_bhwc, v_bhwc)
        return block.attend_planes(*planes, depthwise, temperature, project_out)
    q_bhwc, k_bhwc, v_bhwc = (
        convolve(plane, kernel, groups=len(kernel))
        for plane, kernel in zip((q_bhwc, k_bhwc, v_bhwc), depthwise, strict=True)
    )
    q_bpc, k_bpc = (inner(plane).flatten(1, 2) for plane in (q_bhwc, k_bhwc))
    out = attend_channels(q_bpc, k_bpc, v_bhwc.flatten(1, 2), temperature, project_out)
    return out.view(v_bhwc.shape)


def attend_channels(
    q_bpc: Tensor, k_bpc: Tensor, v_bpc: Tensor, temperature: Tensor, project_out: Tensor
) -> Tensor:
    """Channel attention over P pixels and its 1×1 convolution; `temperature` is (heads, 1, 1).

    Norms and softmax are fp32 under every precision. A norm of 0 has a gradient of 0.
    """
    heads = len(temperature)
    if q_bpc.dtype == torch.float16:  # sums over the pixels of a photo exceed its largest number
        q_bpc, k_bpc = q_bpc.float(), k_bpc.float()
    q_bhcp = q_bpc.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    k_bhpc = k_bpc.unflatten(-1, (heads, -1)).transpose(1, 2)
    gram = (q_bhcp @ k_bhpc).float()
    gram, *squares = total(gram, _squares(q_bpc), _squares(k_bpc))
    q_norm, k_norm = (square.clamp_min(EPSILON**2).sqrt() for square in squares)
    matrix_boc = channel_matrix(gram, q_norm, k_norm, temperature, project_out)
    if len(matrix_boc) == 1:
        return pointwise(v_bpc, matrix_boc[0].to(v_bpc.dtype))
    return v_bpc @ matrix_boc.transpose(1, 2).to(v_bpc.dtype)


def channel_matrix(
    gram: Tensor, q_norm: Tensor, k_norm: Tensor, temperature: Tensor, project_out: Tensor
) -> Tensor:
    """What attention and its 1×1 convolution do to v, one matrix a picture.

    Args:
        gram: qᵀk over the pixels, (B, heads, C/heads, C/heads) fp32.
        q_norm: (B, C) fp32; `k_norm` the same of k.
        k_norm: see `q_norm`.
        temperature: (heads, 1, 1).
        project_out: (C, C).

    Returns:
        (B, C out, C of v).
    """
    heads = len(temperature)
    cosine = gram / q_norm.view(*gram.shape[:3], 1) / k_norm.view(len(gram), heads, 1, -1)
    attention_bhcc = torch.softmax(cosine * temperature.float(), dim=-1).to(project_out.dtype)
    project_hcc = project_out.unflatten(1, (heads, -1)).transpose(0, 1)
    return (project_hcc @ attention_bhcc).transpose(1, 2).flatten(2)


def _squares(x_bpc: Tensor) -> Tensor:
    """Squared L2 norm along the pixels, (B, C) fp32."""
    return x_bpc.square().sum(1, dtype=torch.float32)
