"""16-bit PNG by either library gives the same pixels."""

import importlib.util

import numpy as np
import pytest

from measnet import png16

KINDS = [(5, 7), (5, 7, 2), (5, 7, 3), (5, 7, 4)]


@pytest.mark.parametrize("library", ["imagecodecs", "cv2"])
@pytest.mark.parametrize("shape", KINDS)
def test_pixels_survive(shape, library: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    pixels = np.random.default_rng(0).integers(0, 65536, shape, np.uint16)
    written = png16.encode(pixels)  # by what is installed
    monkeypatch.setattr(png16, "_has_imagecodecs", lambda: library == "imagecodecs")
    assert np.array_equal(png16.decode(written).reshape(shape), pixels)
    again = png16.decode(png16.encode(pixels))
    if shape[2:] == (2,) and library == "cv2":  # grey with alpha becomes RGB with alpha
        again = again[..., [0, 3]]
    assert np.array_equal(again.reshape(shape), pixels)


def test_a_damaged_file_is_an_error() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        png16.decode(b"\x89PNG\r\n\x1a\n" + bytes(40))
