"""Parts of the backbone: channel attention, gated feed-forward, down and up sampling.

Features are `x_bhwc`: batch, height, width, channels, contiguous. In this layout a 1×1 convolution
is one matrix product and layer norm is one fused kernel. For a spatial convolution it is the memory
format channels-last.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.ops.attention import attend_planes, residual_attention
from measnet.ops.convolution import convolve, pointwise, project
from measnet.ops.feed_forward import residual_feed_forward
from measnet.ops.gpu_library import Weight


def weight(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter drawn uniformly from ±1/√fan_in, torch's default for convolutions."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Conv3x3(nn.Module):
    """A dense 3×3 convolution without bias on BHWC features."""

    def __init__(self, channels: int, out: int) -> None:
        """`channels` in, `out` out."""
        super().__init__()
        self.weight = weight(out, channels, 3, 3, fan_in=channels * 9)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, channels) -> (B, H, W, out)."""
        return convolve(x_bhwc, self.weight)


class ChannelAttention(nn.Module):
    """Attention among the channels: softmax(q kᵀ · temperature) v; heads split the channels.

    Query and key are L2-normalised along the pixels. The norms are applied to the small C×C product
    and the output projection is merged into the attention matrix, so each large tensor is read
    once.
    """

    def __init__(self, channels: int, heads: int) -> None:
        """`heads` divides `channels`."""
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = weight(3, channels, channels, fan_in=channels)
        self.qkv_depthwise = weight(3, channels, 1, 3, 3, fan_in=9)
        self.project_out = weight(channels, channels, fan_in=channels)

    def kernel_weights(self) -> Iterator[Weight]:
        """See `measnet.ops.gpu_library.HasWeights`."""
        _, out, channels = self.qkv.shape
        yield Weight(self.qkv, self.qkv.detach(), (3, out, channels), True)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        # Three products, not one that is split: its backward pass would have to concatenate.
        q, k, v = project(x_bhwc, self.qkv.unbind())
        return attend_planes(q, k, v, self.qkv_depthwise, self.temperature, self.project_out)


class FeedForward(nn.Module):
    """Gated feed-forward: 1×1 to twice the hidden channels, depth-wise 3×3, gelu(a) · b, 1×1 back.

    The two halves are computed separately, so that no tensor has to be split. Hidden channels are
    padded to a multiple of 16 for the computation (the parameters are not), because vector units
    and tensor cores are slow with the odd numbers that an expansion of 2.66 gives.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        """`int(channels · expansion)` hidden channels."""
        super().__init__()
        hidden = int(channels * expansion)
        self.padding = -hidden % 16
        self.project_in = weight(2, hidden, channels, fan_in=channels)
        self.depthwise = weight(2, hidden, 1, 3, 3, fan_in=9)
        self.project_out = weight(channels, hidden, fan_in=hidden)

    def kernel_weights(self) -> Iterator[Weight]:
        """See `measnet.ops.gpu_library.HasWeights`."""
        channels, hidden = self.project_out.shape
        padded = hidden + self.padding
        taps = self.depthwise.detach().flatten(2)
        yield Weight(self.project_in, self.project_in.detach(), (2, padded, channels), True)
        yield Weight(self.depthwise, taps, (2, padded, 9), False)
        yield Weight(self.project_out, self.project_out.detach()[None], (1, channels, padded), True)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        project_in = F.pad(self.project_in, (0, 0, 0, self.padding))
        depthwise = F.pad(self.depthwise, (0, 0, 0, 0, 0, 0, 0, self.padding))
        a, b = (pointwise(x_bhwc, matrix) for matrix in project_in)
        a, b = (
            convolve(half, kernel, groups=len(kernel))
            for half, kernel in zip((a, b), depthwise, strict=True)
        )
        return pointwise(F.gelu(a) * b, F.pad(self.project_out, (0, self.padding)))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the norms go over the channels."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        """See `ChannelAttention` and `FeedForward`."""
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = ChannelAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x_bhwc = residual_attention(x_bhwc, self.norm1, self.attention)
        return residual_feed_forward(x_bhwc, self.norm2, self.feed_forward)


class Downsample(nn.Module):
    """Half the size, twice the channels: 3×3 convolution C → C/2, pixel-unshuffle by 2."""

    def __init__(self, channels: int) -> None:
        """`channels` is even."""
        super().__init__()
        self.conv = Conv3x3(channels, channels // 2)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C)."""
        x = self.conv(x_bhwc).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # b h i w j c
        return x.permute(0, 1, 3, 5, 2, 4).flatten(3)


class Upsample(nn.Module):
    """Twice the size, half the channels: 3×3 convolution C → 2C, pixel-shuffle by 2."""

    def __init__(self, channels: int) -> None:
        """`channels` is even."""
        super().__init__()
        self.conv = Conv3x3(channels, channels * 2)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2H, 2W, C/2)."""
        x = self.conv(x_bhwc).unflatten(3, (-1, 2, 2))  # b h w c i j
        return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)


class Merge(nn.Module):
    """1×1 convolution of two concatenated feature maps to `out` channels.

    Computed as the sum of two products, without concatenating.
    """

    def __init__(self, channels: int, out: int, *, bias: bool = False) -> None:
        """Both inputs have `channels` channels."""
        super().__init__()
        self.weight = weight(out, 2 * channels, fan_in=2 * channels)
        self.bias = weight(out, fan_in=2 * channels) if bias else None

    def forward(self, first_bhwc: Tensor, second_bhwc: Tensor) -> Tensor:
        """Two of (B, H, W, channels) -> (B, H, W, out)."""
        for_first, for_second = self.weight.chunk(2, dim=1)
        return pointwise(first_bhwc, for_first, self.bias) + pointwise(second_bhwc, for_second)
