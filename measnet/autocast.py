"""Automatic mixed precision: switched off for a block, and CUDA's rules on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from measnet.internals import tree_leaves, tree_map


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER = _names(
    "conv1d conv2d conv3d conv_transpose2d prelu addmm addmv addr matmul rmatmul einsum mm mv "
    "linear addbmm baddbmm bmm chain_matmul scaled_dot_product_attention"
)
"""Operations that CUDA's autocast computes in bf16 or fp16; `rmatmul` is `matmul`."""
FULL = _names(
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow square "
    "softplus layer_norm native_layer_norm rms_norm group_norm cosine_similarity kl_div l1_loss "
    "smooth_l1_loss huber_loss mse_loss dist cdist renorm logsumexp interpolate norm"
)
"""Those that it computes in fp32; `square` is `pow`, `interpolate` is one of `upsample_*`."""
FULL_RESULT = _names("prod softmax log_softmax cumprod cumsum sum")
"""Those whose result is fp32, unless the call sets a dtype."""
WIDEST = _names("addcdiv addcmul atan2 cat cross dot stack scatter_add")
"""Those that it computes in the widest type of their inputs."""


def autocast_off(like: Tensor) -> torch.autocast:
    """Switch autocast off inside the block, to compute in fp32 on the device of `like`.

    torch has no autocast for `meta`; there `CudaAutocast` follows the CPU's.
    """
    device = like.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


class CudaAutocast(TorchFunctionMode):
    """Inside it, the CPU's autocast chooses the type of each operation as CUDA's does.

    This changes what is kept for the backward pass: on CUDA a layer norm gives fp32, and each
    linear layer after it keeps a bf16 copy of its own. The lists are those of torch
    (ATen/autocast_mode.h). CUDA also keeps cast weights until the forward pass ends. That is not
    done here, because the backward pass needs most of them anyway.
    """

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        """Cast the inputs of `func` if autocast is on."""
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        lower = torch.get_autocast_dtype("cpu")
        torch.set_autocast_enabled("cpu", False)  # or the CPU's own rules would apply too
        try:
            name = func.__name__.strip("_")
            if name in LOWER:
                args, kwargs = tree_map(_cast(lower), (args, kwargs))
            elif name in FULL:
                args, kwargs = tree_map(_cast(torch.float32), (args, kwargs))
            elif name in FULL_RESULT and lower in _dtypes(args) and not kwargs.get("dtype"):
                kwargs = {**kwargs, "dtype": torch.float32}
            elif name in WIDEST and torch.float32 in _dtypes(args):
                args, kwargs = tree_map(_cast(torch.float32), (args, kwargs))
            return func(*args, **kwargs)
        finally:
            torch.set_autocast_enabled("cpu", True)


def _cast(dtype: torch.dtype) -> Callable[[Any], Any]:
    """Casts floating-point tensors except float64, as torch does."""

    def cast(value: Any) -> Any:
        casts = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if casts and value.dtype != torch.float64 else value

    return cast


def _dtypes(args: Any) -> set[torch.dtype]:
    return {one.dtype for one in tree_leaves(args) if isinstance(one, Tensor)}
