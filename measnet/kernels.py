"""Passes over fp32 features on a CPU, compiled at installation.

An operation of torch reads its input from memory and writes a new tensor; a transformer block has
some forty of them, and fetching fresh memory costs more than most of them compute. These kernels
(`_kernels.h`)
use what a 1×1 convolution gives a few rows later, while it is in the cache, keep less for the
backward pass, and compute the rest again. `bench/model.py` shows what is gained. Where there was no
compiler, on a GPU, under autocast, `torch.compile` and in exports, torch does the work
(transformer.py, convolution.py).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _built() -> dict[int, ModuleType]:
    """Floats per vector -> the kernels for it, the widest that this processor has first."""
    found = {}
    for lanes in (16, 8):
        try:
            found[lanes] = import_module(f"measnet._kernels{lanes}")
        except ImportError:
            continue  # no compiler at installation, or a processor without such vectors
    return found


KERNELS = _built()
PART = 32
"""Rows of a picture whose share of a sum is given at once."""
LEAST_PART = 8
"""Rows of a small picture that are still worth a thread of their own."""
PIXELS = 1024
"""Least number of pixels whose share of a sum is given at once where rows do not matter."""
SHARES = 8
"""Most shares of such a sum."""
KINDS = (
    *("convolve", "convolve_back", "expand", "project_back", "gate", "gate_back"),
    *("correlate", "correlate_back", "mix", "mix_back", "low_pass", "low_pass_back"),
)
ADDRESSES = (
    *("x", "weight", "bias", "matrix0", "matrix1", "matrix2", "plane0", "plane1", "plane2"),
    *("kernel0", "kernel1", "kernel2", "offset0", "offset1", "offset2", "last", "gradient"),
    *("of_gram", "of_squares", "out", "out1", "out2", "of_norm", "of_matrix", "of_kernel"),
    *("of_offset", "of_last", "gram", "squares"),
)
_INDEX = {name: at for at, name in enumerate(ADDRESSES)}
_STREAMS = (_INDEX["plane0"], _INDEX["matrix0"])
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


def fit(x: Tensor, *weights: Tensor | None, heads: int = 1, out: int | None = None) -> bool:
    """Whether the kernels compute this; asked first for what is quick to know.

    Args:
        x: the features, channels last.
        weights: parameters that take part; None is one that is not there.
        heads: they split the channels.
        out: channels of the output, where those matter too.
    """
    return (
        _allowed
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and all(_is_whole(weight) for weight in weights if weight is not None)
        and _lanes(x.shape[-1], heads, out) > 0
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)  # not one without memory of its own
    )


def padding(x: Tensor, width: int) -> int:
    """Channels to be added to `width` for these features' kernels; none where torch computes."""
    return -width % next(iter(KERNELS)) if fit(x) else 0


def _is_whole(weight: Tensor) -> bool:
    """DeepSpeed's ZeRO-3 keeps a parameter in parts, except in the forward of its own module."""
    return weight.dtype == torch.float32 and not hasattr(weight, "ds_id")


