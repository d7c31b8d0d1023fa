"""Tars written by the webdataset library, as users bring them."""

import io
from pathlib import Path

import numpy as np
import skimage.data
import webdataset
from PIL import Image

Sample = dict[str, bytes]


def photo(number: int, form: str = "PNG", side: int = 48) -> bytes:
    cut = skimage.data.coffee()[8 * number : 8 * number + side, 100 : 164 + number]
    buffer = io.BytesIO()
    Image.fromarray(cut).save(buffer, form)
    return buffer.getvalue()


def deep_photo() -> bytes:
    """Sixteen bits per pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 48), 999, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int) -> Sample:
    """A JPEG copy is the degraded picture."""
    return {"gt.png": photo(number), "lq.jpg": photo(number, "JPEG"), "json": b"{}"}


def write(path: Path, samples: dict[str, Sample]) -> Path:
    """Writes a tar with the webdataset library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for key, sample in samples.items():
            tar.write({"__key__": key, **sample})
    return path


RAIN = {"task": "derain", "clean": "gt.png", "degraded": "lq.jpg", "workers": 1}
