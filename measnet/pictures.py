"""Pictures in memory, and writing them: bit depth, grey, transparency, profile, EXIF.

`measnet.decoding` reads files. Pillow writes 8-bit pictures. It has no 16-bit colour, so
`png16` writes PNG with 16 bits, and tifffile writes TIFF with 16 bits or floats. docs/restore.md
lists what is kept, converted and refused.
"""

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from measnet import png16
from measnet.files import complete_file

WHITE: dict[np.dtype[Any], int] = {
    np.dtype(np.uint8): 255,
    np.dtype(np.uint16): 65535,
    np.dtype(np.float32): 1,
}
"""Type of the pixels -> the value of white; black is 0."""
ROWS = 256
"""Rows of a picture that are converted at once."""


class PictureError(ValueError):
    """A file cannot be read or written as a picture; the message says why."""


class Format(NamedTuple):
    """Capabilities of a file format."""

    name: str
    """Pillow's name."""
    types: tuple[np.dtype, ...]
    """Pixel types, the one with most bits first."""
    alpha: bool = True
    grey: bool = True
    metadata: bool = True
    """ICC profile and EXIF."""
    longest: int = 2**31 - 1
    """Largest side in pixels."""
    options: dict[str, Any] = {}  # noqa: RUF012 (immutable by use)
    """Pillow's options for writing."""


_8, _16, _FLOAT = WHITE
_PNG = Format("PNG", (_16, _8))
_TIFF = Format("TIFF", (_FLOAT, _16, _8))  # not compressed: Pillow fails to compress one with EXIF
_JPEG = Format(
    "JPEG", (_8,), alpha=False, longest=65535, options={"quality": 95, "subsampling": "4:4:4"}
)
_BMP = Format("BMP", (_8,), alpha=False, metadata=False)
_WEBP = Format("WEBP", (_8,), grey=False, longest=16383, options={"lossless": True, "exact": True})
FORMATS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".bmp": _BMP,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _WEBP,
}
"""Suffix in lower case -> format. All but JPEG are written without loss."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels of a picture, upright, with the metadata of its file."""

    colour: np.ndarray
    """(H, W, 1) grey or (H, W, 3) RGB; uint8, uint16, or float32 in [0, 1]."""
    alpha: np.ndarray | None = None
    """(H, W) of the same type; None if the file has no transparency."""
    icc: bytes = b""
    """ICC profile; empty if there is none."""
    exif: bytes = b""
    """EXIF block as Pillow writes it, without orientation and thumbnail; empty if none."""
    notes: tuple[str, ...] = ()
    """What was converted or could not be kept, for the user."""

    def tensor(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]; grey is repeated three times."""
        white = np.float32(WHITE[self.colour.dtype])
        planes = np.divide(self.colour.transpose(2, 0, 1), white, dtype=np.float32)
        return torch.from_numpy(planes).expand(3, -1, -1).contiguous()

    def with_colour(self, image: Tensor) -> "Picture":
        """This picture with other colours; depth, grey, alpha and metadata stay.

        Args:
            image: (3, H, W) on the CPU; clamped to [0, 1]. A grey picture gets the mean of the
                three channels, which is exact if they are equal.

        Raises:
            ValueError: a value is not finite.
        """
        colour = np.empty_like(self.colour)
        for top in range(0, len(colour), ROWS):  # a few rows need little memory
            part = image[:, top : top + ROWS]
            if not part.isfinite().all():
                raise ValueError("the network gave values that are not finite; check its weights")
            if self.colour.shape[2] == 1:
                part = part.mean(0, keepdim=True, dtype=torch.float64)
            unit = part.clamp(0, 1).permute(1, 2, 0).float().numpy()
            colour[top : top + ROWS] = _from_unit(unit, colour.dtype)
        return dataclasses.replace(self, colour=colour)


def _to_unit(pixels: np.ndarray) -> np.ndarray:
    return np.divide(pixels, np.float32(WHITE[pixels.dtype]), dtype=np.float32)


def _from_unit(pixels: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Values in [0, 1] as pixels of another type, rounded to the nearest."""
    return pixels if kind.kind == "f" else np.rint(pixels * WHITE[kind]).astype(kind)