def depthwise(
    x_bhwc: Tensor, kernel: Tensor, offset: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """x ⊛ kernel + offset with zero padding, then gelu where asked for.

    Args:
        x_bhwc: (B, H, W, C).
        kernel: (C, 1, 3, 3), or (C, 1, 1, 3), or (C, 1, 3, 1).
        offset: (C,).
        gelu: what is kept for the backward pass is the input either way.
    """
    rows, columns = kernel.shape[-2:]
    if (rows, columns) != (3, 3):
        beside, above = (3 - columns) // 2, (3 - rows) // 2
        kernel = F.pad(kernel, (beside, beside, above, above))
    out: Tensor = _Depthwise.apply(x_bhwc, kernel, offset, gelu)
    return out


def project(
    x: Tensor, matrices: Sequence[Tensor], offsets: Sequence[Tensor] | None, *, gelu: bool = False
) -> tuple[Tensor, ...]:
    """1×1 convolutions of the same features: x · matrixᵀ + offset, or gelu(x) instead of x.

    Args:
        x: (..., C).
        matrices: one to three (C out, C).
        offsets: as many (C out,).
        gelu: what is kept for the backward pass is `x` either way.

    Returns:
        As many (..., C out).
    """
    out: tuple[Tensor, ...] = _Project.apply(x, gelu, len(matrices), *matrices, *(offsets or ()))
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
        "gate",
        x,
        {
            **_weights(norm.weight, norm.bias, project_in, kernels),
            "last": project_out,
            "out": out,
        },
        hidden=depthwise.shape[1],
        part=_straight_part(x.shape[1]),
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
    inputs = (x_bhwc, norm.weight, norm.bias, norm.eps, qkv, depthwise)
    if _trains(*inputs):
        trained: tuple[Tensor, Tensor, Tensor] = _Correlate.apply(*inputs, heads)
        return trained
    x, qkv = x_bhwc.contiguous(), qkv.contiguous()
    part = _straight_part(x.shape[1])
    outputs = _correlated(x, heads, part)
    _compute(
        "correlate",
        x,
        _weights(norm.weight, norm.bias, qkv, _taps(depthwise)) | outputs,
        heads=heads,
        part=part,
        epsilon=norm.eps,
    )
    return _summed(outputs, len(x))


def correlate_planes(
    q_bhwc: Tensor, k_bhwc: Tensor, v_bhwc: Tensor, depthwise: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`correlate` of q, k and v that are projected already, from anything."""
    result: tuple[Tensor, Tensor, Tensor] = _CorrelatePlanes.apply(
        q_bhwc, k_bhwc, v_bhwc, depthwise, heads
    )
    return result


def mix(x_bhwc: Tensor | None, v_bhwc: Tensor, matrix_boc: Tensor) -> Tensor:
    """x + v · matrixᵀ, with a matrix (C, C) for each picture; without x: v · matrixᵀ."""
    out: Tensor = _Mix.apply(x_bhwc, v_bhwc, matrix_boc)
    return out


def low_pass(x_bhwc: Tensor, taps_b9c: Tensor) -> tuple[Tensor, Tensor]:
    """x ⊛ its own picture's kernel, reflecting at the edges, and what that leaves of x.

    Args:
        x_bhwc: (B, H, W, C); H and W are 2 or more.
        taps_b9c: (B, 9, C), 3×3 kernels row by row.

    Returns:
        Two of (B, H, W, C), whose sum is x.
    """
    result: tuple[Tensor, Tensor] = _LowPass.apply(x_bhwc, taps_b9c)
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_bhwc: Tensor, kernel: Tensor, offset: Tensor | None, gelu: bool
    ) -> Tensor:
        x, kernels = x_bhwc.contiguous(), _taps(kernel[None])
        offset = None if offset is None else offset.contiguous()
        out = torch.empty_like(x)
        given = {"plane0": x, "kernel0": kernels, "offset0": offset, "out": out}
        _compute("convolve", x, given, activated=gelu, part=_straight_part(x.shape[1]))
        ctx.save_for_backward(x, kernels, offset)
        ctx.gelu = gelu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernels, offset = ctx.saved_tensors
        channels = x.shape[-1]
        of_x, of_kernel = torch.empty_like(x), _shares(x, 1, 9, channels)
        of_offset = None if offset is None else _shares(x, channels)
        _compute(
            "convolve_back",
            x,
            {
                "plane0": x,
                "kernel0": kernels,
                "offset0": offset,
                "gradient": gradient.contiguous(),
                "out": of_x,
                "of_kernel": of_kernel,
                "of_offset": of_offset,
            },
            activated=ctx.gelu,
        )
        of_offset = None if of_offset is None else _total(of_offset)
        return of_x, _kernels(of_kernel, channels)[0], of_offset, None


class _Project(torch.autograd.Function):
    """All pixels are one column of rows of one pixel, cut into a few long parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gelu: bool, count: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        matrices = [one.contiguous() for one in weights[:count]]
        offsets = [one.contiguous() for one in weights[count:]]
        planes = [x.new_empty(*x.shape[:-1], len(one)) for one in matrices]
        _compute(
            "expand",
            _column(x),
            {**_each("matrix", matrices), **_each("offset", offsets), **_each("plane", planes)},
            **_project_sizes(x, matrices),
            activated=gelu,
        )
        ctx.save_for_backward(x, *matrices)
        ctx.gelu, ctx.has_offsets = gelu, bool(offsets)
        return tuple(planes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        sizes = _project_sizes(x, matrices)
        column, (out, channels) = _column(x), matrices[0].shape
        shares = -(-len(column[0]) // sizes["part"])
        of_x, of_matrix = torch.empty_like(x), x.new_zeros(shares, len(matrices), out, channels)
        of_offset = x.new_zeros(shares, len(matrices), out) if ctx.has_offsets else None
        _compute(
            "project_back",
            column,
            {
                **_each("matrix", matrices),
                **_each("plane", [one.contiguous() for one in gradients]),
                "out": of_x,
                "of_matrix": of_matrix,
                "of_offset": of_offset,
            },
            **sizes,
            activated=ctx.gelu,
        )
        of_offsets = () if of_offset is None else _total(of_offset).unbind()
        return of_x, None, None, *_total(of_matrix).unbind(), *of_offsets


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
                **_weights(weight, bias, project_in, kernels),
                **_each("plane", planes),
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
        of_weight, of_bias = _total(of_norm)
        of_in, of_out = _total(of_matrix)[:, :hidden], _total(of_last)[:, :hidden]
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
        planes, kernels = x.new_empty(3, *x.shape), _taps(depthwise)
        outputs = _correlated(x, heads)
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
            {**norm, **kept, **outputs},
            heads=heads,
            epsilon=epsilon,
        )
        ctx.save_for_backward(x, weight, bias, qkv, planes, kernels)
        ctx.epsilon, ctx.heads = epsilon, heads
        return _summed(outputs, len(x))

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
                **_weights(weight, bias, qkv, kernels),
                **_each("plane", planes),
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
        of_weight, of_bias = _total(of_norm)
        of_depthwise = _kernels(of_kernel, channels)
        return of_x, of_weight, of_bias, None, _total(of_matrix), of_depthwise, None


class _CorrelatePlanes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_bhwc: Tensor, k_bhwc: Tensor, v_bhwc: Tensor, depthwise: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        planes = [one.contiguous() for one in (q_bhwc, k_bhwc, v_bhwc)]
        kernels, outputs = _taps(depthwise), _correlated(planes[2], heads)
        given = _each("plane", planes) | _each("kernel", kernels)
        _compute("correlate", planes[2], {**given, **outputs}, heads=heads)
        ctx.save_for_backward(*planes, kernels)
        ctx.heads = heads
        return _summed(outputs, len(v_bhwc))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_v: Tensor, of_gram: Tensor, of_squares: Tensor
    ) -> tuple[Tensor | None, ...]:
        *planes, kernels = ctx.saved_tensors
        of_planes = [torch.empty_like(one) for one in planes]
        of_kernel = _shares(planes[0], 3, 9, planes[0].shape[-1])
        _compute(
            "correlate_back",
            planes[2],
            {
                **_each("plane", planes),
                **_each("kernel", kernels),
                "gradient": of_v.contiguous(),
                "of_gram": of_gram.contiguous(),
                "of_squares": of_squares.contiguous(),
                **dict(zip(("out", "out1", "out2"), of_planes, strict=True)),
                "of_kernel": of_kernel,
            },
            heads=ctx.heads,
        )
        return *of_planes, _kernels(of_kernel, planes[0].shape[-1]), None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor | None, v_bhwc: Tensor, matrix_boc: Tensor) -> Tensor:
        x = None if x_bhwc is None else x_bhwc.contiguous()
        v, matrix = v_bhwc.contiguous(), matrix_boc.contiguous()
        out = torch.empty_like(v)
        _compute("mix", v, {"x": x, "plane0": v, "last": matrix, "out": out}, part=LEAST_PART)
        ctx.save_for_backward(v, matrix)
        ctx.adds = x is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
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
        of_x = gradient if ctx.adds else None
        return of_x, of_v, _totals(of_matrix, len(v))


class _LowPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, taps_b9c: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = x_bhwc.contiguous(), taps_b9c.contiguous()
        low, high = torch.empty_like(x), torch.empty_like(x)
        given = {"kernel0": taps, "out": low, "out1": high}
        _compute("low_pass", x, given, part=_straight_part(x.shape[1]))
        ctx.save_for_backward(x, taps)
        return low, high

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_low: Tensor, of_high: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        of_x, of_taps = torch.empty_like(x), _shares(x, *taps.shape[1:])
        given = {
            "kernel0": taps,
            "gradient": of_low.contiguous(),
            "plane0": of_high.contiguous(),
            "out": of_x,
            "of_kernel": of_taps,
        }
        _compute("low_pass_back", x, given)
        return of_x, _totals(of_taps, len(x))


def _column(x: Tensor) -> Tensor:
    """(..., C) -> (1, P, 1, C)."""
    return x.view(1, -1, 1, x.shape[-1])


def _project_sizes(x: Tensor, matrices: Sequence[Tensor]) -> dict[str, int]:
    pixels, (out, channels) = x.numel() // x.shape[-1], matrices[0].shape
    part = max(PIXELS, -(-pixels // SHARES))
    return {"hidden": out, "part": part, "lanes": _lanes(channels, 1, out)}


def _correlated(x_bhwc: Tensor, heads: int, part: int = PART) -> dict[str, Tensor]:
    """Room for what `correlate` gives."""
    channels = x_bhwc.shape[-1]
    each = channels // heads
    return {
        "out": torch.empty_like(x_bhwc),
        "gram": _shares(x_bhwc, heads, each, each, part=part),
        "squares": _shares(x_bhwc, 2, channels, part=part),
    }


def _summed(outputs: dict[str, Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    gram, squares = (_totals(outputs[name], batch) for name in ("gram", "squares"))
    return outputs["out"], gram, squares


def _lanes(channels: int, heads: int = 1, out: int | None = None) -> int:
    """The widest vectors that these channels fill, split among the heads; 0: none."""
    even = math.gcd(channels, channels if out is None else out)
    return next((lanes for lanes in KERNELS if even % (heads * lanes) == 0), 0)


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
    tensors: Mapping[str, Tensor | None],
    *,
    hidden: int | None = None,
    heads: int = 1,
    part: int = PART,
    lanes: int | None = None,
    activated: bool = False,
    epsilon: float = 0.0,
) -> None:
    """Call the C file; `tensors` are contiguous fp32 or None, by the names in `ADDRESSES`."""
    addresses = [0] * len(ADDRESSES)
    for name, one in {"x": x_bhwc, **tensors}.items():
        if one is not None:
            addresses[_INDEX[name]] = one.data_ptr()
    channels = x_bhwc.shape[-1]
    lanes = _lanes(channels, heads) if lanes is None else lanes
    hidden = channels if hidden is None else hidden
    streams = max(sum(map(bool, addresses[first : first + 3])) for first in _STREAMS)
    padded = hidden + -hidden % lanes
    sizes = (*x_bhwc.shape, hidden, padded, heads, part, int(activated), streams)
    KERNELS[lanes].run(KINDS.index(kind), addresses, sizes, epsilon, torch.get_num_threads())


def _weights(
    weight: Tensor, bias: Tensor, matrices: Iterable[Tensor], kernels: Iterable[Tensor]
) -> dict[str, Tensor]:
    """The norm's, the expansion's and the depth-wise convolutions'."""
    norm = {"weight": weight, "bias": bias}
    return norm | _each("matrix", matrices) | _each("kernel", kernels)


def _each(name: str, ones: Iterable[Tensor]) -> dict[str, Tensor]:
    """`matrix0`, `matrix1`, ..."""
    return {f"{name}{i}": one for i, one in enumerate(ones)}


def _straight_part(height: int) -> int:
    """Where nothing is summed over the parts, or no gradient is wanted, small pictures are cut into
    smaller ones."""
    return min(PART, max(LEAST_PART, -(-height // 2)))


def _taps(kernels: Tensor, padded: int | None = None) -> Tensor:
    """(S, C, 1, 3, 3) -> (S, 9, C), with zeros up to `padded` channels."""
    taps = kernels.flatten(2).transpose(1, 2)
    missing = 0 if padded is None else padded - taps.shape[-1]
    return F.pad(taps, (0, missing)) if missing else taps.contiguous()


def _kernels(shares: Tensor, channels: int) -> Tensor:
    """(tasks, S, 9, padded) -> (S, C, 1, 3, 3), summed in a fixed order."""
    taps = _total(shares)[..., :channels].transpose(1, 2)
    return taps.reshape(*taps.shape[:2], 1, 3, 3)


def _shares(x_bhwc: Tensor, *shape: int, part: int = PART) -> Tensor:
    """Room for a sum from each part of the rows of each picture."""
    return x_bhwc.new_zeros(x_bhwc.shape[0] * -(-x_bhwc.shape[1] // part), *shape)


def _total(shares: Tensor) -> Tensor:
    """Sum over the first dimension, in its order."""
    return _totals(shares, 1)[0]


def _totals(shares: Tensor, groups: int) -> Tensor:
    """(groups · S, ...) -> (groups, ...), the sums of S that follow each other, in their order."""
    each = shares.shape[0] // groups
    if each == 1:
        return shares
    totals = shares.new_empty(groups, *shares.shape[1:])
    sizes = (groups, each, totals.numel() // groups, torch.get_num_threads())
    next(iter(KERNELS.values())).sum_shares(shares.data_ptr(), totals.data_ptr(), *sizes)
    return totals
