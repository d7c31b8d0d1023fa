"""PSNR and SSIM, with range, colour space, border and crop stated in a `Protocol`.

The field's protocol (PromptIR, AdaIR, MoCE-IR, MEASNet) is `FIELD`: RGB in [0, 1], clipped, not
rounded to 8 bit, the whole picture, data range 1, no border cut; PSNR over all pixels and channels
at once, SSIM by scikit-image's default (7 x 7 uniform window, sample covariance) per channel, then
averaged. Everything is computed in float64, on the device of the pictures.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VERSION = 2
"""Of the protocol; figures of different versions must not be compared. Version 2: `crop16` crops
what the network gets, and noise may be the field's."""
_LUMA = (65.481 / 255.0, 128.553 / 255.0, 24.966 / 255.0)
_WINDOW = 7
"""Side of SSIM's window."""
_C1, _C2 = 0.01**2, 0.03**2
_AT_ONCE = 50_000
"""Values of SSIM's map that are computed at once on a CPU: its sums then stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How pictures are degraded, restored and compared; every figure is stated with it."""

    colour: Literal["rgb", "y"] = "rgb"
    """`rgb`, or `y`: luma of ITU-R BT.601 (16-235 of 255), as older deraining tables use it."""
    border: int = 0
    """Pixels cut off on each side before comparing, as super-resolution tables do."""
    crop16: bool = False
    """Crop pictures to the centre whose sides are multiples of 16, before they are degraded by
    noise and restored, as the programs of the field do."""
    noise: Literal["picture", "field"] = "picture"
    """Noise of denoising: `picture`: from the picture's bytes, so that it does not depend on the
    other pictures; `field`: from numpy's RandomState(0), picture after picture and sigma after
    sigma, as the programs of the field do."""

    def __post_init__(self) -> None:
        """Refuse a negative border."""
        if self.border < 0:
            raise ValueError(f"border is {self.border} pixels, but must be 0 or more")

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the sha256 over version and fields."""
        fields = {"version": VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def describe(self) -> str:
        """The protocol in one line, for tables, files and figures."""
        colour = "RGB" if self.colour == "rgb" else "Y of BT.601 (16-235)"
        area = "centre crop to multiples of 16" if self.crop16 else "whole picture"
        border = f"border {self.border} px cut" if self.border else "no border cut"
        noise = "keyed by the picture" if self.noise == "picture" else "of RandomState(0)"
        return (
            f"protocol {VERSION} ({self.digest}): {colour} in [0,1], clipped, not rounded to 8 bit,"
            f" data range 1, {area}, {border}; noise {noise}, 8 bit, truncated; "
            "SSIM: scikit-image default (7x7 uniform window) per channel"
        )

    def as_dict(self) -> dict[str, object]:
        """Version, fields, digest and the line of `describe`, for JSON."""
        own = {"version": VERSION, "digest": self.digest, "description": self.describe()}
        return {**dataclasses.asdict(self), **own}


FIELD = Protocol()


class Quality(NamedTuple):
    """Of each picture of a batch, (B,) float64."""

    psnr: Tensor
    """In dB; infinite for equal pictures, NaN where a value is NaN."""
    ssim: Tensor
    """1 for equal pictures; mean over channels and pixels."""


def quality(restored: Tensor, clean: Tensor, protocol: Protocol = FIELD) -> Quality:
    """Compare pictures of one size, on their device.

    Args:
        restored: (B, 3, H, W), RGB in [0, 1]; values outside are clipped.
        clean: the same shape, or (1, 3, H, W) for all pictures of the batch.
        protocol: how to compare.

    Raises:
        ValueError: other shapes, or fewer pixels are left than SSIM's window has.
    """
    a, b = _compared(restored, clean, protocol)
    if min(a.shape[-2:]) < _WINDOW:
        size = f"{a.shape[-2]}x{a.shape[-1]}"
        raise ValueError(f"SSIM needs at least {_WINDOW}x{_WINDOW} pixels, got {size}")
    return Quality(_psnr(a, b), _ssim(a, b))


def psnr(
    restored: NDArray[np.floating], clean: NDArray[np.floating], protocol: Protocol = FIELD
) -> float:
    """Peak signal-to-noise ratio of two pictures (H, W, 3) in dB; see `quality`."""
    return float(_psnr(*_compared(_batch(restored), _batch(clean), protocol)))


def ssim(
    restored: NDArray[np.floating], clean: NDArray[np.floating], protocol: Protocol = FIELD
) -> float:
    """Structural similarity of two pictures (H, W, 3); see `quality`."""
    return float(quality(_batch(restored), _batch(clean), protocol).ssim)


def crop16(picture: Tensor) -> Tensor:
    """The centre of (..., H, W) whose sides are multiples of 16."""
    height, width = picture.shape[-2:]
    top, left = height % 16 // 2, width % 16 // 2
    return picture[..., top : top + height // 16 * 16, left : left + width // 16 * 16]


def _batch(picture: NDArray[np.floating]) -> Tensor:
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected two pictures (H, W, 3), got {picture.shape}")
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]


def _compared(restored: Tensor, clean: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Both in float64 as the protocol compares them: (B, 3, H', W'), or (B, 1, H', W') for Y."""
    same = restored.shape[1:] == clean.shape[1:] and len(clean) in (1, len(restored))
    if not same or clean.ndim != 4 or clean.shape[1] != 3:
        shapes = f"{tuple(restored.shape)}, {tuple(clean.shape)}"
        raise ValueError(f"expected two pictures of one size, (B, 3, H, W), got {shapes}")
    cut = protocol.border
    height, width = clean.shape[-2:]

    def prepare(picture: Tensor) -> Tensor:
        part = crop16(picture) if protocol.crop16 else picture
        if min(part.shape[-2:]) <= 2 * cut:
            raise ValueError(f"no pixels of {height}x{width} are left to compare")
        part = part[..., cut : part.shape[-2] - cut, cut : part.shape[-1] - cut]
        part = part.double().clamp(0.0, 1.0)
        if protocol.colour == "rgb":
            return part
        luma = torch.tensor(_LUMA, dtype=part.dtype, device=part.device)
        return torch.einsum("bchw,c->bhw", part, luma)[:, None] + 16.0 / 255.0

    return prepare(restored), prepare(clean)


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    return -10.0 * torch.log10((a - b).square().mean((1, 2, 3)))


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2004 with a uniform window and the sample covariance, as scikit-image has it."""
    channels, height, width = a.shape[1], *(size - _WINDOW + 1 for size in a.shape[-2:])
    rows = max(1, _AT_ONCE // (len(a) * channels * width)) if a.device.type == "cpu" else height
    total = torch.zeros(len(a), dtype=a.dtype, device=a.device)
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height) + _WINDOW - 1)
        total += _ssim_map(a[..., strip, :], b[..., strip, :]).sum((1, 2, 3))
    return total / (channels * height * width)


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each window, from sums S over its n pixels.

    A mean is S(a) / n, a covariance (S(ab) - S(a) S(b) / n) / (n - 1). The fraction is expanded by
    n^2 (n - 1), so that nothing is divided but the end result.
    """
    n = _WINDOW**2
    c1, c2 = n * n * _C1, (n - 1) * _C2
    sum_a, sum_b = _window_sum(a), _window_sum(b)
    product, squares = sum_a * sum_b, sum_a.square() + sum_b.square()
    covariance = _window_sum(a * b) - product / n
    variances = _window_sum(a.square() + b.square()) - squares / n
    return (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))


def _window_sum(x: Tensor) -> Tensor:
    """Sums over all windows that lie inside the picture; rows first, then columns."""
    for axis in (-2, -1):
        number = x.shape[axis] - _WINDOW + 1
        pairs = x.narrow(axis, 0, number + 5) + x.narrow(axis, 1, number + 5)
        fours = pairs.narrow(axis, 0, number) + pairs.narrow(axis, 2, number)
        x = fours.add_(pairs.narrow(axis, 4, number)).add_(x.narrow(axis, 6, number))  # 4 + 2 + 1
    return x
