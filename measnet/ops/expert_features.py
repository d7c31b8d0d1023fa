"""What the experts of MEE see of a picture, and what their gate sees (Eq. 9)."""

from torch import Tensor, nn

from measnet.ops import gpu_library
from measnet.ops.convolution import convolve, pointwise
from measnet.ops.normalization import layer_norm
from measnet.ops.whole import in_parts, pixel_mean


def expert_features(
    x_bhwc: Tensor, norm: nn.LayerNorm, depthwise: Tensor, project: Tensor
) -> tuple[Tensor, Tensor]:
    """F^d = norm(x) ⊛ depthwise, of which the mean, and F^pd = F^p ⊙ F^d + F^p.

    F^p is the product of F^d with `project`.

    Args:
        x_bhwc: (B, H, W, C).
        norm: over the channels.
        depthwise: (C, 1, 3, 3).
        project: (C, C).

    Returns:
        The mean of F^d over the pixels of each picture, (B, C) fp32, and F^pd, (B, H, W, C).
    """
    weights = (norm.weight, norm.bias, depthwise, project)
    if gpu_library.fits_experts(x_bhwc, 1, *weights) and not in_parts():
        from measnet.ops.gpu import expert_features as gpu

        return gpu.expert_features(x_bhwc, norm, depthwise, project)
    depth = convolve(layer_norm(x_bhwc, norm), depthwise, groups=len(depthwise))
    return pixel_mean(depth), pointwise(depth, project) * (depth + 1)
