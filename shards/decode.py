"""Decodes a picture, whole or only a crop of it.

A loader spends most of its time on decoding, and a training crop is a small part of a picture. Two
small C extensions decode only that part: of a PNG the rows down to the lower edge of the crop
(inflated by ISA-L), of a JPEG the blocks around the crop (libjpeg-turbo). Pillow decodes all other
formats, and everything where the extensions could not be built. The pixels are the same; tests
compare them.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import qoi
from isal import isal_zlib
from PIL import ExifTags, Image, ImageOps

_crop_png: Callable[[bytes, int, int, int, int, int], bytes] | None
_crop_jpeg: Callable[[bytes, int, int, int, int], bytes | None] | None
_planes: Callable[[np.ndarray, int, int, int, np.ndarray], None] | None
try:
    from shards._pixels import crop_png as _crop_png  # type: ignore[no-redef]
    from shards._pixels import planes as _planes  # type: ignore[no-redef]
except ImportError:
    _crop_png = _planes = None
try:
    from shards._jpeg import crop as _crop_jpeg  # type: ignore[no-redef]
except ImportError:
    _crop_jpeg = None

Image.MAX_IMAGE_PIXELS = 1 << 29


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class DecodeError(ValueError):
    """The bytes are not a complete picture of a supported format."""


def decode(data: bytes, box: Box | None = None) -> np.ndarray:
    """Decodes a picture, or the part of it inside `box`: (H, W, 3) uint8.

    Grey and palette pictures become RGB, transparency is dropped, orientation tags are not applied
    (as in the field's loaders; see `turned`).

    Raises:
        DecodeError: the bytes are damaged, or have more than 8 bits per channel.
    """
    pixels = None
    if box is None and _png_depth(data) == 16:
        raise DecodeError("the picture has 16 bits per channel; convert it to 8 bits")
    if box is not None and data.startswith(b"\xff\xd8") and _crop_jpeg is not None:
        pixels = _crop_jpeg(data, *box)
    elif data.startswith(b"\x89PNG\r\n\x1a\n") and _crop_png is not None and box is not None:
        pixels = _decode_png(data, box)
    elif data.startswith(b"qoif"):
        return _cut(_decode_qoi(data), box)
    if pixels is not None and box is not None:
        return np.frombuffer(pixels, np.uint8).reshape(box.height, box.width, 3)
    return _cut(_decode_any(data), box)


def turned(data: bytes) -> np.ndarray | None:
    """The picture upright, (H, W, 3) uint8, if a tag says that it is stored otherwise; else None.

    Raises:
        DecodeError: as `decode`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged picture is named by `decode`; damaged EXIF says nothing
        return None
    if orientation not in range(2, 9):
        return None
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(decode(data))
    stored.info["exif"] = exif.tobytes()
    return np.asarray(ImageOps.exif_transpose(stored))


def encode_tile(pixels: np.ndarray) -> bytes:
    """QOI bytes of (H, W, 3) uint8: lossless, about as large as PNG, ten times faster to read."""
    data: bytes = qoi.encode(np.ascontiguousarray(pixels))
    return data


class Flip(NamedTuple):
    """How a crop is augmented: first transposed, then flipped. All eight are possible."""

    vertical: bool
    """Upside down."""
    horizontal: bool
    """Left to right."""
    transpose: bool
    """Rows become columns."""


NO_FLIP = Flip(False, False, False)


def flipped(pixels: np.ndarray, flip: Flip) -> np.ndarray:
    """A view of (H, W, 3) pixels, flipped."""
    if flip.transpose:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip.vertical else 1, :: -1 if flip.horizontal else 1]


def as_floats(pictures: list[np.ndarray], flips: list[Flip]) -> np.ndarray:
    """Flips m pictures of (H, W, 3) uint8, all of one size then: (m, 3, H, W) float32 in [0, 1]."""
    height, width = flipped(pictures[0], flips[0]).shape[:2]
    planes = np.empty((len(pictures), 3, height, width), np.float32)
    for out, pixels, flip in zip(planes, pictures, flips, strict=True):
        if _planes is None:
            np.divide(flipped(pixels, flip).transpose(2, 0, 1), np.float32(255), out=out)
        else:
            bits = flip.vertical + 2 * flip.horizontal + 4 * flip.transpose
            _planes(np.ascontiguousarray(pixels), pixels.shape[0], pixels.shape[1], bits, out)
    return planes


def as_bytes(pictures: list[np.ndarray], flips: list[Flip]) -> np.ndarray:
    """As `as_floats`, but (m, 3, H, W) uint8."""
    height, width = flipped(pictures[0], flips[0]).shape[:2]
    planes = np.empty((len(pictures), 3, height, width), np.uint8)
    for out, pixels, flip in zip(planes, pictures, flips, strict=True):
        out[:] = flipped(pixels, flip).transpose(2, 0, 1)
    return planes


def _cut(pixels: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return pixels
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _decode_png(data: bytes, box: Box) -> bytes | None:
    """RGB bytes of the box; None where Pillow must decode (another kind of PNG, or a damaged
    one)."""
    header = memoryview(data)[16:29]
    # After width and height: 8 bit, RGB, deflate, standard filters, not interlaced.
    if len(header) < 13 or bytes(header[8:]) != b"\x08\x02\x00\x00\x00":
        return None
    width = int.from_bytes(header[:4], "big")
    needed = (box.top + box.height) * (1 + 3 * width)
    try:
        rows = isal_zlib.decompressobj().decompress(_idat(data), needed)
        return _crop_png(rows, width, *box) if _crop_png and len(rows) == needed else None
    except (isal_zlib.error, ValueError):  # type: ignore[misc]  # an exception, untyped
        return None


def _idat(data: bytes) -> bytes:
    """The compressed rows of a PNG."""
    parts, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(parts)


def _decode_qoi(data: bytes) -> np.ndarray:
    try:
        pixels: np.ndarray = qoi.decode(data)
    except Exception as error:  # qoi documents no exception class
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    return pixels[..., :3]


def _png_depth(data: bytes) -> int:
    """Bits per channel of a PNG (byte 24, RFC 2083); 0 for other files."""
    return data[24] if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 24 else 0


def _decode_any(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(f"the picture has mode {image.mode}; convert it to 8 bit RGB")
            return np.asarray(image.convert("RGB"))
    except DecodeError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        raise DecodeError(f"{type(error).__name__}: {error}") from error
