"""Convolutions on BHWC features: what the network spends its time on.

On a GPU, under `torch.compile`, in an export and under autocast all of them are torch's own. In
fp32 on a CPU a 1×1 convolution goes to the library that multiplies faster, and the depth-wise 3×3
ones to a small C file, where one could be built at installation: torch's gate behind them would
write and keep four more tensors of a block's largest size, and fetching fresh memory costs more
than computing. `bench/model.py` shows what is gained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_run: Callable[..., None] | None
try:
    from measnet._depthwise import run as _run  # type: ignore[no-redef]
except ImportError:
    _run = None

CONVOLUTION_PAYS = 48 * 128
"""Elements of a matrix from which oneDNN trains faster than MKL."""
ROWS = 32
"""Rows of a picture whose share of a kernel's gradient is summed at once; as in the C file."""
CONVOLVE, CONVOLVE_GRADIENTS, GATE, GATE_GRADIENTS = range(4)
ARGUMENTS = (
    *("a", "b", "kernel_a", "kernel_b", "gradient"),
    *("out_a", "out_b", "out_kernel_a", "out_kernel_b"),
)
_allowed = _run is not None


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it, depth-wise convolutions are torch's, as on a GPU; not for several threads."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def convolve(x_bhwc: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """`F.conv2d` with zero padding to the same size (odd kernels) on BHWC features."""
    if bias is None and groups == len(kernel) and _compiled_part_fits(x_bhwc, kernel):
        out: Tensor = _Depthwise.apply(x_bhwc, kernel)
        return out
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    x_bchw = F.conv2d(x_bhwc.permute(0, 3, 1, 2), kernel, bias, padding=padding, groups=groups)
    return x_bchw.permute(0, 2, 3, 1)


def gated_convolve(a_bhwc: Tensor, b_bhwc: Tensor, kernel_a: Tensor, kernel_b: Tensor) -> Tensor:
    """gelu(a ⊛ kernel_a) · (b ⊛ kernel_b), depth-wise; kernels are (C, 1, 3, 3)."""
    if _compiled_part_fits(a_bhwc, kernel_a) and _compiled_part_fits(b_bhwc, kernel_b):
        gated: Tensor = _Gate.apply(a_bhwc, b_bhwc, kernel_a, kernel_b)
        return gated
    a = convolve(a_bhwc, kernel_a, groups=len(kernel_a))
    return F.gelu(a) * convolve(b_bhwc, kernel_b, groups=len(kernel_b))


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` over the last dimension: a 1×1 convolution.

    On a CPU it is computed as one, for torch hands convolutions to oneDNN and matrix products to
    MKL, which uses half of what an AMD processor can do. Not where a small matrix is trained: there
    oneDNN's gradient costs more than the rest gains.
    """
    on_cpu = x.device.type == "cpu" and x.dtype != torch.float64
    small = torch.is_grad_enabled() and matrix.numel() < CONVOLUTION_PAYS
    if not on_cpu or small or x.numel() == 0 or torch.compiler.is_compiling():
        return F.linear(x, matrix, bias)
    row_bchw = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out_bchw = F.conv2d(row_bchw, matrix[:, :, None, None], bias)
    return out_bchw.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(matrix))


def _compiled_part_fits(x_bhwc: Tensor, kernel: Tensor) -> bool:
    """Whether the C file computes this; asked first for what is quick to know."""
    return (
        _allowed
        and x_bhwc.device.type == "cpu"
        and x_bhwc.dtype == kernel.dtype == torch.float32
        and kernel.shape[1:] == (1, 3, 3)
        and len(kernel) % 8 == 0
        and x_bhwc.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x_bhwc) in (Tensor, torch.nn.Parameter)  # not one without memory of its own
    )


class _Depthwise(torch.autograd.Function):
    """x ⊛ kernel; keeps both."""

    @staticmethod
    def forward(ctx: Any, x_bhwc: Tensor, kernel: Tensor) -> Tensor:
        """(B, H, W, C), (C, 1, 3, 3) -> (B, H, W, C)."""
        x, taps = x_bhwc.contiguous(), _taps(kernel)
        ctx.save_for_backward(x, taps)
        out = torch.empty_like(x)
        _compute(CONVOLVE, x, a=x, kernel_a=taps, out_a=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Of the input and of the kernel."""
        x, taps = ctx.saved_tensors
        gradient, of_x, of_taps = gradient.contiguous(), torch.empty_like(x), _shares(x)
        _compute(
            CONVOLVE_GRADIENTS,
            x,
            a=x,
            kernel_a=taps,
            gradient=gradient,
            out_a=of_x,
            out_kernel_a=of_taps,
        )
        return of_x, _kernel(of_taps)


class _Gate(torch.autograd.Function):
    """gelu(a ⊛ kernel_a) · (b ⊛ kernel_b); keeps what goes in and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, a_bhwc: Tensor, b_bhwc: Tensor, kernel_a: Tensor, kernel_b: Tensor
    ) -> Tensor:
        """Two of (B, H, W, C) and two of (C, 1, 3, 3) -> (B, H, W, C)."""
        a, b, taps_a, taps_b = (
            a_bhwc.contiguous(),
            b_bhwc.contiguous(),
            _taps(kernel_a),
            _taps(kernel_b),
        )
        ctx.save_for_backward(a, b, taps_a, taps_b)
        out = torch.empty_like(a)
        _compute(GATE, a, a=a, b=b, kernel_a=taps_a, kernel_b=taps_b, out_a=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of both inputs and both kernels."""
        a, b, taps_a, taps_b = ctx.saved_tensors
        of_a, of_b, of_taps_a, of_taps_b = (
            torch.empty_like(a),
            torch.empty_like(b),
            _shares(a),
            _shares(a),
        )
        _compute(
            GATE_GRADIENTS,
            a,
            a=a,
            b=b,
            kernel_a=taps_a,
            kernel_b=taps_b,
            gradient=gradient.contiguous(),
            out_a=of_a,
            out_b=of_b,
            out_kernel_a=of_taps_a,
            out_kernel_b=of_taps_b,
        )
        return of_a, of_b, _kernel(of_taps_a), _kernel(of_taps_b)


def _compute(kind: int, like_bhwc: Tensor, **tensors: Tensor) -> None:
    """Call the C file, which names its arguments in this order."""
    addresses = (tensors[name].data_ptr() if name in tensors else 0 for name in ARGUMENTS)
    assert _run is not None
    _run(kind, *addresses, *like_bhwc.shape, torch.get_num_threads())


def _taps(kernel: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C)."""
    return kernel.flatten(1).t().contiguous()


def _shares(x_bhwc: Tensor) -> Tensor:
    """Room for a kernel's gradient from each part of the rows of each picture."""
    batch, height, _, channels = x_bhwc.shape
    return x_bhwc.new_zeros(batch * -(-height // ROWS), 9, channels)


def _kernel(shares: Tensor) -> Tensor:
    """(parts, 9, C) -> (C, 1, 3, 3), summed in a fixed order."""
    return shares.sum(0).t().reshape(-1, 1, 3, 3)
