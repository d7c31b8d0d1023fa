"""What the synthesis makes of photographs, and how it compares with real benchmark pairs.

    python bench/degradations.py                            # writes docs/degradations.jpg
    python bench/degradations.py rain100l-test=FOLDER ...   # real beside synthetic; needs the pairs

A SET is packed shards, or LAYOUT=FOLDER for the raw pictures of a benchmark. The same clean
pictures are degraded by `shards.degrade`; the table compares the errors of both, and a picture
shows both.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed.figures import as_uint8
from distributed.sources import packed, parse_all
from measnet.metrics import psnr
from shards import degrade
from shards.stream import pictures

ROOT = Path(__file__).resolve().parent.parent
SIDE = 240
"""Pixels of one cell of a picture."""
CHAINS = {
    "haze": ("dehaze",),
    "rain": ("derain",),
    "blur": ("deblur",),
    "low light": ("lowlight",),
    "rain, then noise": ("derain", "denoise"),
    "low light, haze, blur": ("lowlight", "dehaze", "deblur"),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw the synthetic degradations, or compare them with real pairs."""

    sets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Packed shards, or LAYOUT=FOLDER."""
    out: Path | None = None
    """Picture to write; default: docs/degradations.jpg, or degradations.png with sets."""


def main() -> int:
    """Exit code."""
    given = tyro.cli(Arguments, prog="python bench/degradations.py")
    rows: list[list[np.ndarray]] = []
    if not given.sets:
        rows = list(_examples())
    for source in parse_all(list(given.sets)):
        with packed(source) as folder:
            rows += _compare(source.name, folder)
    out = given.out or (Path("degradations.png") if given.sets else ROOT / "docs/degradations.jpg")
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows], 0)).save(out)
    print(f"written: {out}")
    return 0


def _examples() -> Iterator[list[np.ndarray]]:
    """Rows of degraded photographs that scikit-image ships."""
    from skimage import data

    for picture in (data.astronaut(), data.coffee(), data.rocket()):
        yield [
            _cell(picture, "clean"),
            *(
                _cell(degrade.synthesise(picture, chain, degrade.generator(7, name))[0], name)
                for name, chain in CHAINS.items()
            ),
        ]


def _compare(name: str, folder: str) -> list[list[np.ndarray]]:
    """Print the table of one set; rows of clean, real and synthetic pictures."""
    rows, errors = [], []
    for pair in pictures(folder):
        if pair.task == "denoise":
            continue
        clean, real = _pixels(pair.clean), _pixels(pair.degraded)
        made, _ = degrade.synthesise(clean, (pair.task,), degrade.generator(0, pair.name))
        errors.append((_error(real, clean), _error(made, clean)))
        if len(rows) < 4:
            titles = ("clean", name, f"synthetic {pair.task}")
            rows.append(list(map(_cell, (clean, real, made), titles)))
    if not errors:
        raise SystemExit(f"error: {folder} holds no pairs; noise is not compared")
    values = np.array(errors)  # pairs, (real, synthetic), quantities
    print(f"\n{name}, {len(values)} pairs: mean (least - most)")
    for index, quantity in enumerate(("PSNR, dB", "mean change, levels", "changed pixels, %")):
        shown = (
            f"{kind} {side.mean():6.2f} ({side.min():.2f} - {side.max():.2f})"
            for kind, side in zip(("real", "synthetic"), values[..., index].T, strict=True)
        )
        print(f"  {quantity:20s}", *shown, sep="  ")
    return rows


def _pixels(picture: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return as_uint8(picture.permute(1, 2, 0).numpy())


def _error(degraded: np.ndarray, clean: np.ndarray) -> tuple[float, float, float]:
    """PSNR in dB, mean change in grey levels, share of pixels changed by more than 10 levels."""
    change = degraded.astype(np.float32) - clean
    changed = (np.abs(change.mean(2)) > 10).mean()
    return psnr(degraded / 255, clean / 255), float(change.mean()), float(100 * changed)


def _cell(picture: np.ndarray, title: str) -> np.ndarray:
    """The middle of a picture, with a title."""
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    image = Image.fromarray(picture[top : top + side, left : left + side]).resize((SIDE, SIDE))
    cell = Image.new("RGB", (SIDE + 4, SIDE + 22), "white")
    cell.paste(image, (2, 20))
    ImageDraw.Draw(cell).text((4, 4), title, "black")
    return np.asarray(cell)


if __name__ == "__main__":
    sys.exit(main())
