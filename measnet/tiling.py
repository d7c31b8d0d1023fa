"""Restore pictures of any size: whole if the memory allows it, else in overlapping tiles.

Prompt, channel attention and frequency gates depend on the whole input, so a picture restored in
tiles differs a little from the same picture restored whole. Tiles limit the memory.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from measnet.hardware import Decision, free_memory
from measnet.memory import RESERVE, Memory, inference
from measnet.network import MEASNet

OVERLAP = 32
"""Pixels that neighbouring tiles share by default."""
STEP = 64
"""Chosen sides are multiples of this."""
LEAST_TILE = 128
"""Smallest side that is chosen here: in smaller tiles the network sees too little."""
ARITHMETIC = "fp32 without TF32"
"""Arithmetic of all figures, on a CPU and on a GPU."""

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A restored picture or batch, and how it was restored."""

    image: Tensor
    """Same size as the input, in [0, 1]; this and `routing` are on the device of the input."""
    routing: dict[str, Tensor]
    """As `Restoration.routing`, (B, N) float64: mean over the tiles, by their area."""
    tile: int | None
    """Side of the tiles; None: restored whole."""
    overlap: int
    """Pixels that neighbouring tiles share; 0: restored whole."""


class Tiling(NamedTuple):
    """How pictures are cut into tiles; decided once, so that equal sizes get equal tiles."""

    at_once: int
    """Most pixels that are restored at once."""
    tile: int | None = None
    """Side of the tiles that the user asked for; None: chosen by `at_once`."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share."""
    reason: str = "asked for"
    """The reason, for the user."""

    def side(self, height: int, width: int) -> int | None:
        """Side of the tiles for one picture; None restores it whole."""
        if self.tile is not None:
            return self.tile if max(height, width) > self.tile else None
        return choose_tile(height, width, self.at_once)

    @property
    def decision(self) -> Decision:
        """The choice and its reason, to be shown to the user."""
        if self.tile is not None:
            return Decision(f"tiles of {self.tile} pixels", self.reason)
        megapixels = f"{self.at_once / 1e6:.3g} megapixels"
        return Decision(f"pictures up to {megapixels} whole, larger ones in tiles", self.reason)


def pixels_at_once(memory: Memory, free: float) -> int:
    """Most pixels that can be restored at once in `free` bytes, with the network on its device."""
    return max(0, int((RESERVE * free - memory.constant) / memory.per_pixel))


