"""Restore pictures of any size: whole if the memory allows it, else in tiles.

Variant paper: `measnet.windows` gives what restoring the picture whole gives. Variant official:
tiles overlap and are blended. There prompt, channel attention and frequency gates see one tile
instead of the whole picture, so the result differs a little.
"""

import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from measnet.features import Store
from measnet.hardware import Decision, free_memory
from measnet.memory import RESERVE, Memory, inference
from measnet.network import MEASNet
from measnet.windows import Progress, restore_in_windows

OVERLAP = 32
"""Pixels that neighbouring tiles share by default, where they are blended."""
WINDOW = 512
"""Largest side of an exact tile that is chosen here: larger ones would hardly be faster."""
STEP = 64
"""Chosen sides are multiples of this."""
LEAST_TILE = 128
"""Smallest side that is chosen here: in smaller tiles the network sees too little."""
Precision = Literal["fp32", "bf16"]
"""`bf16`: by autocast, as in training; for GPUs that have it."""
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
    """Pixels that neighbouring tiles share and blend; 0: restored whole, or in exact tiles."""


class Tiling(NamedTuple):
    """How pictures are cut into tiles; decided once, so that equal sizes get equal tiles."""

    at_once: int
    """Most pixels that are restored at once."""
    tile: int | None = None
    """Side of the tiles that the user asked for; None: chosen by `at_once`."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share, where they are blended."""
    reason: str = "asked for"
    """The reason, for the user."""
    window: int | None = None
    """Side of the tiles of larger pictures, if they are exact; None: blended tiles."""

    def side(self, height: int, width: int) -> int | None:
        """Side of the tiles for one picture; None restores it whole."""
        if self.tile is not None:
            return self.tile if max(height, width) > self.tile else None
        if self.window is not None:
            fits = height * width <= self.at_once or max(height, width) <= self.window
            return None if fits else self.window
        return choose_tile(height, width, self.at_once)

    @property
    def decision(self) -> Decision:
        """The choice and its reason, to be shown to the user."""
        if self.tile is not None:
            return Decision(f"tiles of {self.tile} pixels", self.reason)
        megapixels = f"{self.at_once / 1e6:.3g} megapixels"
        tiles = "tiles" if self.window is None else f"tiles of {self.window} pixels, without seams"
        return Decision(f"pictures up to {megapixels} whole, larger ones in {tiles}", self.reason)


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


def is_exact(model: MEASNet) -> bool:
    """Whether tiles give the same result as restoring whole: variant paper, in fp32."""
    if not isinstance(model, MEASNet) or model.config.variant != "paper":
        return False
    return next(model.parameters()).dtype == torch.float32


