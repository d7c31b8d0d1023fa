"""Layer norm over the channels, where no product follows that could take it in."""

import torch.nn.functional as F
from torch import Tensor, nn

from measnet.autocast import autocast_off
from measnet.ops import gpu_library


def layer_norm(x_bhwc: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x), (B, H, W, C) -> same; on a GPU in the features' type, and fp32 inside.

    Autocast would give fp32, and a copy of it in bf16 for each operation behind it.
    """
    if not gpu_library.fits(x_bhwc, norm.weight, norm.bias):
        out: Tensor = norm(x_bhwc)
        return out
    x = x_bhwc.to(gpu_library.feature_dtype(x_bhwc))
    with autocast_off(x):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
