"""Crops decoded by the fast paths have the pixels that Pillow gives."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shards import decode as decoding
from shards.decode import (
    NO_FLIP,
    Box,
    DecodeError,
    Flip,
    as_bytes,
    as_floats,
    decode,
    encode_tile,
)


def photograph(width: int, height: int) -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def boxes(width: int, height: int, count: int) -> list[Box]:
    rng = np.random.default_rng(width * height)
    corners = [Box(0, 0, height, width), Box(height - 1, width - 1, 1, 1), Box(0, 0, 1, 1)]
    for _ in range(count):
        tall, wide = (
            int(rng.integers(1, min(height, 64) + 1)),
            int(rng.integers(1, min(width, 64) + 1)),
        )
        top, left = rng.integers(0, [height - tall + 1, width - wide + 1])
        corners.append(Box(int(top), int(left), tall, wide))
    return corners


def check(data: bytes, width: int, height: int, count: int = 12) -> None:
    whole = by_pillow(data)
    assert np.array_equal(decode(data), whole)
    for box in boxes(width, height, count):
        cut = whole[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(decode(data, box), cut), box


@pytest.mark.parametrize("size", [(200, 150), (33, 47), (16, 16), (1, 1), (97, 130)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(size: tuple[int, int], subsampling: int, progressive: bool) -> None:
    for quality in (60, 95):
        data = encoded(
            photograph(*size),
            "JPEG",
            quality=quality,
            subsampling=subsampling,
            progressive=progressive,
        )
        check(data, *size)


@pytest.mark.parametrize("size", [(200, 150), (33, 47), (1, 1), (97, 130)])
def test_png_with_every_filter(size: tuple[int, int]) -> None:
    # Pillow's encoder chooses filters row by row; noise and flat rows make it use all of them.
    picture = np.array(photograph(*size))
    picture[::5] = 7
    picture[1::5] = np.random.default_rng(0).integers(0, 256, picture[1::5].shape)
    check(encoded(Image.fromarray(picture), "PNG"), *size)


@pytest.mark.parametrize("kind", range(5))
def test_each_png_filter_by_hand(kind: int) -> None:
    """Rows filtered as the PNG specification says (section 9), undone by Pillow and by us."""
    import struct
    import zlib

    width, height = 37, 11
    raw = np.random.default_rng(kind).integers(0, 256, (height, width * 3)).astype(int)
    rows = []
    for y in range(height):
        above = raw[y - 1] if y else np.zeros_like(raw[0])
        left = np.concatenate([np.zeros(3, int), raw[y][:-3]])
        corner = np.concatenate([np.zeros(3, int), above[:-3]])
        guess = left + above - corner
        to_left, to_up, to_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
        paeth = np.where(
            (to_left <= to_up) & (to_left <= to_corner),
            left,
            np.where(to_up <= to_corner, above, corner),
        )
        predicted = (0, left, above, (left + above) // 2, paeth)[kind]
        rows.append(bytes([kind]) + ((raw[y] - predicted) % 256).astype(np.uint8).tobytes())

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packed = zlib.compress(b"".join(rows))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    data += chunk(b"IDAT", packed[:50]) + chunk(b"IDAT", packed[50:]) + chunk(b"IEND", b"")
    expected = raw.reshape(height, width, 3).astype(np.uint8)
    assert np.array_equal(by_pillow(data), expected)
    assert np.array_equal(decode(data, Box(0, 0, height, width)), expected)
    assert np.array_equal(decode(data, Box(4, 9, 5, 20)), expected[4:9, 9:29])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_kinds_of_png_take_pillow(mode: str) -> None:
    check(encoded(photograph(50, 40).convert(mode), "PNG"), 50, 40, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_kinds_of_jpeg_take_pillow(mode: str) -> None:
    check(encoded(photograph(50, 40).convert(mode), "JPEG"), 50, 40, 3)


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "TIFF", "PPM"])
def test_other_formats_take_pillow(kind: str) -> None:
    check(encoded(photograph(50, 40), kind), 50, 40, 3)


def test_tiles_lose_nothing() -> None:
    picture = np.array(photograph(128, 90))
    data = encode_tile(picture)
    assert np.array_equal(decode(data), picture)
    assert np.array_equal(by_pillow(data), picture)  # as any other reader of QOI sees it


@pytest.mark.parametrize("number", range(8))
def test_flips(number: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    flip = Flip(bool(number & 1), bool(number & 2), bool(number & 4))
    expected = np.swapaxes(pixels, 0, 1) if flip.transpose else pixels
    expected = np.flipud(expected) if flip.vertical else expected
    expected = np.fliplr(expected) if flip.horizontal else expected
    expected = np.moveaxis(expected, -1, 0)
    assert np.array_equal(as_bytes([pixels], [flip])[0], expected)
    floats = as_floats([pixels], [flip])[0]
    assert floats.dtype == np.float32
    assert np.array_equal(floats, torch.from_numpy(expected.copy()).div(255).numpy())
    # A view that is not contiguous, as a crop of a whole picture is.
    view = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)[2:7, 1:8]
    assert np.array_equal(
        as_floats([view], [NO_FLIP])[0], np.float32(view.transpose(2, 0, 1)) / 255
    )


def test_without_the_compiled_part_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encoded(photograph(90, 70), kind) for kind in ("PNG", "JPEG")]
    box = Box(11, 13, 40, 50)
    fast = [decode(data, box) for data in pictures]
    flips = [Flip(bool(n & 1), bool(n & 2), bool(n & 4)) for n in range(8)]
    square = [np.ascontiguousarray(fast[0][:40, :40])] * 8
    laid_out = as_floats(square, flips)
    monkeypatch.setattr(decoding, "_crop_png", None)
    monkeypatch.setattr(decoding, "_crop_jpeg", None)
    monkeypatch.setattr(decoding, "_planes", None)
    assert np.array_equal(as_floats(square, flips), laid_out)
    for data, pixels in zip(pictures, fast, strict=True):
        assert np.array_equal(decode(data, box), pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_compiled_part_is_there_where_it_was_built(kind: str) -> None:
    """Says aloud where the suite runs without it."""
    if {"PNG": decoding._crop_png, "JPEG": decoding._crop_jpeg}[kind] is None:
        pytest.skip("no compiler, or no libjpeg-turbo, at installation")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "QOI", "none"])
def test_damage_is_an_error_never_a_crash(kind: str) -> None:
    image = photograph(90, 70)
    whole = {
        "PNG": encoded(image, "PNG"),
        "JPEG": encoded(image, "JPEG"),
        "QOI": encode_tile(np.array(image)),
        "none": b"hello, I am no picture at all",
    }[kind]
    for cut in (0, 1, 10, 30, len(whole) // 2, len(whole) - 30):
        for box in (None, Box(40, 40, 30, 50)):
            if kind == "none" or cut < 31 or box is None:
                with pytest.raises(DecodeError):
                    decode(whole[:cut], box)
            else:
                # A crop above the damage may still be right; any other is refused.
                try:
                    pixels = decode(whole[:cut], box)
                except DecodeError:
                    continue
                assert np.array_equal(pixels, by_pillow(whole)[40:70, 40:90])
    rng = np.random.default_rng(1)
    for _ in range(200):  # flipped bytes: any pixels or an error, but no crash
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = int(rng.integers(0, 256))
        with contextlib.suppress(DecodeError):
            assert decode(bytes(damaged), Box(0, 0, 8, 8)).dtype == np.uint8


def test_16_bit_pictures_are_refused() -> None:
    data = encoded(Image.fromarray(np.zeros((5, 5), np.uint16)), "PNG")
    with pytest.raises(DecodeError, match="convert it to 8 bit"):
        decode(data)


def test_genuine_pictures(real_pictures: Path) -> None:
    for path in ("derain/Rain100L/input/20.png", "deblur/GoPro/test/input/Flower1.png"):
        data = (real_pictures / path).read_bytes()
        height, width = by_pillow(data).shape[:2]
        check(data, width, height, 6)
    for path in ("dehaze/SOTS/outdoor/hazy/0002_0.8_0.08.jpg", "denoise/BSD365/100007.jpg"):
        data = (real_pictures / path).read_bytes()
        height, width = by_pillow(data).shape[:2]
        check(data, width, height, 12)
