"""PNG with 16 bits per channel, which Pillow reduces to 8.

Uses imagecodecs, which the project installs, or OpenCV if only that is installed.
"""

import importlib.util

import numpy as np

GREY_ALPHA = 4
"""Colour type of a PNG with grey and alpha (PNG specification, IHDR)."""


def decode(data: bytes) -> np.ndarray:
    """The pixels of a file: (H, W) or (H, W, 2 to 4) uint16, grey or RGB and alpha.

    Raises:
        ValueError, RuntimeError: the library cannot read it as PNG.
    """
    if _has_imagecodecs():
        import imagecodecs

        pixels: np.ndarray = imagecodecs.png_decode(data)
        return pixels
    import cv2

    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        raise ValueError("OpenCV cannot decode it: it is damaged or cut short")
    if found.ndim == 2:
        return np.asarray(found)
    pixels = np.concatenate([found[..., 2::-1], found[..., 3:]], axis=2)  # OpenCV uses BGR
    return pixels[..., [0, 3]] if data[25] == GREY_ALPHA else pixels


def encode(pixels: np.ndarray) -> bytes:
    """Encode (H, W) or (H, W, 2 to 4) uint16. OpenCV writes grey with alpha as RGB with alpha.

    Raises:
        ValueError: the library cannot write it.
    """
    if _has_imagecodecs():
        import imagecodecs

        return bytes(imagecodecs.png_encode(pixels))
    import cv2

    if pixels.ndim == 3:
        grey = pixels.shape[2] == 2
        colour = np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels[..., 2::-1]
        pixels = np.concatenate([colour, pixels[..., 1 if grey else 3 :]], axis=2)
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))
    if not done:
        raise ValueError("OpenCV cannot write it as PNG")
    return encoded.tobytes()


def _has_imagecodecs() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None
