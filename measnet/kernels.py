"""The transformer block's passes over fp32 features on a CPU, compiled at installation.

An operation of torch reads its input from memory and writes a new tensor; a block has some forty of
them, and fetching fresh memory costs more than most of them compute. These kernels (`_kernels.h`)
use what a 1×1 convolution gives a few rows later, while it is in the cache, keep less for the
backward pass, and compute the rest again. `bench/model.py` shows what is gained. Where there was no
compiler, on a GPU, under autocast, `torch.compile` and in exports, torch does the work
(transformer.py, convolution.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _built() -> dict[int, Callable[..., None]]:
    """Floats per vector -> the kernels for it, the widest that this processor has first."""
    found = {}
    for lanes in (16, 8):
        try:
            found[lanes] = import_module(f"measnet._kernels{lanes}").run
        except ImportError:
            continue  # no compiler at installation, or a processor without such vectors
    return found


KERNELS = _built()
PART = 32
"""Rows of a picture whose share of a sum is given at once; as in the C file."""
KINDS = (
    *("convolve", "convolve_back", "expand", "gate", "gate_straight", "gate_back"),
    *("correlate", "correlate_back", "mix", "mix_back"),
)
ADDRESSES = (
    *("x", "weight", "bias", "matrix0", "matrix1", "matrix2", "plane0", "plane1", "plane2"),
    *("kernel0", "kernel1", "kernel2", "last", "gradient", "of_gram", "of_squares"),
    *("out", "of_norm", "of_matrix", "of_kernel", "of_last", "gram", "squares"),
)
_allowed = True


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it the kernels are torch's own, as on a GPU; not for several threads."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def fit(x_bhwc: Tensor, *weights: Tensor, heads: int = 1) -> bool:
    """Whether the kernels compute this; asked first for what is quick to know."""
    return (
        _allowed
        and x_bhwc.device.type == "cpu"
        and x_bhwc.dtype == torch.float32
        and all(_is_whole(weight) for weight in weights)
        and _lanes(x_bhwc.shape[-1], heads) > 0
        and x_bhwc.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x_bhwc) in (Tensor, torch.nn.Parameter)  # not one without memory of its own
    )


def _is_whole(weight: Tensor) -> bool:
    """DeepSpeed's ZeRO-3 keeps a parameter in parts, except in the forward of its own module."""
    return weight.dtype == torch.float32 and not hasattr(weight, "ds_id")


def depthwise(x_bhwc: Tensor, kernel: Tensor) -> Tensor:
    """x ⊛ kernel with zero padding: (B, H, W, C), (C, 1, 3, 3) -> (B, H, W, C)."""
    out: Tensor = _Depthwise.apply(x_bhwc, kernel)
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
    inputs = (x_bhwc, norm.weight, norm.bias, norm.eps, project_in, depthwise, project_out)
    if _trains(*inputs):
        trained: Tensor = _FeedForward.apply(*inputs)
        return trained
    x, project_in, project_out = (t.contiguous() for t in (x_bhwc, project_in, project_out))
    out = torch.empty_like(x)
    kernels = _taps(depthwise, _padded(x, depthwise.shape[1]))
    _compute(
        "gate_straight",
        x,
        {
            "weight": norm.weight,
            "bias": norm.bias,
            **_each("matrix", project_in),
            **_each("kernel", kernels),
            "last": project_out,
            "out": out,
        },
        hidden=depthwise.shape[1],
        epsilon=norm.eps,
    )
    return out


