"""PSNR and SSIM, with range, colour space, border and crop stated in a `Protocol`.

The field's protocol (PromptIR, AdaIR, MoCE-IR, MEASNet) is `FIELD`: RGB in [0, 1], clipped, not
rounded to 8 bit, the whole picture, data range 1, no border cut; PSNR over all pixels and channels
at once, SSIM by scikit-image's default (7 x 7 uniform window, sample covariance) per channel, then
averaged.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

_LUMA = np.array([65.481, 128.553, 24.966]) / 255.0
_SSIM_WINDOW = 7


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How two pictures are compared; every figure is stated with it."""

    colour: Literal["rgb", "y"] = "rgb"
    """`rgb`, or `y`: luma of ITU-R BT.601 (16-235 of 255), as older deraining tables use it."""
    border: int = 0
    """Pixels cut off on each side before comparing, as super-resolution tables do."""
    crop16: bool = False
    """Compare the centre crop whose sides are multiples of 16, for programs that test on it."""

    def __post_init__(self) -> None:
        """Refuse a negative border."""
        if self.border < 0:
            raise ValueError(f"border is {self.border} pixels, but must be 0 or more")

    def describe(self) -> str:
        """The protocol in one line, for tables, files and figures."""
        colour = "RGB" if self.colour == "rgb" else "Y of BT.601 (16-235)"
        area = "centre crop to multiples of 16" if self.crop16 else "whole picture"
        border = f"border {self.border} px cut" if self.border else "no border cut"
        return (
            f"{colour} in [0,1], clipped, not rounded to 8 bit, data range 1, {area}, {border}; "
            "SSIM: scikit-image default (7x7 uniform window) per channel"
        )

    def as_dict(self) -> dict[str, object]:
        """Fields and the line of `describe`, for JSON."""
        return {**dataclasses.asdict(self), "description": self.describe()}


FIELD = Protocol()


def psnr(
    restored: NDArray[np.floating], clean: NDArray[np.floating], protocol: Protocol = FIELD
) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures, NaN where a value is NaN.

    Args:
        restored: (H, W, 3), RGB in [0, 1]; values outside are clipped.
        clean: the same shape.
        protocol: how to compare.

    Raises:
        ValueError: other shapes, or no pixels are left to compare.
    """
    a, b = _compared(restored, clean, protocol)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(-10.0 * np.log10(error))


def ssim(
    restored: NDArray[np.floating], clean: NDArray[np.floating], protocol: Protocol = FIELD
) -> float:
    """Structural similarity, 1 for equal pictures; mean over channels and pixels.

    Arguments and errors as for `psnr`; at least 7 x 7 pixels, SSIM's window, must be compared.
    """
    a, b = _compared(restored, clean, protocol)
    if min(a.shape[:2]) < _SSIM_WINDOW:
        size = f"{a.shape[0]}x{a.shape[1]}"
        raise ValueError(f"SSIM needs at least {_SSIM_WINDOW}x{_SSIM_WINDOW} pixels, got {size}")
    return float(structural_similarity(a, b, data_range=1.0, channel_axis=2))


def _compared(
    restored: NDArray[np.floating], clean: NDArray[np.floating], protocol: Protocol
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both pictures in float64 as the protocol compares them: (H', W', 3), or (H', W', 1) for Y."""
    if restored.shape != clean.shape or clean.ndim != 3 or clean.shape[2] != 3:
        raise ValueError(f"expected two pictures (H, W, 3), got {restored.shape}, {clean.shape}")
    height, width = clean.shape[:2]
    top = left = 0
    if protocol.crop16:
        top, left = height % 16 // 2, width % 16 // 2
        height, width = height // 16 * 16, width // 16 * 16
    cut = protocol.border
    if min(height, width) <= 2 * cut:
        raise ValueError(f"no pixels of {clean.shape[0]}x{clean.shape[1]} are left to compare")
    rows, columns = slice(top + cut, top + height - cut), slice(left + cut, left + width - cut)

    def prepare(picture: NDArray[np.floating]) -> NDArray[np.float64]:
        part = np.clip(picture[rows, columns].astype(np.float64), 0.0, 1.0)
        return part if protocol.colour == "rgb" else (part @ _LUMA + 16.0 / 255.0)[..., None]

    return prepare(restored), prepare(clean)
