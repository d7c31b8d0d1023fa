"""Bytes of a picture -> pixels, the whole or a crop of it."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = 1 << 29


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class DecodeError(ValueError):
    """The bytes are not a whole picture of a known kind."""


def decode(data: bytes, box: Box | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of the picture, or of the box, which lies inside of it; `DecodeError` where
    damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"a picture of mode {image.mode}; convert it to 8 bit RGB first")
            pixels = np.asarray(image.convert("RGB"))
    except DecodeError:
        raise
    except (
        Exception
    ) as error:  # Pillow raises OSError, SyntaxError, struct.error and others on damage
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    if box is None:
        return pixels
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]