def fit(picture: Picture, path: Path) -> Picture:
    """Convert the picture to what the format of `path` supports; notes say what is lost.

    Raises:
        PictureError: an unknown suffix, a side that is too long, or transparency that would be
            lost.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise PictureError(f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(FORMATS)}")
    format = FORMATS[suffix]
    height, width, channels = picture.colour.shape
    if max(height, width) > format.longest:
        raise PictureError(
            f"{path}: {suffix} holds {format.longest} pixels a side, the picture is "
            f"{width}x{height}; write .png or .tif"
        )
    if picture.alpha is not None and not format.alpha:
        raise PictureError(f"{path}: {suffix} holds no transparency; write .png or .tif")
    colour, alpha, icc, exif = picture.colour, picture.alpha, picture.icc, picture.exif
    notes = list(picture.notes)
    if colour.dtype not in format.types:
        deepest = format.types[0]
        notes.append(f"{colour.dtype} became {deepest}, the most that {suffix} holds")
        colour = _from_unit(_to_unit(colour), deepest)
        alpha = None if alpha is None else _from_unit(_to_unit(alpha), deepest)
    if channels == 1 and not format.grey:
        notes.append(f"grey is written as RGB, {suffix} holds no grey")
        colour = colour.repeat(3, axis=2)
    if icc and not (format.metadata and _describes(icc, colour.shape[2])):
        notes.append(f"its ICC profile does not fit {suffix} of its channels and is not kept")
        icc = b""
    if exif and not format.metadata:
        notes.append(f"its EXIF is not kept, {suffix} holds none")
        exif = b""
    elif exif and format is _TIFF and colour.dtype != np.uint8 and _has_parts(exif):
        notes.append(f"exposure and GPS in its EXIF are not kept in a {colour.dtype} TIFF")
    return Picture(colour, alpha, icc, exif, tuple(notes))


def _describes(icc: bytes, channels: int) -> bool:
    """Whether a profile is for grey or RGB, by the colour space in its header."""
    return icc[16:20] == (b"GRAY" if channels == 1 else b"RGB ")


def _has_parts(exif: bytes) -> bool:
    """Whether EXIF also has tags of exposure or GPS."""
    tags = Image.Exif()
    tags.load(exif)
    return ExifTags.IFD.Exif in tags or ExifTags.IFD.GPSInfo in tags


def write(picture: Picture, path: Path) -> None:
    """Write a picture, converted by `fit`, in the format of the suffix.

    The file appears when it is complete; an existing one is replaced. Folders are created.

    Raises:
        PictureError: as `fit`.
        OSError: it cannot be written.
    """
    picture = fit(picture, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as unfinished, unfinished.open("wb") as file:
        _encode(picture, FORMATS[path.suffix.lower()], file)


def _encode(picture: Picture, format: Format, file: IO[bytes]) -> None:
    parts = (
        [picture.colour] if picture.alpha is None else [picture.colour, picture.alpha[..., None]]
    )
    pixels = np.ascontiguousarray(np.concatenate(parts, axis=2))
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    if pixels.dtype == np.uint8:
        metadata = {"icc_profile": picture.icc, "exif": picture.exif} if format.metadata else {}
        kept: dict[str, Any] = {name: value for name, value in metadata.items() if value}
        if format is _TIFF and picture.exif:
            kept["exif"] = _in_bytes(picture.exif)
        Image.fromarray(pixels).save(file, format.name, **format.options, **kept)
    elif format is _PNG:
        _encode_deep_png(pixels, picture, file)
    else:
        _encode_deep_tiff(pixels, picture, file)


def as_stored(value: Any) -> Any:
    """The value of a tag, a text as the bytes of its file.

    Pillow decodes each text as Latin-1. When it writes a text, letters other than ASCII become
    question marks; bytes are written as they are.
    """
    return value.encode("latin-1", "replace") if isinstance(value, str) else value


def _in_bytes(exif: bytes) -> Image.Exif:
    """The tags of a block, see `as_stored`."""
    tags = Image.Exif()
    tags.load(exif)
    for tag, value in list(tags.items()):
        tags[tag] = as_stored(value)
    return tags


def _encode_deep_png(pixels: np.ndarray, picture: Picture, file: IO[bytes]) -> None:
    """Insert metadata, which `png16` does not write, after the header (8 + 25 bytes)."""
    encoded = png16.encode(pixels)
    file.write(encoded[:33])
    if picture.icc:
        PngImagePlugin.putchunk(file, b"iCCP", b"ICC Profile\0\0", zlib.compress(picture.icc))
    if picture.exif:
        PngImagePlugin.putchunk(file, b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    file.write(encoded[33:])


def _resolution(tags: Image.Exif) -> dict[str, Any]:
    """The resolution for tifffile; none where a file has it wrong, such as 72/0."""
    base = ExifTags.Base
    unit = tags.get(base.ResolutionUnit, 1)
    try:
        sides = [float(tags.get(tag, 1)) for tag in (base.XResolution, base.YResolution)]
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    if unit not in (1, 2, 3) or not all(0 < side < 2**32 for side in sides):
        return {}
    return {"resolution": tuple(sides), "resolutionunit": unit}


def _encode_deep_tiff(pixels: np.ndarray, picture: Picture, file: IO[bytes]) -> None:
    tags = _in_bytes(picture.exif)
    texts = [
        (int(tag), "s", 0, text, True) for tag, text in tags.items() if isinstance(text, bytes)
    ]
    tifffile.imwrite(
        file,
        pixels,
        photometric="rgb" if picture.colour.shape[2] == 3 else "minisblack",
        extrasamples=None if picture.alpha is None else ["unassalpha"],
        planarconfig="contig" if pixels.ndim == 3 else None,
        compression="zlib",
        predictor=True,
        **_resolution(tags),
        iccprofile=picture.icc or None,
        extratags=texts,
        metadata=None,
        software=False,
    )
