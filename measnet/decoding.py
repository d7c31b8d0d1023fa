"""Read picture files: PNG, JPEG, TIFF, WebP, BMP, recognised by their content.

Pillow reads 8-bit pictures. It cuts 16-bit colour down to 8 bits, so `png16` reads PNG with 16
bits, and tifffile reads TIFF with 16 bits or floats.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms

from measnet import png16
from measnet.pictures import WHITE, Picture, PictureError, as_stored

MEGAPIXELS = 300
"""Larger pictures are refused by default, by their header: a small file can claim any size."""
KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Rating,
    ExifTags.Base.Copyright,
)
"""EXIF tags that are kept, besides exposure and GPS. Not kept: the orientation (it is applied), the
thumbnail, and tags about the layout of a TIFF file."""
_READ = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "La": "LA",
    "P": "RGB",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBX": "RGB",
    "YCbCr": "RGB",
    "RGBA": "RGBA",
    "RGBa": "RGBA",
}
"""Pillow's mode of an 8-bit file -> the mode to which it is converted."""


def read(path: Path, *, megapixels: int = MEGAPIXELS) -> Picture:
    """Read a picture; its orientation tag is applied.

    Args:
        path: PNG, JPEG, TIFF, WebP or BMP, recognised by its content.
        megapixels: larger pictures are refused before their pixels are read.

    Raises:
        PictureError: not a picture, damaged, or of a kind that is refused; names the path.
        MemoryError: not enough memory for its pixels.
    """
    try:
        with path.open("rb") as file, _own_limit():
            start = file.read(4)
            file.seek(0)
            if start in _TIFF_STARTS:
                return _read_tiff(file, megapixels)
            return _read_by_pillow(file, megapixels)
    except MemoryError:
        raise
    except PictureError as error:
        raise PictureError(f"{path} {error}") from error
    except Exception as error:  # on damaged files the decoders raise errors of many types
        known = isinstance(error, OSError) and error.strerror
        reason = known or " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it is none of {', '.join(_READ)}"
        raise PictureError(f"{path} cannot be read as a picture: {reason}") from error


@contextmanager
def _own_limit() -> Iterator[None]:
    """Remove Pillow's limit of pixels, which is global; `_check_size` checks ours."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(width: int, height: int, megapixels: int) -> None:
    if width * height > megapixels * 1_000_000:
        raise PictureError(
            f"has {width}x{height} pixels, more than {megapixels} megapixels; if it is a real "
            "picture, raise the limit with --max-megapixels"
        )


def _read_by_pillow(file: IO[bytes], megapixels: int) -> Picture:
    with Image.open(file, formats=_READ) as image:
        _check_size(*image.size, megapixels)
        notes = []
        if image.format == "MPO":
            notes.append("the second picture in the file, a preview or gain map, is not kept")
        elif image.format != "TIFF" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise PictureError(f"holds {frames} pictures: save each in a file of its own")
        image.load()  # before EXIF: it applies the orientation of a TIFF, and drops the tag
        icc = image.info.get("icc_profile") or b""
        exif, orientation = _exif(image.getexif, notes)
        if image.format == "PNG" and _png_depth(file) == 16:
            pixels = _deep_png(file)
        elif image.mode == "CMYK":
            pixels, icc = _cmyk(image, icc, notes)
        else:
            pixels = _shallow(image)
    colour, alpha = _split(pixels)
    return _upright(Picture(colour, alpha, icc, exif, tuple(notes)), orientation)


def _png_depth(file: IO[bytes]) -> int:
    """Bits per channel; byte 24 of a PNG (RFC 2083, IHDR comes first)."""
    file.seek(24)
    return file.read(1)[0]


def _deep_png(file: IO[bytes]) -> np.ndarray:
    """(H, W, C) uint16; a transparent colour (chunk tRNS) becomes alpha."""
    file.seek(0)
    pixels: np.ndarray = png16.decode(file.read())
    return pixels.reshape(*pixels.shape[:2], -1)


def _cmyk(image: Image.Image, icc: bytes, notes: list[str]) -> tuple[np.ndarray, bytes]:
    """RGB pixels and their profile."""
    if not icc:
        notes.append("CMYK without a profile was converted to RGB by the simple formula")
        return np.array(image.convert("RGB")), b""
    notes.append("CMYK was converted to sRGB by its profile")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
    assert converted is not None  # applied in place only on request
    return np.array(converted), srgb.tobytes()


def _shallow(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 in the order of the modes L, LA, RGB or RGBA."""
    mode = _MODES.get(image.mode)
    if mode is None:
        raise PictureError(
            f"has Pillow's mode {image.mode}, whose range of values is unknown: save it as "
            "grey or RGB with 8 or 16 bits, or as a TIFF with floats in [0, 1]"
        )
    if image.has_transparency_data and not mode.endswith("A"):
        mode += "A"
    pixels = np.array(image.convert(mode))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if image.mode in ("P", "PA") and (pixels[..., :1] == pixels[..., 1:3]).all():
        pixels = np.delete(pixels, (1, 2), axis=2)  # a palette of greys
    return pixels


