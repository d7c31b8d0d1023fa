"""Adds up the gradients of all ranks while the backward pass still runs; ZeRO stage 0 only.

The gradients lie in a few flat buckets. The backward pass reaches the weights in about the reverse
of their order in the network, so the first buckets are complete long before it ends. Each complete
bucket is all-reduced in the background.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from distributed.internals.torch import foreach_mul_, foreach_zero_

BUCKETS = 8
"""Buckets of a large network. The last one is complete only when the backward pass ends, so it
should be a small part."""
LEAST_BUCKET = 2**18
"""Elements of a bucket of a small network: 1 MiB, sent in about the time that one more all-reduce
takes to start."""
ALIGNMENT = 4
"""Each gradient begins at a multiple of so many elements: kernels then read 16 bytes at a time."""


def divide(sizes: Sequence[int], buckets: int, least: int) -> list[range]:
    """Which parameters share a bucket: ranges of their numbers, in order.

    A bucket is closed as soon as it has its part of all elements, and at least `least`. Nothing but
    the sizes decides, so a resumed run adds up in the same order and gets the same bits.

    Args:
        sizes: elements of each parameter.
        buckets: parts to divide into; a large parameter makes them fewer.
        least: elements.
    """
    enough = max(least, -(-sum(sizes) // buckets))
    ranges, first, held = [], 0, 0
    for number, size in enumerate(sizes, 1):
        held += size
        if held >= enough or number == len(sizes):
            ranges.append(range(first, number))
            first, held = number, 0
    return ranges


class _Bucket:
    """Gradients that are all-reduced together; `.grad` of each parameter is a view of them."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.count = self.missing = len(parameters)
        self.work: dist.Work | None = None
        ends = [0]
        for parameter in parameters:
            ends.append(ends[-1] + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT)
        self.flat: Tensor = parameters[0].new_zeros(ends[-1], requires_grad=False)
        for parameter, at in zip(parameters, ends, strict=False):
            part = self.flat[at : at + parameter.numel()]
            parameter.grad = part.view_as(parameter)


class GradientReduction:
    """Holds the gradients, and makes them means over the ranks; every rank makes the same calls.

    Gradients always exist: a parameter that a backward pass did not reach has one of zeros, on
    this rank or on all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ends_step: Callable[[], bool]) -> None:
        """Start with gradients of zero.

        Args:
            parameters: that are trained, in the order of the network, all of one type.
            ends_step: whether the backward pass that runs is the last one before an update.
        """
        self._ends_step = ends_step
        backwards = list(reversed(parameters))
        ranges = divide([p.numel() for p in backwards], BUCKETS, LEAST_BUCKET)
        self._buckets = [_Bucket([backwards[i] for i in part]) for part in ranges]
        self._flats = [bucket.flat for bucket in self._buckets]
        for bucket, part in zip(self._buckets, ranges, strict=True):
            for number in part:
                backwards[number].register_post_accumulate_grad_hook(partial(self._arrive, bucket))
        self._order = list(range(len(self._buckets)))
        self._arrived: list[int] = []
        self._started = 0
        self._first = True

    def finish(self) -> None:
        """After each backward pass: if it ends a step, wait until all gradients are means.

        On a GPU only the stream waits, not the host.
        """
        if not self._ends_step():
            return
        self._start(self._order[self._started :])
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work, bucket.missing = None, bucket.count
        foreach_mul_(self._flats, 1.0 / dist.get_world_size())
        if self._first:
            self._agree_on_order()
        self._arrived, self._started, self._first = [], 0, False

    def zero(self) -> None:
        """Start the next step; also after one whose gradients were not finite."""
        foreach_zero_(self._flats)

    def _arrive(self, bucket: _Bucket, _parameter: Tensor) -> None:
        """A gradient is complete on this rank: start all that now can."""
        if not self._ends_step():
            return
        bucket.missing -= 1
        if bucket.missing:
            return
        self._arrived.append(self._buckets.index(bucket))
        waiting = self._order[self._started :]
        late = (n for n, number in enumerate(waiting) if self._buckets[number].missing)
        self._start(waiting[: next(late, len(waiting))])

    def _start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            bucket = self._buckets[number]
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._started += len(numbers)

    def _agree_on_order(self) -> None:
        """From now on start in the order in which rank 0 completed its buckets.

        All ranks must start in one order. A bucket that is never complete, because the network does
        not use one of its parameters, would keep those behind it waiting. The sums do not depend on
        the order.
        """
        never = [number for number in self._order if number not in self._arrived]
        agreed = [self._arrived + never]
        dist.broadcast_object_list(agreed, src=0)
        self._order = agreed[0]
