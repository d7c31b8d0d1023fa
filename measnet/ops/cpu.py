"""Operations on fp32 features on a CPU, by the compiled library.

An operation of torch reads its input from memory and writes a new tensor. A transformer block has
some forty of them, and fetching fresh memory costs more than most of them compute. These use what a
1×1 convolution gives a few rows later, while it is in the cache. They keep less for the backward
pass, and compute the rest again. `bench/model.py` shows what is gained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from measnet.ops.cpu_library import (
    LEAST_PART,
    PART,
    PIXELS,
    SHARES,
    compute,
    straight_part,
    widest_lanes,
)


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
    x = x_bhwc.contiguous()
    out = torch.empty_like(x)
    compute(
        "gate",
        x,
        {
            "weight": norm.weight,
            "bias": norm.bias,
            "matrix": project_in.contiguous(),
            "kernel": depthwise.contiguous(),
            "last": project_out.contiguous(),
            "out": out,
        },
        hidden=depthwise.shape[1],
        part=straight_part(x.shape[1]),
        epsilon=norm.eps,
    )
    return out


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
    inputs = (x_bhwc, norm.weight, norm.bias, norm.eps, qkv, depthwise, temperature, project_out)
    if _trains(*inputs):
        trained: Tensor = _Attention.apply(*inputs)
        return trained
    x = x_bhwc.contiguous()
    given = {"weight": norm.weight, "bias": norm.bias, "matrix": qkv.contiguous()}
    part = straight_part(x.shape[1])
    kept = _correlate(x, given, depthwise, temperature, project_out, part, norm.eps)
    return _mix(x, kept["out"], kept["mixer"])


def attend_planes(
    q_bhwc: Tensor,
    k_bhwc: Tensor,
    v_bhwc: Tensor,
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
) -> Tensor:
    """Channel attention of q, k and v that are projected already, from anything; without x."""
    planes = (q_bhwc, k_bhwc, v_bhwc)
    out: Tensor = _AttendPlanes.apply(*planes, depthwise, temperature, project_out)
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
        x, kernel = x_bhwc.contiguous(), kernel.contiguous()
        offset = None if offset is None else offset.contiguous()
        out = torch.empty_like(x)
        given = {"plane": (x,), "kernel": (kernel,), "offset": (offset,), "out": out}
        compute("convolve", x, given, activated=gelu, part=straight_part(x.shape[1]))
        ctx.save_for_backward(x, kernel, offset)
        ctx.gelu = gelu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, offset = ctx.saved_tensors
        of_x, of_kernel, of_offset = _room(x, kernel, offset)
        compute(
            "convolve_back",
            x,
            {
                "plane": (x,),
                "kernel": (kernel,),
                "offset": (offset,),
                "gradient": gradient.contiguous(),
                "out": of_x,
                "of_kernel": of_kernel,
                "of_offset": of_offset,
            },
            activated=ctx.gelu,
        )
        return of_x, of_kernel, of_offset, None


class _Project(torch.autograd.Function):
    """All pixels are one column of rows of one pixel, cut into a few long parts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gelu: bool, count: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        matrices = [one.contiguous() for one in weights[:count]]
        offsets = [one.contiguous() for one in weights[count:]]
        planes = tuple(x.new_empty(*x.shape[:-1], one.shape[0]) for one in matrices)
        compute(
            "expand",
            _column(x),
            {"matrix": matrices, "offset": offsets, "plane": planes},
            **_project_sizes(x, matrices),
            activated=gelu,
        )
        ctx.save_for_backward(x, *matrices)
        ctx.gelu, ctx.has_offsets = gelu, bool(offsets)
        return planes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        of_x, of_matrix = torch.empty_like(x), x.new_empty(len(matrices), *matrices[0].shape)
        of_offset = x.new_empty(of_matrix.shape[:2]) if ctx.has_offsets else None
        compute(
            "project_back",
            _column(x),
            {
                "matrix": matrices,
                "plane": [one.contiguous() for one in gradients],
                "out": of_x,
                "of_matrix": of_matrix,
                "of_offset": of_offset,
            },
            **_project_sizes(x, matrices),
            activated=ctx.gelu,
        )
        of_offsets = () if of_offset is None else of_offset.unbind()
        return of_x, None, None, *of_matrix.unbind(), *of_offsets


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
        x, project_in, depthwise, project_out = (
            one.contiguous() for one in (x_bhwc, project_in, depthwise, project_out)
        )
        hidden = project_in.shape[1]
        planes = x.new_empty(2, *x.shape[:-1], _padded(x, hidden))
        given = {"weight": weight, "bias": bias, "plane": planes}
        sizes: dict[str, Any] = {"hidden": hidden, "epsilon": epsilon}
        compute("expand", x, {**given, "matrix": project_in}, **sizes)
        out = torch.empty_like(x)
        kept = {**given, "kernel": depthwise, "last": project_out, "out": out}
        compute("gate", x, kept, **sizes)
        ctx.save_for_backward(x, weight, bias, project_in, depthwise, project_out, planes)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, project_in, depthwise, project_out, planes = ctx.saved_tensors
        of_x, of_in, of_depthwise, of_out = _room(x, project_in, depthwise, project_out)
        of_norm = x.new_empty(2, x.shape[-1])
        compute(
            "gate_back",
            x,
            {
                "weight": weight,
                "bias": bias,
                "matrix": project_in,
                "plane": planes,
                "kernel": depthwise,
                "last": project_out,
                "gradient": gradient.contiguous(),
                "out": of_x,
                "of_norm": of_norm,
                "of_matrix": of_in,
                "of_kernel": of_depthwise,
                "of_last": of_out,
            },
            **ctx.sizes,
        )
        return of_x, *of_norm.unbind(), None, of_in, of_depthwise, of_out