def correlate(
    x_bhwc: Tensor, norm: torch.nn.LayerNorm, qkv: Tensor, depthwise: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What channel attention needs of q, k and v, which are norm(x) projected and convolved.

    Args:
        x_bhwc: (B, H, W, C).
        norm: over the channels.
        qkv: (3, C, C).
        depthwise: (3, C, 1, 3, 3).
        heads: they split the channels.

    Returns:
        v (B, H, W, C); qᵀk summed over the pixels (B, heads, C/heads, C/heads); the squares of q
        and of k summed over the pixels (B, 2, C).
    """
    result: tuple[Tensor, Tensor, Tensor] = _Correlate.apply(
        x_bhwc, norm.weight, norm.bias, norm.eps, qkv, depthwise, heads
    )
    return result


def mix(x_bhwc: Tensor, v_bhwc: Tensor, matrix_boc: Tensor) -> Tensor:
    """x + v · matrixᵀ, with a matrix (C, C) for each picture."""
    out: Tensor = _Mix.apply(x_bhwc, v_bhwc, matrix_boc)
    return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, kernel: Tensor) -> Tensor:
        x, kernels = x_bhwc.contiguous(), _taps(kernel[None])
        ctx.save_for_backward(x, kernels)
        out = torch.empty_like(x)
        _compute("convolve", x, {"plane0": x, "kernel0": kernels, "out": out})
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        of_x, of_kernel = torch.empty_like(x), _shares(x, 1, 9, x.shape[-1])
        _compute(
            "convolve_back",
            x,
            {
                "plane0": x,
                "kernel0": kernels,
                "gradient": gradient.contiguous(),
                "out": of_x,
                "of_kernel": of_kernel,
            },
        )
        return of_x, _kernels(of_kernel, x.shape[-1])[0]


class _FeedForward(torch.autograd.Function):
    """Keeps the input and what it is expanded to."""

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
    ) -> Tensor:
        x, project_in, project_out = (t.contiguous() for t in (x_bhwc, project_in, project_out))
        hidden = project_in.shape[1]
        planes = x.new_empty(2, *x.shape[:-1], _padded(x, hidden))
        kernels, out = _taps(depthwise, planes.shape[-1]), torch.empty_like(x)
        norm = {"weight": weight, "bias": bias}
        _compute(
            "expand",
            x,
            {**norm, **_each("matrix", project_in), **_each("plane", planes)},
            hidden=hidden,
            epsilon=epsilon,
        )
        kept = _each("plane", planes) | _each("kernel", kernels)
        _compute(
            "gate",
            x,
            {**norm, **kept, "last": project_out, "out": out},
            hidden=hidden,
            epsilon=epsilon,
        )
        ctx.save_for_backward(x, weight, bias, project_in, project_out, planes, kernels)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, project_in, project_out, planes, kernels = ctx.saved_tensors
        hidden, padded, channels = project_in.shape[1], planes.shape[-1], x.shape[-1]
        of_x, of_norm = torch.empty_like(x), _shares(x, 2, channels)
        of_kernel, of_last = _shares(x, 2, 9, padded), _shares(x, channels, padded)
        of_matrix = _shares(x, 2, padded, channels)
        _compute(
            "gate_back",
            x,
            {
                "weight": weight,
                "bias": bias,
                **_each("matrix", project_in),
                **_each("plane", planes),
                **_each("kernel", kernels),
                "last": project_out,
                "gradient": gradient.contiguous(),
                "out": of_x,
                "of_norm": of_norm,
                "of_matrix": of_matrix,
                "of_kernel": of_kernel,
                "of_last": of_last,
            },
            hidden=hidden,
            epsilon=ctx.epsilon,
        )
        of_weight, of_bias = of_norm.sum(0)
        of_in, of_out = of_matrix.sum(0)[:, :hidden], of_last.sum(0)[:, :hidden]
        return of_x, of_weight, of_bias, None, of_in, _kernels(of_kernel, hidden), of_out


class _Correlate(torch.autograd.Function):
    """Keeps the input and its three projections; convolves q and k again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_bhwc: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        qkv: Tensor,
        depthwise: Tensor,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, qkv = x_bhwc.contiguous(), qkv.contiguous()
        each = x.shape[-1] // heads
        planes, kernels, v = x.new_empty(3, *x.shape), _taps(depthwise), torch.empty_like(x)
        gram, squares = _shares(x, heads, each, each), _shares(x, 2, x.shape[-1])
        norm = {"weight": weight, "bias": bias}
        _compute(
            "expand",
            x,
            {**norm, **_each("matrix", qkv), **_each("plane", planes)},
            heads=heads,
            epsilon=epsilon,
        )
        kept = _each("plane", planes) | _each("kernel", kernels)
        _compute(
            "correlate",
            x,
            {**norm, **kept, "out": v, "gram": gram, "squares": squares},
            heads=heads,
            epsilon=epsilon,
        )
        ctx.save_for_backward(x, weight, bias, qkv, planes, kernels)
        ctx.epsilon, ctx.heads = epsilon, heads
        return v, *(one.unflatten(0, (len(x), -1)).sum(1) for one in (gram, squares))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_v: Tensor, of_gram: Tensor, of_squares: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, qkv, planes, kernels = ctx.saved_tensors
        channels = x.shape[-1]
        of_x, of_norm = torch.empty_like(x), _shares(x, 2, channels)
        of_matrix, of_kernel = _shares(x, 3, channels, channels), _shares(x, 3, 9, channels)
        _compute(
            "correlate_back",
            x,
            {
                "weight": weight,
                "bias": bias,
                **_each("matrix", qkv),
                **_each("plane", planes),
                **_each("kernel", kernels),
                "gradient": of_v.contiguous(),
                "of_gram": of_gram.contiguous(),
                "of_squares": of_squares.contiguous(),
                "out": of_x,
                "of_norm": of_norm,
                "of_matrix": of_matrix,
                "of_kernel": of_kernel,
            },
            heads=ctx.heads,
            epsilon=ctx.epsilon,
        )
        of_weight, of_bias = of_norm.sum(0)
        of_depthwise = _kernels(of_kernel, channels)
        return of_x, of_weight, of_bias, None, of_matrix.sum(0), of_depthwise, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, v_bhwc: Tensor, matrix_boc: Tensor) -> Tensor:
        x, v, matrix = x_bhwc.contiguous(), v_bhwc.contiguous(), matrix_boc.contiguous()
        out = torch.empty_like(x)
        _compute("mix", x, {"x": x, "plane0": v, "last": matrix, "out": out})
        ctx.save_for_backward(v, matrix)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, matrix = ctx.saved_tensors
        gradient, of_v = gradient.contiguous(), torch.empty_like(v)
        of_matrix = _shares(v, *matrix.shape[1:])
        _compute(
            "mix_back",
            v,
            {
                "plane0": v,
                "last": matrix,
                "gradient": gradient,
                "out": of_v,
                "of_matrix": of_matrix,
            },
        )
        return gradient, of_v, of_matrix.unflatten(0, (len(v), -1)).sum(1)


