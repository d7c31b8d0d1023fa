"""The compiled library for CPUs: which processors have it, which work it takes, how it is called.

Built at installation from `_kernels.h`, once for vectors of 16 floats and once for 8.
"""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from measnet.hardware import Decision
from measnet.internals import is_sharded
from measnet.ops.choice import acceleration_allowed


def _built() -> dict[int, ModuleType]:
    """Floats per vector -> the kernels for it, the widest that this processor has first."""
    found = {}
    for lanes in (16, 8):
        try:
            found[lanes] = import_module(f"measnet.ops._kernels{lanes}")
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
    *("x", "weight", "bias", "matrix", "matrix1", "matrix2", "plane", "plane1", "plane2"),
    *("kernel", "kernel1", "kernel2", "offset", "offset1", "offset2", "last", "temperature"),
    *("project_out", "gradient", "besides", "of_mixer", "out", "out1", "out2", "mixer", "gram"),
    *("squares", "of_norm", "of_matrix", "of_kernel", "of_offset", "of_last", "of_temperature"),
    "of_project_out",
)
_INDEX = {name: at for at, name in enumerate(ADDRESSES)}
_STACKED = ("matrix", "plane", "kernel", "offset")
"""There are one to three of each, at addresses that follow each other."""


def choice() -> Decision:
    """`compiled` or `torch`: what computes the network's operations on this CPU."""
    if not KERNELS:
        return Decision("torch", "no C compiler at installation, or a CPU without AVX2; slower")
    return Decision("compiled", f"measnet.ops, vectors of {max(KERNELS)} floats")


def fits(x: Tensor, *weights: Tensor | None, heads: int = 1, out: int | None = None) -> bool:
    """Whether the kernels compute this; asked first for what is quick to know.

    Args:
        x: the features, channels last.
        weights: parameters that take part; None is one that is not there.
        heads: they split the channels.
        out: channels of the output, where those matter too.
    """
    return (
        acceleration_allowed()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and all(_is_whole(weight) for weight in weights if weight is not None)
        and widest_lanes(x.shape[-1], heads, out) > 0
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)  # not one without memory of its own
    )


def _is_whole(weight: Tensor) -> bool:
    """DeepSpeed's ZeRO-3 keeps a parameter in parts, except in the forward of its own module."""
    return weight.dtype == torch.float32 and not is_sharded(weight)


def widest_lanes(channels: int, heads: int = 1, out: int | None = None) -> int:
    """The widest vectors that these channels fill, split among the heads; 0: none."""
    for lanes in KERNELS:
        if channels % (heads * lanes) == 0 and (out is None or out % (heads * lanes) == 0):
            return lanes
    return 0


def straight_part(height: int) -> int:
    """Where nothing is summed over the parts, or no gradient is wanted, small pictures are cut into
    smaller ones."""
    return min(PART, max(LEAST_PART, -(-height // 2)))


def compute(
    kind: str,
    x_bhwc: Tensor,
    tensors: Mapping[str, Any],
    *,
    hidden: int | None = None,
    heads: int = 1,
    part: int = PART,
    lanes: int | None = None,
    activated: bool = False,
    epsilon: float = 0.0,
) -> None:
    """Call the C file.

    Args:
        kind: one of `KINDS`.
        x_bhwc: its sizes are those of the work.
        tensors: contiguous fp32 or None, by the names in `ADDRESSES`; of what `_STACKED` names
            either a sequence, or one tensor that holds them along its first dimension.
        hidden: channels that x is expanded to, if not as many as it has.
        heads: they split the channels.
        part: rows of a picture that are one piece of work.
        lanes: floats per vector, if not the most that fit.
        activated: gelu.
        epsilon: of the norm.
    """
    addresses = [0] * len(ADDRESSES)
    addresses[0] = x_bhwc.data_ptr()
    streams = 0
    for name, one in tensors.items():
        at = _INDEX[name]
        if one is None:
            addresses[at] = 0
        elif isinstance(one, Tensor):
            addresses[at] = one.data_ptr()
            if name in _STACKED:
                count, apart = one.shape[0], 4 * one.stride(0)
                for i in range(1, count):
                    addresses[at + i] = addresses[at] + i * apart
                streams = max(streams, count)
        else:
            for i, each in enumerate(one):
                addresses[at + i] = 0 if each is None else each.data_ptr()
            if name in _STACKED:
                streams = max(streams, len(one))
    channels = x_bhwc.shape[-1]
    lanes = widest_lanes(channels, heads) if lanes is None else lanes
    hidden = channels if hidden is None else hidden
    padded = hidden + -hidden % lanes
    sizes = (*x_bhwc.shape, hidden, padded, heads, part, int(activated), streams)
    KERNELS[lanes].run(KINDS.index(kind), addresses, sizes, epsilon, torch.get_num_threads())
