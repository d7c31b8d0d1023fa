"""Classical methods to compare a network with, each for one task.

They see the degraded picture only; CBM3D also gets the noise's standard deviation.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage import exposure, restoration

from shards.tasks import DEGRADATIONS

Array = NDArray[np.floating]


class Baseline(NamedTuple):
    """A method for one task; pictures of other tasks stay as they are."""

    task: str
    restore: Callable[[Array, float], Array]
    """(H, W, 3) in [0, 1] and sigma in grey levels (0 without noise) -> (H, W, 3)."""
    about: str
    """In one line, with the source."""


def _bm3d(picture: Array, sigma: float) -> Array:
    try:
        import bm3d
    except ImportError as error:
        raise ValueError(
            'cbm3d needs the package bm3d: pip install "measnet-ray[baselines]" (its licence is '
            "for research only)"
        ) from error
    return np.asarray(bm3d.bm3d_rgb(picture, sigma / 255.0))


def _dark_channel(picture: Array, sigma: float) -> Array:
    """He et al. 2009: 15×15 patches, omega 0.95, transmission refined by a guided filter."""
    from scipy.ndimage import minimum_filter, uniform_filter

    dark = minimum_filter(picture.min(2), 15)
    brightest = np.argsort(dark, axis=None)[-max(1, dark.size // 1000) :]
    air = picture.reshape(-1, 3)[brightest].max(0).clip(1e-3)
    raw = 1 - 0.95 * minimum_filter((picture / air).min(2), 15)
    guide, side, eps = picture.mean(2), 61, 1e-3
    mean_guide, mean_raw = uniform_filter(guide, side), uniform_filter(raw, side)
    variance = uniform_filter(guide * guide, side) - mean_guide**2
    slope = (uniform_filter(guide * raw, side) - mean_guide * mean_raw) / (variance + eps)
    offset = mean_raw - slope * mean_guide
    transmission = uniform_filter(slope, side) * guide + uniform_filter(offset, side)
    return (picture - air) / transmission.clip(0.1)[..., None] + air


def _gamma(picture: Array, sigma: float) -> Array:
    """The power that brings the mean to one half."""
    mean = float(picture.mean().clip(1e-3, 0.999))
    return np.asarray(exposure.adjust_gamma(picture, np.log(0.5) / np.log(mean)))


def _histogram(picture: Array, sigma: float) -> Array:
    return np.asarray(exposure.equalize_adapthist(picture.clip(0, 1)))


def _richardson_lucy(picture: Array, sigma: float) -> Array:
    """With a Gaussian of σ = 1.5 pixels: the true kernel is not known."""
    offsets = np.arange(-4, 5)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    edge = 16  # without a mirrored border it rings at the edges
    padded = np.pad(picture, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
    channels = [restoration.richardson_lucy(padded[..., c], kernel, 10) for c in range(3)]
    return np.stack(channels, axis=2)[edge:-edge, edge:-edge]


BASELINES: dict[str, Baseline] = {
    "cbm3d": Baseline("denoise", _bm3d, "CBM3D (Dabov et al. 2007), package bm3d; knows sigma"),
    "dark-channel": Baseline("dehaze", _dark_channel, "dark channel prior (He et al. 2009)"),
    "gamma": Baseline("lowlight", _gamma, "gamma curve to a mean of 0.5, scikit-image"),
    "histogram": Baseline("lowlight", _histogram, "adaptive histogram equalisation, scikit-image"),
    "richardson-lucy": Baseline(
        "deblur", _richardson_lucy, "Richardson-Lucy, Gaussian of 1.5 pixels, scikit-image"
    ),
}
"""Name on the command line -> method."""


def apply(name: str, degradation: str, picture: Array) -> Array:
    """Restore (H, W, 3) by a method if it is for the task, else give it back."""
    kind, baseline = DEGRADATIONS[degradation], BASELINES[name]
    if kind.task != baseline.task:
        return picture
    return np.clip(baseline.restore(picture.astype(np.float64), kind.sigma or 0.0), 0.0, 1.0)