class _Attention(torch.autograd.Function):
    """Keeps the input, its three projections and v; convolves q and k again."""

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
    ) -> Tensor:
        x, qkv = x_bhwc.contiguous(), qkv.contiguous()
        given = {"weight": weight, "bias": bias, "plane": x.new_empty(3, *x.shape)}
        compute("expand", x, {**given, "matrix": qkv}, epsilon=epsilon)
        kept = _correlate(x, given, depthwise, temperature, project_out)
        ctx.save_for_backward(x, qkv, *kept.values())
        ctx.names, ctx.epsilon = tuple(kept), epsilon
        return _mix(x, kept["out"], kept["mixer"])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, qkv, *tensors = ctx.saved_tensors
        kept = dict(zip(ctx.names, tensors, strict=True))
        gradient = gradient.contiguous()
        of_x, of_qkv = _room(x, qkv)
        of_norm = x.new_empty(2, x.shape[-1])
        to = {"matrix": qkv, "besides": gradient, "out": of_x}
        to |= {"of_norm": of_norm, "of_matrix": of_qkv}
        of_attention = _correlate_back(x, kept, gradient, to, ctx.epsilon)
        return of_x, *of_norm.unbind(), None, of_qkv, *of_attention


class _AttendPlanes(torch.autograd.Function):
    """Keeps q, k and v, and v convolved; convolves q and k again."""

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
        planes = [one.contiguous() for one in (q_bhwc, k_bhwc, v_bhwc)]
        kept = _correlate(planes[2], {"plane": planes}, depthwise, temperature, project_out)
        del kept["plane"]
        ctx.save_for_backward(*planes, *kept.values())
        ctx.names = tuple(kept)
        return _mix(None, kept["out"], kept["mixer"])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        planes, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        kept = dict(zip(ctx.names, tensors, strict=True)) | {"plane": planes}
        of_planes = _room(*planes)
        to = {"out": of_planes}
        return *of_planes, *_correlate_back(planes[2], kept, gradient.contiguous(), to)


