"""What the restoration of a crop gains, for crops of several sides.

    python bench/crops.py WEIGHTS SHARDS [--degradations deblur …] [--sides 48 64 96 160 400]

A small crop shows little: a dark, blurred one looks like low light, a pale one like haze. Gains
that are negative in small crops and not in large ones say that the network takes one degradation
for another there, and that it trains better with larger crops. Crops lie on a grid of four by four,
and do not overlap; sides are cut down to multiples of 8.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed.evaluate import load
from measnet.metrics import quality
from shards.stream import pictures


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Mean gain of crops in dB, by their side."""

    weights: tyro.conf.Positional[str]
    """A run, a .safetensors file, or a checkpoint of the authors' program."""
    shards: tyro.conf.Positional[str]
    """Packed pictures."""
    degradations: tuple[str, ...] = ()
    """Which of them; empty: all."""
    sides: tuple[int, ...] = (48, 64, 96, 160, 400)
    """Of the crops, in pixels; larger than a picture: the whole of it."""
    every: int = 1
    """Take one picture of so many."""


def corners(length: int, side: int) -> range:
    """Where crops begin along an axis of `length` pixels: at most four of them."""
    return range(0, max(length - side, 1), max(side, length // 4))


def crops(picture: Tensor, side: int) -> Iterator[Tensor]:
    """Crops of (3, H, W), at most 4 × 4, whose sides are multiples of 8."""
    for top in corners(picture.shape[1], side):
        for left in corners(picture.shape[2], side):
            crop = picture[:, top : top + side, left : left + side]
            yield crop[:, : crop.shape[1] // 8 * 8, : crop.shape[2] // 8 * 8]


def main() -> None:
    """Print the table."""
    given = tyro.cli(Arguments, prog="python bench/crops.py")
    model = load(given.weights, "cpu").eval()
    gains: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[str, int] = defaultdict(int)
    for sample in pictures(given.shards, degradations=given.degradations or None):
        seen[sample.degradation] += 1
        if (seen[sample.degradation] - 1) % given.every:
            continue
        for side in given.sides:
            pairs = zip(crops(sample.degraded, side), crops(sample.clean, side), strict=True)
            for pair in pairs:
                degraded, clean = (crop[None] for crop in pair)
                with torch.inference_mode():
                    restored = model(degraded).image
                gain = quality(restored, clean).psnr - quality(degraded, clean).psnr
                gains[sample.degradation][side].append(gain.item())
    view = Table("degradation", *(str(side) for side in given.sides), title="mean gain in dB")
    for name, by_side in gains.items():
        view.add_row(name, *(f"{fmean(by_side[side]):+.2f}" for side in given.sides))
    Console().print(view)


if __name__ == "__main__":
    main()