def _read_tiff(file: IO[bytes], megapixels: int) -> Picture:
    """Up to 8 bits by Pillow, which reads most kinds; 16 bits and floats by tifffile."""
    with tifffile.TiffFile(file) as tiff:
        pages = [page.aspage() for page in tiff.pages]
        whole = [page for page in pages if not page.is_reduced]
        if len(whole) != 1:
            raise PictureError(f"holds {len(whole)} pictures: save each in a file of its own")
        (page,) = whole
        _check_size(page.imagewidth, page.imagelength, megapixels)
        bits = np.max(page.bitspersample)
        if page is pages[0] and bits <= 8:
            unclear = tifffile.EXTRASAMPLE.UNSPECIFIED in page.extrasamples
            file.seek(0)
            picture = _read_by_pillow(file, megapixels)
            note = "a channel of unknown meaning is not kept"
            return (
                dataclasses.replace(picture, notes=(*picture.notes, note)) if unclear else picture
            )
        _check_deep(page, int(bits))
        notes: list[str] = []
        colour, alpha = _split(_deep_tiff(page, notes))
        file.seek(0)

        def tags() -> Image.Exif:
            loaded = Image.Exif()
            loaded.load_from_fp(file)
            return loaded

        exif, orientation = _exif(tags, notes)
        profile = page.tags.get(ExifTags.Base.InterColorProfile)
        icc = bytes(profile.value) if profile else b""
    return _upright(Picture(colour, alpha, icc, exif, tuple(notes)), orientation)


def _check_deep(page: tifffile.TiffPage, bits: int) -> None:
    """Refuse TIFFs of more than 8 bits whose values or channels have no known meaning."""
    kinds = tifffile.PHOTOMETRIC
    known = {kinds.MINISBLACK: 1, kinds.MINISWHITE: 1, kinds.RGB: 3}
    is_float = page.dtype is not None and page.dtype.kind == "f"
    if not is_float and (page.dtype, bits) not in ((np.uint8, 8), (np.uint16, 16)):
        raise PictureError(
            f"has {bits} bits of type {page.dtype}, whose white is not known: save it with 8 or 16 "
            "bits unsigned, or with floats in [0, 1]"
        )
    if page.photometric not in known or page.imagedepth != 1:
        raise PictureError(
            f"has colours of kind {tifffile.PHOTOMETRIC(page.photometric).name} with {bits} bits: "
            "save it as grey or RGB"
        )
    extra = page.samplesperpixel - known[kinds(page.photometric)]
    unclear = set(page.extrasamples) - {tifffile.EXTRASAMPLE.UNASSALPHA}
    if extra not in (0, 1) or unclear:
        raise PictureError(
            f"has {extra} channels beside its colours, premultiplied or of unknown meaning: save "
            "it with plain (not premultiplied) transparency or with none"
        )


def _deep_tiff(page: tifffile.TiffPage, notes: list[str]) -> np.ndarray:
    """(H, W, C) uint8, uint16, or float32 in [0, 1]."""
    pixels: np.ndarray = page.asarray()
    if page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.dtype.kind == "f":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise PictureError(
                f"holds floats from {low:.6g} to {high:.6g}: scale them to [0, 1], where 1 is white"
            )
        if pixels.dtype.itemsize > 4:
            notes.append("64-bit floats became 32-bit ones")
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32 if pixels.dtype.kind == "f" else np.uint16)
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        pixels[..., 0] = WHITE[pixels.dtype] - pixels[..., 0]
    return pixels


def _split(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, 1 or 3) and alpha (H, W) of one to four channels."""
    channels = pixels.shape[2]
    return (pixels, None) if channels % 2 else (pixels[..., :-1], pixels[..., -1])


def _exif(load: Callable[[], Image.Exif], notes: list[str]) -> tuple[bytes, int]:
    """The kept EXIF tags as one block, and the orientation from 1 to 8."""
    orientation = 1
    kept = Image.Exif()
    try:
        source = load()
        orientation = source.get(ExifTags.Base.Orientation, 1)
        for tag in KEPT_TAGS:
            if tag in source:
                kept[tag] = as_stored(source[tag])
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if inner := dict(source.get_ifd(part)):
                for size in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
                    inner.pop(size, None)
                inner.pop(ExifTags.IFD.Interop, None)
                kept[part] = {tag: as_stored(value) for tag, value in inner.items()}
        block = kept.tobytes() if len(kept) else b""
    except Exception as error:  # wrong types and offsets; the pixels may be intact
        notes.append(f"its EXIF is damaged and not kept ({type(error).__name__}: {error})")
        block = b""
    return block, orientation if orientation in range(1, 9) else 1


def _upright(picture: Picture, orientation: int) -> Picture:
    """Apply EXIF's orientation tag; the table holds (transpose, flip rows, flip columns)."""
    over, down, right = (
        (False, False, False),
        (False, False, True),
        (False, True, True),
        (False, True, False),
        (True, False, False),
        (True, False, True),
        (True, True, True),
        (True, True, False),
    )[orientation - 1]

    def turn(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.swapaxes(0, 1) if over else pixels
        return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if right else 1])

    alpha = None if picture.alpha is None else turn(picture.alpha)
    return dataclasses.replace(picture, colour=turn(picture.colour), alpha=alpha)