def _correlate(
    x: Tensor,
    given: Mapping[str, Any],
    depthwise: Tensor,
    temperature: Tensor,
    project_out: Tensor,
    part: int = PART,
    epsilon: float = 0.0,
) -> dict[str, Any]:
    """`given` and what attention needs and gives: v convolved as `out`, and the `mixer`."""
    channels, heads = x.shape[-1], temperature.shape[0]
    kept = {
        **given,
        "kernel": depthwise.contiguous(),
        "temperature": temperature.contiguous(),
        "project_out": project_out.contiguous(),
        "out": torch.empty_like(x),
        "mixer": x.new_empty(x.shape[0], channels, channels),
        "gram": x.new_empty(x.shape[0], channels, channels // heads),
        "squares": x.new_empty(x.shape[0], 2, channels),
    }
    compute("correlate", x, kept, heads=heads, part=part, epsilon=epsilon)
    return kept


def _correlate_back(
    x: Tensor,
    kept: Mapping[str, Any],
    gradient: Tensor,
    to: Mapping[str, Any],
    epsilon: float = 0.0,
) -> list[Tensor]:
    """From the gradient of what is mixed; those of the convolutions, temperature and projection."""
    v, mixer, temperature = kept["out"], kept["mixer"], kept["temperature"]
    of_v, of_mixer = _room(v, mixer)
    given = {"plane": (v,), "mixer": mixer, "gradient": gradient}
    compute("mix_back", v, {**given, "out": of_v, "of_mixer": of_mixer})
    of_attention = _room(kept["kernel"], temperature, kept["project_out"])
    names = ("of_kernel", "of_temperature", "of_project_out")
    given = {**kept, "gradient": of_v, "of_mixer": of_mixer, **to}
    given |= dict(zip(names, of_attention, strict=True))
    compute("correlate_back", x, given, heads=temperature.shape[0], epsilon=epsilon)
    return of_attention


def _mix(x: Tensor | None, v: Tensor, mixer: Tensor) -> Tensor:
    out = torch.empty_like(v)
    given = {"x": x, "plane": (v,), "mixer": mixer, "out": out}
    compute("mix", v, given, part=LEAST_PART)
    return out


class _LowPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, taps_b9c: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = x_bhwc.contiguous(), taps_b9c.contiguous()
        low, high = _room(x, x)
        given = {"kernel": (taps,), "out": (low, high)}
        compute("low_pass", x, given, part=straight_part(x.shape[1]))
        ctx.save_for_backward(x, taps)
        return low, high

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_low: Tensor, of_high: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        of_x, of_taps = _room(x, taps)
        given = {
            "kernel": (taps,),
            "gradient": of_low.contiguous(),
            "plane": (of_high.contiguous(),),
            "out": of_x,
            "of_kernel": of_taps,
        }
        compute("low_pass_back", x, given)
        return of_x, of_taps


def _column(x: Tensor) -> Tensor:
    """(..., C) -> (1, P, 1, C)."""
    return x.view(1, -1, 1, x.shape[-1])


def _project_sizes(x: Tensor, matrices: Sequence[Tensor]) -> dict[str, int]:
    pixels, (out, channels) = x.numel() // x.shape[-1], matrices[0].shape
    part = max(PIXELS, -(-pixels // SHARES))
    return {"hidden": out, "part": part, "lanes": widest_lanes(channels, 1, out)}


def _padded(x_bhwc: Tensor, hidden: int) -> int:
    """Hidden channels up to whole vectors."""
    return hidden + -hidden % widest_lanes(x_bhwc.shape[-1])


def _trains(*inputs: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(one, Tensor) and one.requires_grad for one in inputs
    )


def _room(*like: Any) -> list[Any]:
    """Where gradients of these go; None for None."""
    return [None if one is None else torch.empty_like(one) for one in like]
