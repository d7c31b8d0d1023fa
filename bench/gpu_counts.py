"""Launches and memory traffic of one training step, counted on `meta`."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measnet.autocast import CudaAutocast
from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import gpu_library
from measnet.ops.choice import torch_only

GB = 1e9


class Traffic(TorchDispatchMode):
    """Counts torch's operations that run a kernel, and the tensors that these read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0
        self.largest: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.name in EMPTY:
            return out
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        results = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        moved = {id(one): one for one in inputs + results}
        amount = sum(one.numel() * one.element_size() for one in moved.values())
        self.launches += 1
        self.bytes += amount
        self.largest[func._schema.name] += amount
        return out


EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"} | {
    "aten::detach",
    "aten::new_empty_strided",
}
"""They only set memory aside."""


def count(config: ModelConfig, batch: int = 8, crop: int = 128) -> Iterator[tuple[str, Any]]:
    """Name -> launches and GB, without the optimizer: torch alone, and with the kernels."""
    config = replace_dotted(config, {"expert_path": "dense"})
    totals = {}
    for name, accelerated in (("torch alone", False), ("with Triton", True)):
        model = MEASNet(config).to("meta").train()
        image = torch.empty(batch, 3, crop, crop, device="meta")
        traffic = Traffic()
        switch = gpu_library.stand_in("meta") if accelerated else torch_only()
        with switch, gpu_library.counting() as launches, traffic:
            with CudaAutocast(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                restoration = model(image)
            restoration_loss(restoration, image, 1e-4).total.backward()
        own = sum(one.bytes for one in launches)
        totals[name] = {
            "launches": traffic.launches + len(launches),
            "gb": (traffic.bytes + own) / GB,
            "triton_launches": len(launches),
            "triton_gb": own / GB,
        }
        yield name, totals[name]
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for one in launches:
        by_kernel[one.name][0] += 1
        by_kernel[one.name][1] += one.bytes / GB
    for name, (times, gb) in sorted(by_kernel.items(), key=lambda item: -item[1][1]):
        yield f"Triton {name.strip('_')}", {"launches": times, "gb": gb}
    for name, amount in sorted(traffic.largest.items(), key=lambda item: -item[1])[:8]:
        yield f"torch {name.removeprefix('aten::')}", {"gb": amount / GB}
