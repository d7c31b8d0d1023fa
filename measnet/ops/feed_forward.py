"""The gated feed-forward, the second half of a transformer block."""

from typing import Protocol

from torch import Tensor, nn

from measnet.ops import cpu, gpu_library
from measnet.ops.cpu_library import fits


class FeedForwardWeights(Protocol):
    """What `residual_feed_forward` reads of the module that holds the weights."""

    project_in: nn.Parameter
    """(2, hidden, C)."""
    depthwise: nn.Parameter
    """(2, hidden, 1, 3, 3)."""
    project_out: nn.Parameter
    """(C, hidden)."""

    def __call__(self, x_bhwc: Tensor) -> Tensor:
        """The feed-forward by itself, (B, H, W, C) -> (B, H, W, C)."""
        ...


def residual_feed_forward(
    x_bhwc: Tensor, norm: nn.LayerNorm, feed_forward: FeedForwardWeights
) -> Tensor:
    """x + feed_forward(norm(x)), (B, H, W, C) -> (B, H, W, C)."""
    weights = (feed_forward.project_in, feed_forward.depthwise, feed_forward.project_out)
    if fits(x_bhwc, norm.weight, norm.bias, *weights):
        return cpu.feed_forward(x_bhwc, norm, *weights)
    if gpu_library.fits(x_bhwc, norm.weight, norm.bias, *weights):
        from measnet.ops.gpu import block

        return block.feed_forward(x_bhwc, norm, *weights)
    # The module itself is called: ZeRO-3 gathers its weights for its own forward pass only.
    return x_bhwc + feed_forward(norm(x_bhwc))
