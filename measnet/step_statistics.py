"""Statistics over the pictures of a whole step, whatever ranks and micro-batches they were in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class StepStatistics(nn.Module):
    """A module that collects sums in its forward passes, and uses them once per optimizer step.

    A subclass makes the buffer `moments` by `collect`, adds to it, and uses it in `fold`.
    """

    moments: Tensor

    def collect(self, rows: int, width: int) -> None:
        """Make `moments`, (rows, width) float64 zeros; not part of a checkpoint."""
        zeros = torch.zeros(rows, width, dtype=torch.float64)
        self.register_buffer("moments", zeros, persistent=False)

    def fold(self) -> None:
        """Use the collected sums, and set them to zero."""
        raise NotImplementedError

    def taken(self) -> Tensor:
        """The collected sums, which start at zero again.

        Sums that are not finite come back as zeros: the update of the weights is skipped then, but
        a NaN in a running statistic would stay for good.
        """
        taken = torch.where(self.moments.isfinite().all(), self.moments, 0.0)
        self.moments.zero_()
        return taken

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StepStatistics":
        """Move with the model, but keep the types of the statistics when the model is cast."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self


def commit_statistics(model: nn.Module, reduce: Callable[[Tensor], Any] | None = None) -> None:
    """Use the sums of all deferred forward passes; call it once per optimizer step.

    Args:
        model: holds modules with `StepStatistics` whose forward passes deferred them.
        reduce: sums its argument, one flat float64 tensor, in place over the ranks
            (`dist.all_reduce`). So all ranks have the same running statistics, which do not depend
            on how the pictures were shared.
    """
    parts = [
        module
        for module in model.modules()
        if isinstance(module, StepStatistics) and hasattr(module, "moments")
    ]
    if not parts:
        return
    if reduce is not None:
        flat = torch.cat([part.moments.flatten() for part in parts])
        reduce(flat)
        sizes = [part.moments.numel() for part in parts]
        for part, summed in zip(parts, flat.split(sizes), strict=True):
            part.moments.copy_(summed.view_as(part.moments))
    for part in parts:
        part.fold()
