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

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
TILE = 1024
"""Larger pictures are restored in tiles of this side, unless the command line says otherwise."""
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
    _check_overlap(tile, overlap)
    batch = image if image.ndim == 4 else image[None]
    device = next(model.parameters()).device
    if tile is None or max(batch.shape[-2:]) <= tile:
        restored = model(batch.to(device)).image.to(image.device)
    else:
        restored = _in_tiles(model, batch, device, tile, overlap)
    return restored.clamp(0, 1).view(image.shape)


def _check_overlap(tile: int | None, overlap: int) -> None:
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}, but must lie between 0 and tile - 1 ({tile - 1})")


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
