"""Picture files: what can be kept is kept, and the rest is named."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import IFDRational

from measnet import decoding, pictures
from measnet.pictures import Picture, PictureError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEIGHT, WIDTH = 9, 6


def values(kind: str, channels: int) -> np.ndarray:
    random = np.random.default_rng(channels)
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    if kind == "float32":
        return random.random(shape, dtype=np.float32)
    return random.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


def save(path: Path, pixels: np.ndarray) -> Path:
    """Written by the libraries alone, without our code."""
    if path.suffix == ".tif":
        colour = "rgb" if pixels.ndim == 3 and pixels.shape[2] > 2 else "minisblack"
        extra = ["unassalpha"] if pixels.ndim == 3 and pixels.shape[2] in (2, 4) else None
        config = "contig" if pixels.ndim == 3 else None
        tifffile.imwrite(path, pixels, photometric=colour, extrasamples=extra, planarconfig=config)
    else:
        path.write_bytes(imagecodecs.png_encode(pixels))
    return path


def load(path: Path) -> np.ndarray:
    """By the libraries alone."""
    if path.suffix == ".tif":
        return tifffile.imread(path)
    return imagecodecs.png_decode(path.read_bytes())


def as_restored(picture: Picture) -> Picture:
    """What a network without a residual makes of it."""
    return picture.with_colour(picture.tensor())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(k, s) for k in ("uint8", "uint16") for s in (".png", ".tif")] + [("float32", ".tif")],
)
def test_every_value_survives(kind: str, suffix: str, channels: int, tmp_path: Path) -> None:
    pixels = values(kind, channels)
    picture = decoding.read(save(tmp_path / f"in{suffix}", pixels))
    assert picture.tensor().shape == (3, HEIGHT, WIDTH)
    pictures.write(as_restored(picture), tmp_path / f"out{suffix}")
    written = load(tmp_path / f"out{suffix}")
    assert written.dtype == pixels.dtype
    np.testing.assert_array_equal(written, pixels)
    assert not picture.notes and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_all_values_of_a_type_come_back(kind: str) -> None:
    ramp = np.arange(np.iinfo(kind).max + 1, dtype=kind).reshape(-1, 64, 1)
    np.testing.assert_array_equal(as_restored(Picture(ramp)).colour, ramp)


@pytest.mark.parametrize("compression", ["lzw", "zlib", None])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_kinds_of_deep_tiff(
    compression: str | None, byteorder: str, planar: str, tmp_path: Path
) -> None:
    pixels = values("uint16", 3)
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        byteorder=byteorder,  # type: ignore[arg-type]
    )
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif").colour, pixels)


def test_a_tiff_whose_white_is_zero(tmp_path: Path) -> None:
    pixels = values("uint16", 1)
    tifffile.imwrite(tmp_path / "a.tif", 65535 - pixels, photometric="miniswhite")
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif").colour[..., 0], pixels)


@pytest.mark.parametrize(
    ("mode", "channels", "alpha"),
    [("1", 1, False), ("L", 1, False), ("LA", 1, True), ("RGB", 3, False), ("RGBA", 3, True)],
)
def test_modes_of_pillow(mode: str, channels: int, alpha: bool, tmp_path: Path) -> None:
    image = Image.fromarray(values("uint8", 4)).convert(mode)
    image.save(tmp_path / "a.png")
    picture = decoding.read(tmp_path / "a.png")
    assert picture.colour.shape == (HEIGHT, WIDTH, channels)
    assert (picture.alpha is not None) == alpha
    pictures.write(as_restored(picture), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert written.mode == ("L" if mode == "1" else mode)
        np.testing.assert_array_equal(written, image.convert(written.mode))


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(values("uint8", 3)).quantize(8)
    palette.save(tmp_path / "a.png", transparency=3)
    picture = decoding.read(tmp_path / "a.png")
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha == 0, np.asarray(palette) == 3)
    np.testing.assert_array_equal(picture.colour, palette.convert("RGB"))


def test_a_palette_of_greys_is_grey(tmp_path: Path) -> None:
    grey = Image.fromarray(values("uint8", 1))
    grey.convert("P").save(tmp_path / "a.png")
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.png").colour[..., 0], grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_deep_png(channels: int, tmp_path: Path) -> None:
    pixels = values("uint16", channels)
    colour = np.atleast_1d(pixels[2, 3]).astype(">u2").tobytes()
    data = save(tmp_path / "a.png", pixels).read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(b"tRNS", colour) + data[33:])
    alpha = decoding.read(tmp_path / "a.png").alpha
    assert alpha is not None and alpha[2, 3] == 0 and (alpha == 65535).sum() == alpha.size - 1


def chunk(name: bytes, data: bytes) -> bytes:
    checked = name + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "Maker"
    tags[0x8769] = {0x829A: 0.01, 0xA002: WIDTH}  # exposure of 1/100 s; width
    tags[0x8825] = {1: "N"}
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_orientation_is_applied_once(orientation: int, suffix: str, tmp_path: Path) -> None:
    source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    options = {} if suffix == ".tif" else {"lossless": True}
    Image.fromarray(values("uint8", 3)).save(
        source, exif=exif(orientation).tobytes(), icc_profile=SRGB, **options
    )
    with Image.open(source) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    picture = decoding.read(source)
    np.testing.assert_array_equal(picture.colour, upright)
    pictures.write(picture, target)
    with Image.open(target) as image:
        tags = image.getexif()
        assert image.size == upright.shape[1::-1]
        assert 0x0112 not in tags and tags[0x010F] == "Maker"
        assert float(tags.get_ifd(0x8769)[0x829A]) == pytest.approx(0.01)
        assert tags.get_ifd(0x8825)[1] == "N"
        assert image.info["icc_profile"] == SRGB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_turn_as_shallow_ones(orientation: int, tmp_path: Path) -> None:
    deep = values("uint16", 3)
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", extratags=[tag])
    shallow = Image.fromarray((deep >> 8).astype(np.uint8))
    shallow.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(shallow))
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif").colour >> 8, expected)


def test_metadata_of_a_deep_png(tmp_path: Path) -> None:
    picture = Picture(values("uint16", 3), icc=SRGB, exif=exif(1).tobytes())
    pictures.write(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["icc_profile"] == SRGB and image.getexif()[0x010F] == "Maker"
    read = decoding.read(tmp_path / "a.png")
    np.testing.assert_array_equal(read.colour, picture.colour)
    assert read.icc == SRGB and b"Maker" in read.exif


def test_metadata_of_a_deep_tiff(tmp_path: Path) -> None:
    picture = Picture(values("uint16", 3), icc=SRGB, exif=exif(1).tobytes())
    pictures.write(picture, tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages.first.tags["Make"].value == "Maker"
        assert tiff.pages.first.tags["InterColorProfile"].value == SRGB
    (note,) = pictures.fit(picture, tmp_path / "a.tif").notes
    assert "GPS" in note


def test_damaged_exif_costs_the_exif_alone(tmp_path: Path) -> None:
    tags = exif(1).tobytes()
    Image.fromarray(values("uint8", 3)).save(tmp_path / "a.jpg", exif=tags[:-30])
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert decoding.read(tmp_path / "a.jpg").colour.shape == (HEIGHT, WIDTH, 3)


def test_damaged_exif_of_a_png_costs_the_exif_alone(tmp_path: Path) -> None:
    Image.fromarray(values("uint8", 3)).save(tmp_path / "a.png", exif=b"Exif\0\0garbage!")
    picture = decoding.read(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.colour, values("uint8", 3))
    assert "EXIF is damaged" in picture.notes[0]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_names_keep_their_letters(suffix: str, kind: str, tmp_path: Path) -> None:
    author = "© Jörg Müller".encode()
    tags = Image.Exif()
    tags[ExifTags.Base.Copyright] = author
    Image.fromarray(values("uint8", 3)).save(tmp_path / "a.jpg", exif=tags)
    read = decoding.read(tmp_path / "a.jpg")
    out = tmp_path / f"b{suffix}"
    pictures.write(Picture(values(kind, 3), exif=read.exif), out)
    kept = Image.Exif()
    kept.load(decoding.read(out).exif)
    assert kept[ExifTags.Base.Copyright].encode("latin-1") == author


@pytest.mark.parametrize("resolution", [(0, 0), (72, 0)])
def test_a_resolution_without_a_meaning_is_dropped(
    resolution: tuple[int, int], tmp_path: Path
) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.XResolution] = IFDRational(*resolution)
    tags[ExifTags.Base.ResolutionUnit] = 7
    pictures.write(Picture(values("uint16", 3), exif=tags.tobytes()), tmp_path / "a.tif")
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif").colour, values("uint16", 3))


def test_an_eight_bit_page_behind_its_thumbnail(tmp_path: Path) -> None:
    whole = values("uint8", 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(whole[::4, ::4], photometric="rgb", subfiletype=1)
        tiff.write(whole, photometric="rgb")
    np.testing.assert_array_equal(decoding.read(tmp_path / "a.tif").colour, whole)


def test_a_channel_of_unknown_meaning_is_noted(tmp_path: Path) -> None:
    pixels = values("uint8", 4)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    read = decoding.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(read.colour, pixels[..., :3])
    assert "a channel of unknown meaning is not kept" in read.notes


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(values("uint8", 3)).convert("CMYK")
    image.save(tmp_path / "a.tif")
    picture = decoding.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.colour, image.convert("RGB"))
    assert "CMYK" in picture.notes[0]


def test_the_second_picture_of_a_phone_is_named(tmp_path: Path) -> None:
    first, second = (Image.fromarray(values("uint8", 3)) for _ in range(2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    picture = decoding.read(tmp_path / "a.jpg")
    assert picture.colour.shape == (HEIGHT, WIDTH, 3) and "gain map" in picture.notes[0]


def test_jpeg_is_written_with_little_loss(tmp_path: Path) -> None:
    pictures.write(Picture(values("uint8", 3)), tmp_path / "a.JPG")
    with Image.open(tmp_path / "a.JPG") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no chroma subsampling
        quantization = image.quantization
    expected = io.BytesIO()
    Image.fromarray(values("uint8", 3)).save(expected, "JPEG", quality=95)
    assert quantization == Image.open(expected).quantization


def deep_alpha() -> Picture:
    return Picture(values("uint16", 3), values("uint16", 1))


@pytest.mark.parametrize(
    ("picture", "name", "expected"),
    [
        (Picture(values("uint16", 3)), "a.jpg", "uint16 became uint8"),
        (Picture(values("float32", 3)), "a.png", "float32 became uint16"),
        (Picture(values("uint8", 1)[..., None]), "a.webp", "grey is written as RGB"),
        (Picture(values("uint8", 3), icc=SRGB), "a.bmp", "ICC profile"),
        (Picture(values("uint8", 1)[..., None], icc=SRGB), "a.png", "ICC profile"),
        (Picture(values("uint8", 3), exif=exif(1).tobytes()), "a.bmp", "EXIF is not kept"),
    ],
)
def test_what_a_format_cannot_hold_is_noted(
    picture: Picture, name: str, expected: str, tmp_path: Path
) -> None:
    (note,) = pictures.fit(picture, tmp_path / name).notes
    assert expected in note
    pictures.write(picture, tmp_path / name)
    got = decoding.read(tmp_path / name)
    white = pictures.WHITE[got.colour.dtype]
    assert (got.tensor() - picture.tensor()).abs().max() <= (0.5 if name == "a.jpg" else 1 / white)


@pytest.mark.parametrize(
    ("picture", "name", "expected"),
    [
        (deep_alpha(), "a.jpg", "no transparency"),
        (deep_alpha(), "a.bmp", "no transparency"),
        (Picture(np.zeros((1, 16384, 3), np.uint8)), "a.webp", "16383 pixels a side"),
        (Picture(np.zeros((1, 1, 3), np.uint8)), "a.xyz", "unknown suffix"),
    ],
)
def test_what_a_format_must_not_lose_is_refused(
    picture: Picture, name: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(PictureError, match=expected):
        pictures.write(picture, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((4, 4), 1.5, np.float32), "floats from 1.5 to 1.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
        (np.zeros((4, 4), np.int16), "white is not known"),
        (np.zeros((4, 4), np.uint32), "white is not known"),
        (np.zeros((2, 4, 4), np.uint16), "holds 2 pictures"),
        (np.zeros((2, 4, 4), np.uint8), "holds 2 pictures"),
    ],
)
def test_tiffs_without_a_known_meaning(pixels: np.ndarray, expected: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    with pytest.raises(PictureError, match=expected) as error:
        decoding.read(tmp_path / "a.tif")
    assert str(error.value).startswith(str(tmp_path / "a.tif"))


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(values("uint8", channels)) for channels in (3, 1)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=[frames[1].convert("RGB")])
    with pytest.raises(PictureError, match="holds 2 pictures"):
        decoding.read(tmp_path / "a.webp")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_truncated_files_are_never_half_read(suffix: str, kind: str, tmp_path: Path) -> None:
    pictures.write(Picture(values(kind, 3)), tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    for length in range(0, len(data) - 16, 23):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(PictureError, match="cut"):
            decoding.read(tmp_path / "cut")


def test_the_limit_on_pixels_is_ours_and_leaves_that_of_pillow(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
    (tmp_path / "bomb.png").write_bytes(data + chunk(b"IEND", b""))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(PictureError, match="30000x30000 pixels, more than 300 megapixels"):
        decoding.read(tmp_path / "bomb.png")
    assert limit == Image.MAX_IMAGE_PIXELS
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((1001, 1000), np.uint16))
    with pytest.raises(PictureError, match="1000x1001 pixels, more than 1 megapixels"):
        decoding.read(tmp_path / "a.tif", megapixels=1)


def test_grey_is_the_mean_of_the_channels() -> None:
    image = torch.tensor([0.1, 0.2, 0.6]).view(3, 1, 1)
    assert Picture(np.zeros((1, 1, 1), np.uint8)).with_colour(image).colour.item() == round(
        0.3 * 255
    )


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Picture(np.zeros((1, 1, 3), np.uint8)).with_colour(torch.full((3, 1, 1), torch.nan))
