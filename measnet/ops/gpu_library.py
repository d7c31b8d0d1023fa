"""Which work the Triton kernels take, and how they are started.

Nothing here imports Triton before a kernel is to run. On the device `meta` a kernel is counted and
not run; so memory, launches and traffic of a training step are known without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from measnet.errors import typed
from measnet.hardware import Decision
from measnet.internals import is_sharded
from measnet.ops.choice import acceleration_allowed

MULTIPLE = 16
"""Channels (of a head, too) must be a multiple of this: the least side of a product of tiles."""
WIDEST = 1024
"""Most channels of one feature map."""
WIDEST_HEAD = 128
"""Most channels of one head; above 64 torch computes the small matrix of attention."""
WIDEST_EXPERTS = {torch.bfloat16: 256, torch.float32: 128}
"""Most channels of features that go through experts: a tile of pixels stays in registers."""
MOST_EXPERTS = 64
"""The gates of a pixel stay in registers."""
LEAST_CAPABILITY = (8, 0)
"""What Triton supports."""
_stand_in = ""
"""A device other than `cuda` whose tensors take the kernels' path: `cpu` or `meta`."""


class Launch(NamedTuple):
    """One start of a kernel, as `counting` saw it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    """Compile-time constants, `num_warps` and `num_stages`."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)

    @property
    def bytes(self) -> int:
        """Sizes of all tensors that it reads or writes, each counted once."""
        tensors = {id(one): one for one in self.arguments if isinstance(one, Tensor)}
        return sum(one.numel() * one.element_size() for one in tensors.values())


class Weight(NamedTuple):
    """A parameter, and how the kernels read it: padded with zeros behind its own numbers."""

    parameter: Tensor
    view: Tensor
    """Its numbers in three dimensions, detached."""
    sizes: tuple[int, int, int]
    """At least those of the view; the first is the same."""
    matrix: bool
    """In the type of the features; otherwise fp32."""


@runtime_checkable
class HasWeights(Protocol):
    """A module whose weights `packed_weights` prepares."""

    def kernel_weights(self) -> Iterator[Weight]:
        """Those that the kernels read in another form than the parameter has."""
        ...


_launches: list[Launch] | None = None


@cache
def installed() -> bool:
    """Whether Triton is there; torch's builds for CUDA bring it."""
    return find_spec("triton") is not None


@cache
def choice(device: torch.device) -> Decision:
    """`triton` or `torch`: what computes the network's operations on this GPU, and why.

    At the first call a small kernel is built and run. Triton builds with a C compiler and Python's
    headers; many machines have neither, and torch alone computes the same there, only slower.
    """
    if not installed():
        return Decision("torch", "Triton is not installed; pip install triton")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        version = ".".join(map(str, capability))
        return Decision("torch", f"compute capability {version}; the kernels need 8.0")
    from measnet.ops.gpu import trial

    try:
        good = trial.doubles(device)
    except Exception as error:  # compilers, headers and drivers fail in many ways
        return Decision(
            "torch",
            f"Triton cannot build here ({typed(error)}); it needs a C compiler "
            "and Python's headers (apt-get install gcc python3-dev)",
        )
    if not good:
        return Decision("torch", "a kernel of Triton gave a wrong result; look at the driver")
    import triton  # its package may have another name, and so no known version

    return Decision("triton", f"the kernels of measnet.ops.gpu, Triton {triton.__version__}")


@contextmanager
def stand_in(device: str) -> Iterator[None]:
    """Within it, tensors of `device` take the kernels' path as if they lay on a GPU.

    Args:
        device: `meta`, where kernels are counted and not run; or `cpu`, where Triton's interpreter
            runs them (environment variable `TRITON_INTERPRET=1`, set before the first import).
    """
    global _stand_in
    before, _stand_in = _stand_in, device
    try:
        yield
    finally:
        _stand_in = before


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Collects the kernels that start within it, on whichever device."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


def fits(x: Tensor, *weights: Tensor | None, heads: int | None = None) -> bool:
    """Whether the Triton kernels compute this; asked first for what is quick to know.

    Args:
        x: the features, channels last.
        weights: parameters that take part; None is one that is not there.
        heads: of an attention, which split the channels; None where there is none.
    """
    channels = x.shape[-1]
    head = channels // (heads or 1)
    return (
        acceleration_allowed()
        and x.device.type in ("cuda", _stand_in)
        and channels % ((heads or 1) * MULTIPLE) == 0
        and channels <= WIDEST
        and (heads is None or head <= WIDEST_HEAD)
        and all(_is_complete(weight) for weight in weights if weight is not None)
        and takes(x)
    )


def takes(x: Tensor) -> bool:
    """Whether kernels compute with this tensor, on its device."""
    return (
        acceleration_allowed()
        and x.device.type in ("cuda", _stand_in)
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and feature_dtype(x) in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and (choice(x.device).choice == "triton" if x.is_cuda else installed())
    )


def fits_experts(x: Tensor, experts: int, *weights: Tensor | None) -> bool:
    """The same for a library of `experts` experts."""
    return (
        fits(x, *weights)
        and x.shape[-1] <= WIDEST_EXPERTS[feature_dtype(x)]
        and experts <= MOST_EXPERTS
    )


@contextmanager
def packed_weights(model: nn.Module, image: Tensor) -> Iterator[None]:
    """Within it the kernels find the weights of `model` as they read them, made by one kernel.

    Where they do not compute, or the weights are in parts, nothing happens.

    Args:
        model: its parts that are `HasWeights` say which.
        image: on the device, of the type that the network begins with.
    """
    if not takes(image):
        yield
        return
    parts = [one for one in model.modules() if isinstance(one, HasWeights)]
    weights = [weight for part in parts for weight in part.kernel_weights()]
    if not weights or any(
        one.parameter.dtype != torch.float32 or not _is_complete(one.parameter) for one in weights
    ):
        yield
        return
    from measnet.ops.gpu import packing

    with packing.packed(model, weights, feature_dtype(image)):
        yield


def feature_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in: autocast's type where it is on, else that of the features."""
    device = "cpu" if x.device.type == "meta" else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a Triton kernel on the current stream, or count it where its tensors are on `meta`."""
    if _launches is not None:
        _launches.append(Launch(kernel, grid, args, constants))
    where = next(one.device for one in args if isinstance(one, Tensor))
    if where.type == "meta":
        return
    from triton.errors import TritonError

    elsewhere = where.type == "cuda" and where.index != torch.cuda.current_device()
    try:
        # Triton starts on the current device.
        with torch.cuda.device(where) if elsewhere else nullcontext():
            kernel[grid](*args, **constants)
    except TritonError as error:  # it is no RuntimeError, as torch's errors of a device are
        raise RuntimeError(
            f"the kernel {kernel.__name__} cannot be built or started on this card ({error}); "
            "please report it with the card's name"
        ) from error


def start(again: Launch) -> None:
    """Run a kernel once more with what it was started with."""
    again.kernel[again.grid](*again.arguments, **again.constants)


def products(dtype: torch.dtype) -> str:
    """How a product of fp32 tiles is computed: as three of TF32, which keeps fp32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = MULTIPLE) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _is_complete(weight: Tensor) -> bool:
    """DeepSpeed's ZeRO-3 keeps a parameter in parts, except in the forward of its own module."""
    return weight.is_floating_point() and not is_sharded(weight)
