"""Restore a picture of any size, in tiles where memory is short.

python -m measnet.restore IN OUT [--weights model.safetensors] [--tile 512]
"""

import torch
from torch import Tensor

from measnet.network import MEASNet

OVERLAP = 32
"""Pixels that neighbouring tiles share by default."""


@torch.no_grad()
def restore(
    model: MEASNet, image: Tensor, *, tile: int | None = None, overlap: int = OVERLAP
) -> Tensor:
    """Restore one picture or a batch.

    Prompt, channel attention and frequency gates look at the whole input, so a picture restored in
    tiles differs a little from the same picture restored at once; the tiles bound the memory.

    Args:
        model: in evaluation mode, on any device; the picture is brought there and the result back.
        image: (3, H, W) or (B, 3, H, W) in [0, 1], any size.
        tile: side of the square tiles in pixels; None restores the picture at once.
        overlap: pixels that neighbouring tiles share and blend over; less than `tile`.

    Returns:
        As large as `image`, clamped to [0, 1].

    Raises:
        ValueError: other shapes, or an overlap that does not fit the tile.
    """
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"a picture is (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}")
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}, but must lie between 0 and tile - 1 ({tile - 1})")
    batch = image if image.ndim == 4 else image[None]
    device = next(model.parameters()).device
    if tile is None or max(batch.shape[-2:]) <= tile:
        restored = model(batch.to(device)).image.to(image.device)
    else:
        restored = _in_tiles(model, batch, device, tile, overlap)
    return restored.clamp(0, 1).view(image.shape)


def _in_tiles(
    model: MEASNet, batch: Tensor, device: torch.device, tile: int, overlap: int
) -> Tensor:
    total, weights = torch.zeros_like(batch), torch.zeros_like(batch[:1, :1])
    for top in _starts(batch.shape[-2], tile, overlap):
        for left in _starts(batch.shape[-1], tile, overlap):
            window = (..., slice(top, top + tile), slice(left, left + tile))
            out = model(batch[window].to(device)).image.to(batch.device)
            ramp = _ramp(out.shape[-2], overlap)[:, None] * _ramp(out.shape[-1], overlap)
            total[window] += out * ramp
            weights[window] += ramp
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side; the last one ends with the picture."""
    last = max(0, size - tile)
    return [*range(0, last, tile - overlap), last]


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights that rise from each end over the overlap, never zero."""
    distance = torch.arange(1, length + 1).float()
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