def choose_tile(height: int, width: int, at_once: int) -> int | None:
    """Side of the largest tiles with at most `at_once` pixels; None: the picture fits whole.

    A side is a multiple of `STEP` and at least `LEAST_TILE`, even if that is too large.
    """
    if height * width <= at_once:
        return None
    side = -(-max(height, width) // STEP) * STEP
    while side > LEAST_TILE and min(side, height) * min(side, width) > at_once:
        side -= STEP
    return side if side < max(height, width) else None


def choose_tiling(
    model: MEASNet, *, tile: int | None = None, overlap: int = OVERLAP, processes: int = 1
) -> Tiling:
    """Choose the tiling for a network on its device, by the free memory.

    Args:
        model: on its device.
        tile: side of the tiles that the user asks for; None: chosen by the memory.
        overlap: pixels that neighbouring tiles share.
        processes: number of processes that restore pictures at the same time on this machine.

    Raises:
        ValueError: the overlap does not fit the tile.
    """
    check_overlap(tile, overlap)
    if tile is not None:
        return Tiling(tile * tile, tile, overlap)
    device = next(model.parameters()).device
    memory = inference(model.config, device.type)
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    per_pixel = f"{memory.per_pixel / 1e3:.1f} kB a pixel"
    reason = f"{free / 1e9:.1f} GB of memory is free, the network takes {per_pixel}"
    return Tiling(pixels_at_once(memory, free), None, overlap, reason)


def restore(
    model: MEASNet, image: Tensor, *, tile: int | None = None, overlap: int = OVERLAP
) -> Tensor:
    """Restore one picture or a batch.

    If the device runs out of memory, smaller tiles are tried, with a warning in the log.

    Args:
        model: in evaluation mode, on any device; the result is on the device of `image`.
        image: (3, H, W) or (B, 3, H, W) in [0, 1], any size.
        tile: side of the square tiles in pixels; None restores the picture whole.
        overlap: pixels that neighbouring tiles share and blend; less than `tile`.

    Returns:
        Same shape as `image`, clamped to [0, 1].

    Raises:
        ValueError: other shapes, or the overlap does not fit the tile.
        torch.OutOfMemoryError: not even tiles of `LEAST_TILE` fit.
    """
    return restore_routed(model, image, tile=tile, overlap=overlap).image


def restore_routed(
    model: MEASNet, image: Tensor, *, tile: int | None = None, overlap: int = OVERLAP
) -> Restored:
    """As `restore`; also returns the chosen experts and the used tiles."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a picture is (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}")
    check_overlap(tile, overlap)
    batch = image if image.ndim == 4 else image[None]
    height, width = batch.shape[-2:]
    if tile is not None and max(height, width) <= tile:
        tile = None
    while True:
        try:
            restored = _restore(model, batch, tile, overlap)
            return restored._replace(image=restored.image.view(image.shape))
        except (torch.OutOfMemoryError, MemoryError):
            smaller = smaller_tile(tile or max(height, width))
            if smaller is None:
                raise
        # Not inside `except`: the error's traceback keeps the tensors of the failed try.
        torch.cuda.empty_cache()
        how = f"in tiles of {tile}" if tile else "whole"
        log.warning(
            "out of memory: %d×%d pixels do not fit %s; trying again with tiles of %d",
            *(width, height, how, smaller),
        )
        tile, overlap = smaller, min(overlap, smaller // 4)


def smaller_tile(side: int) -> int | None:
    """Next side to try if `side` is too large: about half of it; None: there is no smaller one."""
    smaller = max(LEAST_TILE, side // 2 // STEP * STEP)
    return smaller if smaller < side else None


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block, a GPU computes products and convolutions of fp32 in fp32.

    torch's default for convolutions is TF32, which keeps 10 bits of the mantissa. The setting
    is for the process, not for a thread.
    """
    operations = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


@torch.no_grad()
def _restore(model: MEASNet, batch: Tensor, tile: int | None, overlap: int) -> Restored:
    if tile is None:
        image, routing = _run(model, batch)
        return Restored(image.clamp(0, 1), routing, None, 0)
    # The picture stays on its device; the network's device holds one tile only.
    total, weights = torch.zeros_like(batch), torch.zeros_like(batch[:1, :1])
    shares: dict[str, Tensor] = {}
    area = 0
    for top in _starts(batch.shape[-2], tile, overlap):
        for left in _starts(batch.shape[-1], tile, overlap):
            window = (..., slice(top, top + tile), slice(left, left + tile))
            part, routing = _run(model, batch[window])
            height, width = part.shape[-2:]
            ramp = _ramp(height, overlap, part)[:, None] * _ramp(width, overlap, part)
            total[window] += part * ramp
            weights[window] += ramp
            area += height * width
            for name, chosen in routing.items():
                shares[name] = shares.get(name, 0) + height * width * chosen
    routing = {name: share / area for name, share in shares.items()}
    return Restored((total / weights).clamp(0, 1), routing, tile, overlap)


def _run(model: MEASNet, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the network on its device; returns restored pictures and routing on `batch`'s device."""
    with full_precision():
        out = model(batch.to(next(model.parameters()).device))
    routing = {name: chosen.to(batch.device).double() for name, chosen in out.routing.items()}
    return out.image.to(batch.device), routing


def check_overlap(tile: int | None, overlap: int) -> None:
    """Refuse an overlap that does not fit the tile.

    Raises:
        ValueError: with the limit.
    """
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}, but must lie between 0 and tile - 1 ({tile - 1})")


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Start of each tile along one side; the last one ends with the picture."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights (length,) for blending: they rise from each end over the overlap, never zero."""
    distance = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
