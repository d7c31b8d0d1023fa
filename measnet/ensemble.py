"""Self-ensemble: the mean of what the network gives for the eight mirrored and turned pictures."""

from collections.abc import Callable

import torch
from torch import Tensor

TURNS = 8
"""Four rotations, each also mirrored (Timofte et al., CVPR 2016)."""


def turn(image: Tensor, number: int) -> Tensor:
    """(..., H, W), mirrored and turned by a multiple of 90°; `number` is 0 to 7, 0 the identity."""
    image = image.flip(-1) if number >= 4 else image
    return torch.rot90(image, number % 4, (-2, -1))


def turn_back(image: Tensor, number: int) -> Tensor:
    """The inverse of `turn`."""
    image = torch.rot90(image, -(number % 4), (-2, -1))
    return image.flip(-1) if number >= 4 else image


def self_ensemble(restore: Callable[[Tensor, int], Tensor], image: Tensor) -> Tensor:
    """Mean over the eight turns; takes eight times as long as restoring once.

    Args:
        restore: (..., H, W) and the number of the turn -> same shape.
        image: (..., H, W), any size.

    Returns:
        Same shape as `image`.
    """
    total = torch.zeros_like(image)
    for number in range(TURNS):
        total += turn_back(restore(turn(image, number).contiguous(), number), number)
    return total / TURNS
