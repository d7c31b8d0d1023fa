"""Sums over all pixels of a picture, also while the network sees only a part of it at a time.

The prompt, the channel attention, the kernels of FD and the gates of MEE depend on sums over the
whole picture. They take them by `total`. Normally the features are those of the whole picture and
`total` returns its arguments. `Totals` is for a picture that passes through a block part by part:
each run of the parts completes one more sum, and the last run has all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_totals: ContextVar["Totals | None"] = ContextVar("totals", default=None)


class Incomplete(Exception):
    """Stops a block at a sum that needs the other parts of the picture first."""


class Totals:
    """The sums over one picture that one block of the network asks for, in their order."""

    def __init__(self) -> None:
        """None is known yet."""
        self._known: list[tuple[Tensor, ...]] = []
        self._next: list[Tensor] = []
        self._asked = 0
        self._inner = (slice(None), slice(None))

    @contextmanager
    def part(self, rows: slice, columns: slice) -> Iterator[None]:
        """Within it a block gets one part of the picture.

        Args:
            rows: those of the given features that count in sums; the others belong to the
                neighbouring parts.
            columns: the same.
        """
        self._inner, self._asked = (rows, columns), 0
        before = _totals.set(self)
        try:
            yield
        finally:
            _totals.reset(before)

    def complete(self) -> bool:
        """After a run over all parts: whether the blocks had all sums; else one more is known."""
        if not self._next:
            return True
        # In fp64, because a sum of many parts should be as exact as one of all pixels.
        self._known.append(tuple(one.float() for one in self._next))
        self._next = []
        return False

    def inner(self, x_bhwc: Tensor) -> Tensor:
        """The pixels of this part that count in sums."""
        return x_bhwc[:, self._inner[0], self._inner[1]]

    def total(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The sums of all parts.

        Raises:
            Incomplete: not known yet; the given sums are added.
        """
        at, self._asked = self._asked, self._asked + 1
        if at < len(self._known):
            return self._known[at]
        exact = [one.double() for one in sums]
        if self._next:
            exact = [before + one for before, one in zip(self._next, exact, strict=True)]
        self._next = exact
        raise Incomplete


def in_parts() -> bool:
    """Whether the features are those of a part of the picture."""
    return not torch.compiler.is_compiling() and _totals.get() is not None


def inner(x_bhwc: Tensor) -> Tensor:
    """The pixels that count in sums: all, if the features are those of the whole picture."""
    totals = None if torch.compiler.is_compiling() else _totals.get()
    return x_bhwc if totals is None else totals.inner(x_bhwc)


def total(*sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over all pixels of the picture, from sums over `inner` pixels; fp32."""
    totals = None if torch.compiler.is_compiling() else _totals.get()
    return sums if totals is None else totals.total(sums)


def pixel_mean(x_bhwc: Tensor) -> Tensor:
    """Mean over the pixels of each picture, (B, H, W, C) -> (B, C) fp32."""
    if not in_parts():
        return x_bhwc.mean((1, 2), dtype=torch.float32)
    counted = inner(x_bhwc)
    pixels = counted.new_full((), counted.shape[1] * counted.shape[2], dtype=torch.float32)
    of_all, of_pixels = total(counted.sum((1, 2), dtype=torch.float32), pixels)
    return of_all / of_pixels
