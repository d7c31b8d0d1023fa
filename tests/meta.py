"""Shows without a GPU what a GPU would refuse or wait for: runs on torch's device `meta`.

Tensors on `meta` have a shape and a type, but no numbers. `OneDevice` watches every operation on
them; `MetaAutocast` is CUDA's autocast, which torch does not offer there.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = ("aten::_to_copy", "aten::copy_")
FROM_DATA = (torch.tensor, torch.as_tensor)
"""Make a tensor from numbers of Python: on the CPU, then copied. Not seen as an operation."""

UNREPEATABLE = {
    f"aten::{name}"
    for name in (
        *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad2d_backward"),
        *("upsample_linear1d_backward", "upsample_bilinear2d_backward"),
        *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
        *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward"),
        *("grid_sampler_2d_backward", "embedding_bag", "bincount", "histc", "kthvalue", "median"),
        *("cumsum", "nll_loss2d_forward", "put_"),
    )
}
"""What CUDA refuses under `torch.use_deterministic_algorithms` (torch's documentation of it)."""
INSIDE = {"square": "pow", "interpolate": "upsample_bilinear2d"}
"""Composite operation -> the operation of autocast's lists that it calls."""


class OneDevice(ExitStack):
    """Refuses operations over two devices; counts what makes the processor wait for the device.

    meta itself refuses most mixtures, but accepts weights of a convolution, indices and operands of
    in-place operations from the CPU. Numbers without dimensions may come from there, as on CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        """Numbers or tensors brought to the CPU: `.item()`, `bool()`, `.tolist()`, `.cpu()`."""
        self.copies = 0
        """Tensors brought from the CPU: torch waits until the copy of pageable memory is done."""
        self.operations: set[str] = set()
        """Names of all operations, such as `aten::mul`."""

    def __enter__(self) -> "OneDevice":
        super().__enter__()
        self.enter_context(_Operations(self))
        self.enter_context(_Creations(self))
        return self


class _Operations(TorchDispatchMode):
    def __init__(self, seen: OneDevice) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self._seen.operations.add(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {t.device.type for t in tensors}
        if name == "aten::_local_scalar_dense" and devices == {"meta"}:
            self._seen.reads += 1
            return 1
        if name in COPIES:
            source = tensors[-1].device.type
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            self._seen.copies += (source, target) == ("cpu", "meta")
            if (source, target) == ("meta", "cpu"):
                self._seen.reads += 1
                return torch.ones(tensors[-1].shape, dtype=kwargs.get("dtype", tensors[0].dtype))
        elif len({t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}) > 1:
            raise AssertionError(f"{name} mixes devices: {[str(t.device) for t in tensors]}")
        return func(*args, **kwargs)


class _Creations(TorchFunctionMode):
    def __init__(self, seen: OneDevice) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._seen.copies += func in FROM_DATA and out.device.type == "meta"
        return out


class MetaAutocast(TorchFunctionMode):
    """`torch.autocast("cuda", dtype)` for tensors of any device, by the lists of torch's header.

    Not seen is what a composite operation computes inside; those that the network uses are in
    `INSIDE`.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        """None: no autocast."""
        super().__init__()
        self._dtype = dtype
        self._low = _listed("LOWER_PRECISION_FP")
        self._full = _listed("FP32") | _listed("FP32_SET_OPT_DTYPE")
        self._promoted = _listed("PROMOTE")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = re.sub(r"^__r?(\w+)__$", r"\1", getattr(func, "__name__", ""))
        name = INSIDE.get(name, name)
        given = [t for t in tree_leaves((args, kwargs)) if _eligible(t)]
        if self._dtype is None or not given:
            return func(*args, **kwargs)
        widest = torch.float32 if torch.float32 in {t.dtype for t in given} else self._dtype
        for listed, target in (
            (self._low, self._dtype),
            (self._full, torch.float32),
            (self._promoted, widest),
        ):
            if name in listed:
                args, kwargs = _cast((args, kwargs), target)
        return func(*args, **kwargs)

    @contextmanager
    def block(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True
    ) -> Iterator[None]:
        """Stands for `torch.autocast` inside the network, which switches it off in places."""
        before, self._dtype = self._dtype, (dtype or self._dtype) if enabled else None
        try:
            yield
        finally:
            self._dtype = before


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda value: value.to(dtype) if _eligible(value) else value, arguments)


def _eligible(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _listed(name: str) -> set[str]:
    """Operations in one of the lists that torch's autocast for CUDA is compiled from."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    (body,) = re.findall(rf"#define AT_FORALL_{name}\(_\)((?:.*\\\n)*.*)", header.read_text())
    return set(re.findall(r"_\((\w+)", body))