def choose_window(memory: Memory, available: float) -> int:
    """Side of exact tiles: a quarter of the memory is for them, the rest for whole features."""
    side = math.isqrt(max(0, int(available / (4 * memory.per_pixel))))
    return min(WINDOW, max(STEP, side // STEP * STEP))


def choose_tiling(
    model: MEASNet,
    *,
    tile: int | None = None,
    overlap: int = OVERLAP,
    processes: int = 1,
    memory: int | None = None,
) -> Tiling:
    """Choose the tiling for a network on its device, by the free memory.

    Args:
        model: on its device.
        tile: side of the tiles that the user asks for; None: chosen by the memory.
        overlap: pixels that neighbouring tiles share, where they are blended.
        processes: number of processes that restore pictures at the same time on this machine.
        memory: bytes of RAM that restoring may take; None: by the free memory.

    Raises:
        ValueError: the overlap does not fit the tile.
    """
    if not is_exact(model):
        check_overlap(tile, overlap)
    if tile is not None:
        return Tiling(tile * tile, tile, overlap)
    device = next(model.parameters()).device
    needed = inference(model.config, device.type)
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    kind = "free"
    if memory is not None and device.type == "cpu":
        free, kind = memory, "left to be used"
    per_pixel = f"{needed.per_pixel / 1e3:.1f} kB a pixel"
    reason = f"{free / 1e9:.1f} GB of memory is {kind}, the network takes {per_pixel}"
    window = choose_window(needed, RESERVE * free) if is_exact(model) else None
    return Tiling(pixels_at_once(needed, free), None, overlap, reason, window)


class FeatureMemory(NamedTuple):
    """Memory for the features of a picture that is restored in exact tiles."""

    ram: int | None = None
    """Bytes of RAM that restoring may take, the result included; None: by the free memory."""
    folder: Path | None = None
    """Features that do not fit are kept in a file here; None: Python's `tempfile.gettempdir()`."""

    def store(self, model: MEASNet, side: int, pixels: int) -> Store:
        """The store for a picture of so many pixels, in tiles of this side."""
        device = next(model.parameters()).device
        needed = inference(model.config, "cpu" if device.type == "cpu" else "cuda")
        # Rows of features that are read together take up to as much as one tile.
        tiles = int(needed.constant + 2 * needed.per_pixel * side * side)
        ram = int(RESERVE * free_memory(torch.device("cpu"))) if self.ram is None else self.ram
        ram -= _BYTES_OF_RESULT * pixels
        if device.type == "cpu":
            on_device, ram = 0, ram - tiles
        else:
            on_device = int(RESERVE * free_memory(device)) - tiles
        folder = Path(tempfile.gettempdir()) if self.folder is None else self.folder
        return Store(device, on_device=on_device, in_ram=ram, folder=folder)


BY_FREE_MEMORY = FeatureMemory()
_BYTES_OF_RESULT = 3 * 4
"""Per pixel: RGB in fp32."""


def restore(
    model: MEASNet,
    image: Tensor,
    *,
    tile: int | None = None,
    overlap: int = OVERLAP,
    precision: Precision = "fp32",
) -> Tensor:
    """Restore one picture or a batch.

    If the device runs out of memory, smaller tiles are tried, with a warning in the log.

    Args:
        model: in evaluation mode, on any device; the result is on the device of `image`.
        image: (3, H, W) or (B, 3, H, W) in [0, 1], any size.
        tile: side of the square tiles in pixels; None restores the picture whole.
        overlap: pixels that neighbouring tiles share and blend; less than `tile`. Not used with
            variant paper, whose tiles give what the whole picture gives.
        precision: of the network's features. Features that are kept for the whole picture, and
            the result, are fp32.

    Returns:
        Same shape as `image`, clamped to [0, 1].

    Raises:
        ValueError: other shapes, or the overlap does not fit the tile.
        torch.OutOfMemoryError: not even tiles of `LEAST_TILE` fit.
    """
    done = restore_routed(model, image, tile=tile, overlap=overlap, precision=precision)
    return done.image


def restore_routed(
    model: MEASNet,
    image: Tensor,
    *,
    tile: int | None = None,
    overlap: int = OVERLAP,
    precision: Precision = "fp32",
    memory: FeatureMemory = BY_FREE_MEMORY,
    progress: Progress | None = None,
) -> Restored:
    """As `restore`; also returns the chosen experts and the used tiles.

    With exact tiles, `memory` limits the features of the whole picture, and `progress` is called
    with the share that is done.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a picture is (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}")
    if not is_exact(model):
        check_overlap(tile, overlap)
    batch = image if image.ndim == 4 else image[None]
    height, width = batch.shape[-2:]
    if tile is not None and max(height, width) <= tile:
        tile = None
    while True:
        try:
            with arithmetic(precision, next(model.parameters()).device):
                restored = _restore(model, batch, tile, overlap, memory, progress)
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


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside the block, a network on `device` computes in this precision."""
    low = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with full_precision(), low:
        yield


@torch.no_grad()
def _restore(
    model: MEASNet,
    batch: Tensor,
    tile: int | None,
    overlap: int,
    memory: FeatureMemory,
    progress: Progress | None,
) -> Restored:
    if tile is None:
        image, routing = _run(model, batch)
        return Restored(image.clamp(0, 1), routing, None, 0)
    if is_exact(model):
        return _restore_exactly(model, batch, tile, memory, progress)
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


def _restore_exactly(
    model: MEASNet, batch: Tensor, tile: int, memory: FeatureMemory, progress: Progress | None
) -> Restored:
    report = progress or (lambda share: None)
    done = []
    for at, image in enumerate(batch):
        store = memory.store(model, tile, image.shape[-2:].numel())
        done.append(
            restore_in_windows(
                model,
                image,
                side=tile,
                store=store,
                progress=lambda share, at=at: report((at + share) / len(batch)),  # type: ignore[misc]
            )
        )
    routing = {
        name: torch.cat([one.routing[name] for one in done]).to(batch.device).double()
        for name in done[0].routing
    }
    images = [one.image for one in done]
    whole = images[0][None] if len(images) == 1 else torch.stack(images)
    return Restored(whole, routing, tile, 0)


def _run(model: MEASNet, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the network on its device; returns restored pictures and routing on `batch`'s device."""
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
