"""From which brightness on a network takes a picture for one of low light.

    python bench/lowlight.py WEIGHTS [--picture FILE]

Darkens a photograph as `shards.pack --synthesise lowlight` does, at several exposures, restores it,
and prints the mean grey level and the PSNR before and after.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed.evaluate import load
from measnet.metrics import psnr
from measnet.tiling import choose_tiling, restore
from shards import degrade

EXPOSURES = (3, 6, 8, 10, 12, 15, 20, 25)
"""The picture gets one part in so many of its light; training has 6 to 25."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Brightness before and after restoring, for several exposures."""

    weights: tyro.conf.Positional[str]
    """A run, a .safetensors file, or a checkpoint of the authors' program."""
    picture: Path | None = None
    """A photograph in normal light; default: scikit-image's astronaut."""


class _Exposure:
    """Draws the middle of each range, but this exposure."""

    def __init__(self, part: float) -> None:
        self._part, self._rng = part, np.random.default_rng(0)
        self._first = True

    def uniform(self, low: float, high: float) -> float:
        drawn = self._part if self._first else (low + high) / 2
        self._first = False
        return drawn

    def standard_normal(self, *given: object) -> np.ndarray:
        return self._rng.standard_normal(*given)  # type: ignore[arg-type, no-any-return]


def main() -> None:
    """Print the table."""
    given = tyro.cli(Arguments)
    if given.picture is None:
        from skimage import data

        picture = data.astronaut()
    else:
        picture = np.asarray(Image.open(given.picture).convert("RGB"))
    model = load(given.weights, "cpu").eval()
    tile = choose_tiling(model).side(*picture.shape[:2])
    view = Table(title=f"mean of the picture in normal light: {picture.mean() / 255:.3f}")
    for name in ("exposure", "mean before", "mean after", "PSNR before", "PSNR after"):
        view.add_column(name, justify="right")
    for part in EXPOSURES:
        dark, _ = degrade.low_light(picture, _Exposure(part))  # type: ignore[arg-type]
        degraded = torch.from_numpy(dark.transpose(2, 0, 1).copy()).float() / 255
        restored = restore(model, degraded, tile=tile).permute(1, 2, 0).numpy()
        means = f"{dark.mean() / 255:.3f}", f"{restored.mean():.3f}"
        scores = (psnr(one, picture / 255.0) for one in (dark / 255.0, restored))
        view.add_row(f"1/{part}", *means, *(f"{score:.2f}" for score in scores))
    Console().print(view)


if __name__ == "__main__":
    main()
