"""Finds without a GPU what a GPU would refuse or wait for: runs on torch's device `meta`.

Tensors on `meta` have a shape and a type, but no numbers. `OneDevice` watches every operation on
them. CUDA's autocast is `measnet.autocast.CudaAutocast`; `autocast_list` reads torch's lists of it.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten::_to_copy", "aten::copy_")
FROM_DATA = (torch.tensor, torch.as_tensor)
"""Make a tensor from Python numbers: on the CPU, then copied. Not seen as an operation."""

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


class OneDevice(ExitStack):
    """Refuses operations on two devices; counts what makes the processor wait for the device.

    meta itself refuses most of them, but accepts weights of a convolution, indices and operands of
    in-place operations from the CPU. 0-d tensors may come from the CPU, as on CUDA.
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


class Calls(TorchFunctionMode):
    """Collects the names of the torch functions that are called, such as `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


def autocast_list(name: str) -> set[str]:
    """Operations in one of the lists that torch's autocast for CUDA is compiled from."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    (body,) = re.findall(rf"#define AT_FORALL_{name}\(_\)((?:.*\\\n)*.*)", header.read_text())
    return {operation.strip("_") for operation in re.findall(r"_\((\w+)", body)}