def _lanes(channels: int, heads: int = 1) -> int:
    """The widest vectors that these channels fill, split among the heads; 0: none."""
    return next((lanes for lanes in KERNELS if channels % (heads * lanes) == 0), 0)


def _padded(x_bhwc: Tensor, hidden: int) -> int:
    """Hidden channels up to whole vectors."""
    return hidden + -hidden % _lanes(x_bhwc.shape[-1])


def _trains(*inputs: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(one, Tensor) and one.requires_grad for one in inputs
    )


def _compute(
    kind: str,
    x_bhwc: Tensor,
    tensors: dict[str, Tensor],
    *,
    hidden: int | None = None,
    heads: int = 1,
    epsilon: float = 0.0,
) -> None:
    """Call the C file; `tensors` are contiguous fp32, by the names in `ADDRESSES`."""
    tensors = {"x": x_bhwc} | tensors
    channels = x_bhwc.shape[-1]
    lanes = _lanes(channels, heads)
    hidden = channels if hidden is None else hidden
    streams = max(sum(f"{name}{i}" in tensors for i in range(3)) for name in ("plane", "matrix"))
    sizes = (*x_bhwc.shape, hidden, hidden + -hidden % lanes, heads, streams)
    addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in ADDRESSES]
    KERNELS[lanes](KINDS.index(kind), addresses, sizes, epsilon, torch.get_num_threads())


def _each(name: str, stacked: Tensor) -> dict[str, Tensor]:
    """`matrix0`, `matrix1`, ..."""
    return {f"{name}{i}": one for i, one in enumerate(stacked)}


def _taps(kernels: Tensor, padded: int | None = None) -> Tensor:
    """(S, C, 1, 3, 3) -> (S, 9, C), with zeros up to `padded` channels."""
    taps = kernels.flatten(2).transpose(1, 2)
    missing = 0 if padded is None else padded - taps.shape[-1]
    return F.pad(taps, (0, missing)) if missing else taps.contiguous()


def _kernels(shares: Tensor, channels: int) -> Tensor:
    """(tasks, S, 9, padded) -> (S, C, 1, 3, 3), summed in a fixed order."""
    taps = shares.sum(0)[..., :channels].transpose(1, 2)
    return taps.reshape(*taps.shape[:2], 1, 3, 3)


def _shares(x_bhwc: Tensor, *shape: int) -> Tensor:
    """Room for a sum from each part of the rows of each picture."""
    return x_bhwc.new_zeros(len(x_bhwc) * -(-x_bhwc.shape[1] // PART), *shape)
