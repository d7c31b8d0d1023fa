"""Restore pictures of any size, in tiles where memory is short.

    python -m measnet.restore IN OUT --weights model.safetensors

IN is a picture or a folder of pictures, OUT a file or a folder. The weights are a file of
`MEASNet.save_pretrained`, or a checkpoint of the authors' program (.ckpt, .pth, .safetensors).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from measnet.network import MEASNet
from measnet.official import weights as official_weights
from measnet.tiling import OVERLAP, TILE, _check_overlap, restore

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def load_weights(path: Path) -> MEASNet:
    """Our own file or a checkpoint of the authors' program; in evaluation mode.

    Raises:
        ValueError: neither, by the reason.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                ours = "config" in (file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if ours:
            return MEASNet.from_pretrained(path)
    return official_weights.load(path)


def read_picture(path: Path) -> Tensor:
    """An 8-bit picture as (3, H, W) in [0, 1]; turned as its camera says, grey and alpha to RGB.

    Raises:
        ValueError: not a picture, or a damaged one.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def write_picture(image: Tensor, path: Path) -> None:
    """Write (3, H, W) in [0, 1] with 8 bits; the file appears when it is whole."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        Image.fromarray(pixels).save(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def pairs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Which picture goes where; a folder keeps its structure, its results are PNG.

    Raises:
        ValueError: nothing to restore, or two pictures that would be written to one file.
    """
    if not source.exists():
        raise ValueError(f"there is no file or folder {source}")
    if source.is_file():
        if target.suffix.lower() in SUFFIXES:
            return [(source, target)]
        return [(source, target / f"{source.stem}.png")]
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"{source} holds no pictures ({', '.join(SUFFIXES)})")
    planned: dict[Path, Path] = {}
    for path in found:
        out = target / path.relative_to(source).with_suffix(".png")
        if out in planned:
            raise ValueError(f"{planned[out]} and {path} would both be written to {out}")
        planned[out] = path
    return [(path, out) for out, path in planned.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0, or 2 after a message. A picture that fails does not stop the others."""
    parser = argparse.ArgumentParser(prog="python -m measnet.restore", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="IN", type=Path, help="picture or folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="picture or folder to write")
    parser.add_argument("--weights", type=Path, required=True, help="trained weights")
    parser.add_argument("--tile", type=int, default=TILE, help="pixels a side; 0: never in tiles")
    parser.add_argument("--overlap", type=int, default=OVERLAP, help="pixels that tiles share")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    failed = 0
    try:
        _check_overlap(arguments.tile or None, arguments.overlap)
        planned = pairs(arguments.source, arguments.target)
        model = load_weights(arguments.weights).to(arguments.device)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for source, target in planned:
        try:
            tile, overlap = arguments.tile or None, arguments.overlap
            restored = restore(model, read_picture(source), tile=tile, overlap=overlap)
            write_picture(restored, target)
            print(target)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
