"""The weights of all transformer blocks as the kernels read them, made by one kernel.

The kernels read matrices in the features' type, with hidden channels padded to a multiple of 16.
One by one, each weight would take two or three launches in each forward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from measnet.ops.gpu_library import Weight, ceil_div, launch

BLOCK = 2048
"""Numbers that a program makes."""


@triton.jit
def _pack(items, programs, out, BLOCK: tl.constexpr):
    """One block of one weight. A row of `items` is what `_Table` writes."""
    at = programs + 2 * tl.program_id(0)
    item = items + tl.load(at) * 10
    place = tl.load(at + 1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(item + 1)
    rows = tl.load(item + 2).to(tl.int32)
    columns = tl.load(item + 3).to(tl.int32)
    inside = place < tl.load(item + 4).to(tl.int32)
    k = place % columns
    j = place // columns % rows
    i = place // (columns * rows)
    known = inside & (j < tl.load(item + 5)) & (k < tl.load(item + 6))
    source = tl.load(item).to(tl.pointer_type(tl.float32))
    source += i * tl.load(item + 7) + j * tl.load(item + 8) + k * tl.load(item + 9)
    value = tl.load(source, mask=known, other=0.0)
    tl.store(out + first + place, value.to(out.dtype.element_ty), mask=inside)


class _Table(NamedTuple):
    """What one start of the kernel makes: all weights that become the same type."""

    weights: list[Weight]
    dtype: torch.dtype
    items: Tensor
    """(weights, 10) int64: address, first place in the result, rows and columns of the result, its
    numbers, rows and columns of the weight, and the weight's three strides."""
    programs: Tensor
    """(programs, 2) int32: weight, and block of its result."""
    places: list[int]
    """Where each weight begins in the result, and the result's size."""

    @classmethod
    def of(cls, weights: list[Weight], dtype: torch.dtype, device: torch.device) -> "_Table":
        items, programs, places = [], [], [0]
        for number, one in enumerate(weights):
            count = prod(one.sizes)
            blocks = ceil_div(count, BLOCK)
            _, rows, columns = one.view.shape
            shape = (*one.sizes[1:], count, rows, columns)
            items.append([one.view.data_ptr(), places[-1], *shape, *one.view.stride()])
            programs += [[number, block] for block in range(blocks)]
            places.append(places[-1] + blocks * BLOCK)  # each begins where wide loads may
        return cls(
            *(weights, dtype, torch.tensor(items, device=device)),
            *(torch.tensor(programs, dtype=torch.int32, device=device), places),
        )

    def make(self) -> dict[int, Tensor]:
        """Id of each parameter -> the weight as the kernels read it."""
        out = self.items.new_empty(self.places[-1], dtype=self.dtype)
        launch(_pack, (len(self.programs),), self.items, self.programs, out, BLOCK=BLOCK)
        return {
            id(one.parameter): out[first : first + prod(one.sizes)].view(one.sizes)
            for one, first in zip(self.weights, self.places[:-1], strict=True)
        }


_tables: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], list[_Table]]] = WeakKeyDictionary()
_packed: dict[int, Tensor] = {}


@contextmanager
def packed(model: nn.Module, weights: Sequence[Weight], features: torch.dtype) -> Iterator[None]:
    """Within it `of` has the weights; made anew each time, because training changes them.

    Args:
        model: whose weights they are. Where each lies is written down once, and again if one has
            moved.
        weights: all fp32.
        features: type of the features.
    """
    global _packed
    key = (features, *(one.view.data_ptr() for one in weights))
    known, tables = _tables.get(model, (None, []))
    if known != key:
        device = weights[0].parameter.device
        by_type: dict[torch.dtype, list[Weight]] = {}
        for one in weights:
            by_type.setdefault(features if one.matrix else torch.float32, []).append(one)
        tables = [_Table.of(some, dtype, device) for dtype, some in by_type.items()]
        _tables[model] = key, tables
    before, _packed = _packed, {}
    try:
        for table in tables:
            _packed |= table.make()
        yield
    finally:
        _packed = before


def of(parameter: Tensor) -> Tensor | None:
    """The parameter as the kernels read it; None outside `packed`."""
    return _packed.get(id(parameter))
