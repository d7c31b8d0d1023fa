"""The degradations that are made here: noise while loading; haze, rain, blur and low light while
packing.

Every function takes a picture (H, W, 3) uint8 and a generator, and gives a picture of the same
form; the ones for packing give the parameters that were drawn as well. `severity` in (0, 1] scales
the strength that is drawn; in chains it is usually below 1. Generators are NumPy's SFC64, which
gives the same numbers on any machine. Sources stand at each function; all models are the usual ones
of the field, so a network trained on them learns the real thing only as far as the models hold.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from shards import interrupt

Parameters = dict[str, Any]

DEPTH_SIDE = 512
"""Longest side, in pixels, of the picture whose regions give a depth map."""


def generator(*parts: int | str) -> np.random.Generator:
    """A generator keyed by integers and texts: the same key, the same numbers, anywhere."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))


class KeyedGenerator:
    """One generator that takes a new key for each sample: ten times faster than a new generator."""

    def __init__(self) -> None:
        """Makes the generator, without a key yet."""
        self._bits = np.random.SFC64(0)
        self._rng = np.random.Generator(self._bits)

    def at(self, *words: int) -> np.random.Generator:
        """The generator for three 64-bit words, valid until the next call.

        Seeded as SFC64's author does it: the state is the three words and a counter of 1, and the
        first twelve numbers are dropped (Doty-Humphrey, PractRand).
        """
        state = np.array([*(word & 0xFFFFFFFFFFFFFFFF for word in words), 1], np.uint64)
        self._bits.state = {
            "bit_generator": "SFC64",
            "state": {"state": state},
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._bits.random_raw(12)
        return self._rng


def noise(
    picture: np.ndarray,
    sigma: float,
    rng: np.random.Generator,
    rounding: Literal["truncate", "round"] = "truncate",
) -> np.ndarray:
    """White Gaussian noise as the field adds it: on 0-255, clipped, back to 8 bit.

    `sigma` in grey levels. `truncate` cuts the fraction off, as PromptIR, AdaIR and MEASNet do,
    which makes the picture 0.5 grey levels darker; `round` does not.
    """
    noisy = rng.standard_normal(picture.shape, np.float32)
    noisy *= sigma
    noisy += picture
    if rounding == "round":
        np.rint(noisy, out=noisy)
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)


def field_noise(picture: np.ndarray, sigma: float, state: np.random.RandomState) -> np.ndarray:
    """The noise of the field's test programs: the next numbers of one stream for all pictures."""
    drawn = state.randn(*picture.shape)
    return np.clip(picture + drawn * sigma, 0, 255).astype(np.uint8)


def to_linear(picture: np.ndarray) -> np.ndarray:
    """Display values (uint8) to linear light in [0, 1] float32, by the sRGB curve."""
    levels = np.arange(256, dtype=np.float32) / 255
    curve = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    linear: np.ndarray = curve.astype(np.float32)[picture]
    return linear


def to_display(linear: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to display values, rounded to uint8."""
    linear = np.clip(linear, 0, 1)
    display = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return _to_uint8(display)


def _to_uint8(display: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(display, 0, 1) * 255).astype(np.uint8)


def depth_from_map(values: np.ndarray, kind: Literal["depth", "disparity"]) -> np.ndarray:
    """Relative depth in [0, 1] from a measured map (H, W); far is 1.

    Disparity is inverted. Places without a measurement (0, inf, nan) take the nearest one. What
    lies beyond the 98th percentile counts as far. ValueError where nothing was measured.
    """
    values = np.asarray(values, np.float64)
    valid = np.isfinite(values) & (values > 0)
    if not valid.any():
        raise ValueError(f"the {kind} map holds no value above 0")
    nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    values = values[tuple(nearest)]
    depth = 1 / values if kind == "disparity" else values
    far = np.percentile(depth, 98)
    return np.clip(depth / far, 0, 1).astype(np.float32)


def depth_from_picture(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plausible depth map (H, W) float32 in [0, 1] where none was measured; far is 1.

    A ground plane recedes from the lower edge to a horizon. The picture is divided into regions
    (Felzenszwalb and Huttenlocher, 2004); each stands upright on the ground, so it has the depth of
    the ground at its lower edge. So haze changes at objects rather than across them. A guided
    filter (He et al., "Guided Image Filtering", 2010) brings the regions to the picture's edges.
    It is a stand-in: the real depth is not known from one picture.
    """
    from skimage import segmentation  # half a second: not for workers, who never make haze

    height, width = picture.shape[:2]
    step = -(-max(height, width) // DEPTH_SIDE)
    little = picture[::step, ::step]
    rows, columns = little.shape[:2]
    horizon = rng.uniform(0.1, 0.4)
    row = np.linspace(0, 1, rows, dtype=np.float32)
    ground = 0.12 / np.maximum(row - horizon, 0.12)
    regions = segmentation.felzenszwalb(
        little, scale=300, sigma=0.8, min_size=max(rows * columns // 60, 4), channel_axis=2
    )
    lowest = np.zeros(regions.max() + 1, np.int64)
    np.maximum.at(lowest, regions, np.arange(rows)[:, None])
    upright = ground[lowest][regions]
    relief = ndimage.zoom(rng.standard_normal((4, 5)), (rows / 4, columns / 5), order=1)
    relief = ndimage.gaussian_filter(relief[:rows, :columns], min(rows, columns) / 8)
    relief = np.pad(
        relief, ((0, rows - relief.shape[0]), (0, columns - relief.shape[1])), mode="edge"
    )
    relief /= max(float(np.abs(relief).max()), 1e-6)
    depth = 0.75 * upright + 0.25 * ground[:, None] + 0.1 * relief
    depth = np.repeat(np.repeat(depth, step, 0), step, 1)[:height, :width]
    guide = picture.mean(axis=2, dtype=np.float32) / 255
    return np.clip(_guided(guide, depth, max(3, min(height, width) // 40)), 0.05, 1)


def _guided(guide: np.ndarray, values: np.ndarray, radius: int, eps: float = 1e-3) -> np.ndarray:
    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(x.astype(np.float64), 2 * radius + 1, mode="reflect")

    mean_guide, mean_values = mean(guide), mean(values)
    slope = (mean(guide * values) - mean_guide * mean_values) / (
        mean(guide * guide) - mean_guide**2 + eps
    )
    offset = mean_values - slope * mean_guide
    return (mean(slope) * guide + mean(offset)).astype(np.float32)


def haze(
    picture: np.ndarray,
    rng: np.random.Generator,
    severity: float = 1,
    depth: np.ndarray | None = None,
) -> tuple[np.ndarray, Parameters]:
    """Atmospheric scattering, I = J·t + A·(1 - t), t = exp(-β·d), on display values as in RESIDE.

    Koschmieder's law in the form of Narasimhan and Nayar (2002); ranges after RESIDE (Li et al.,
    2019): airlight A 0.75-1.0, nearly grey; β so that the farthest transmits 17-61 % at severity 1.
    `depth` (H, W) in [0, 1]; made from the picture where it is None.
    """
    airlight = np.clip(rng.uniform(0.75, 1.0) + rng.uniform(-0.01, 0.01, 3), 0, 1)
    beta = rng.uniform(0.5, 1.8) * severity
    known = depth is not None
    if depth is None:
        depth = depth_from_picture(picture, rng)
    transmission = np.exp(-beta * depth)[..., None]
    hazy = picture / 255.0 * transmission + airlight * (1 - transmission)
    parameters = {
        "airlight": _rounded(airlight),
        "beta": _rounded(beta),
        "depth": "measured" if known else "synthetic",
    }
    return _to_uint8(hazy), parameters


def rain(
    picture: np.ndarray, rng: np.random.Generator, severity: float = 1
) -> tuple[np.ndarray, Parameters]:
    """Rain streaks, O = B + S, as in Rain100L: one direction, drops at many distances.

    A streak is a drop drawn out by its motion (Garg and Nayar, 2006; the additive model of Yang et
    al., "Deep Joint Rain Detection and Removal", 2017). A near drop makes a long, wide streak, a
    far one a short, thin streak. Their brightness is drawn from a gamma distribution: many faint
    streaks, few bright ones. The ranges are chosen so that the streaks agree with those of
    Rain100L in mean, percentiles and PSNR (`python bench/degradations.py`).
    """
    height, width = picture.shape[:2]
    scale = max(min(height, width) / 320, 0.3)
    angle = rng.uniform(-30, 30)
    density = np.exp(rng.uniform(np.log(0.0015), np.log(0.0060))) / scale**2
    strength = np.exp(rng.uniform(np.log(0.10), np.log(0.32))) * severity
    streaks = np.zeros((height, width), np.float32)
    for _ in range(rng.poisson(density * height * width)):
        nearness = rng.random()
        line = rng.gamma(2, 0.5) * _line(
            length=scale * 10 * 5**nearness * rng.uniform(0.8, 1.2),
            angle=angle + rng.normal(0, 1),
            width=max(scale * (0.45 + 0.35 * nearness) * rng.uniform(0.9, 1.2), 0.4),
        )
        _add(streaks, line, int(rng.integers(height)), int(rng.integers(width)))
    rainy = picture / 255.0 + np.clip(strength * streaks, 0, 0.85)[..., None]
    parameters = {"angle": angle, "density": density, "strength": strength}
    return _to_uint8(rainy), {name: _rounded(value) for name, value in parameters.items()}


def _add(picture: np.ndarray, part: np.ndarray, row: int, column: int) -> None:
    """Adds `part`, of odd sides, around a pixel; what lies outside of the picture is cut off."""
    top, left = row - part.shape[0] // 2, column - part.shape[1] // 2
    inside = picture[max(top, 0) : top + part.shape[0], max(left, 0) : left + part.shape[1]]
    first, second = max(-top, 0), max(-left, 0)
    inside += part[first : first + inside.shape[0], second : second + inside.shape[1]]


def _line(length: float, angle: float, width: float) -> np.ndarray:
    """A streak (odd height, odd width) with soft edges and ends; its brightest value is 1.

    `length` and `width` (a standard deviation) in pixels, `angle` in degrees from the vertical.
    """
    slant = np.deg2rad(angle)
    high = int(np.ceil(length * 2 / 3 * np.cos(slant) + 3 * width))
    wide = int(np.ceil(length * 2 / 3 * np.abs(np.sin(slant)) + 3 * width))
    y = np.arange(-high, high + 1, dtype=np.float32)[:, None]
    x = np.arange(-wide, wide + 1, dtype=np.float32)
    along = y * np.cos(slant) + x * np.sin(slant)
    across = x * np.cos(slant) - y * np.sin(slant)
    ends = np.clip((length / 2 - np.abs(along)) / max(length / 3, 1) + 0.5, 0, 1)
    line: np.ndarray = np.exp(-0.5 * (across / width) ** 2) * ends
    return line


def blur(
    picture: np.ndarray, rng: np.random.Generator, severity: float = 1
) -> tuple[np.ndarray, Parameters]:
    """Camera shake: the picture in linear light, averaged along a random path of the camera.

    The path is a walk with inertia (after Boracchi and Foi, "Modeling the Performance of Image
    Restoration from Motion Blur", 2012). Light adds up linearly, as in the averaged frames of GoPro
    (Nah et al., 2017).
    """
    # Half a second: not for workers, who never blur. A module of C that is interrupted while it is
    # imported raises an ImportError instead.
    with interrupt.blocked():
        from scipy import signal

    height, width = picture.shape[:2]
    reach = rng.uniform(0.008, 0.03) * min(height, width) * severity
    path = _shake(rng) * reach
    kernel = _kernel(path)
    half = kernel.shape[0] // 2
    linear = np.pad(to_linear(picture), ((half, half), (half, half), (0, 0)), mode="symmetric")
    blurred = signal.fftconvolve(linear, kernel[..., None], mode="valid", axes=(0, 1))
    return to_display(blurred), {"reach": _rounded(reach), "kernel": kernel.shape[0]}


def _shake(rng: np.random.Generator, steps: int = 400) -> np.ndarray:
    """A path (steps, 2), centred, whose larger extent is 1."""
    angle = rng.uniform(0, 2 * np.pi)
    turns = np.cumsum(rng.normal(0, 0.09, steps)) + angle
    sudden = rng.random(steps) < 0.006
    turns += np.cumsum(np.where(sudden, rng.uniform(-np.pi, np.pi, steps), 0))
    speed = np.abs(1 + 0.4 * np.cumsum(rng.normal(0, 0.1, steps)))
    path = np.cumsum(np.stack([np.sin(turns), np.cos(turns)], 1) * speed[:, None], 0)
    path -= path.mean(0)
    widest: np.ndarray = path / max(float(np.ptp(path, axis=0).max()), 1e-9)
    return widest


def _kernel(path: np.ndarray) -> np.ndarray:
    """The share of the exposure spent at each pixel; odd side, sum 1."""
    half = int(np.ceil(np.abs(path).max())) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    corner = np.floor(path).astype(int)
    part = path - corner
    for dy in (0, 1):
        for dx in (0, 1):
            share = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
            np.add.at(kernel, (corner[:, 0] + dy + half, corner[:, 1] + dx + half), share)
    normalised: np.ndarray = (kernel / kernel.sum()).astype(np.float32)
    return normalised


def low_light(
    picture: np.ndarray, rng: np.random.Generator, severity: float = 1
) -> tuple[np.ndarray, Parameters]:
    """A short exposure: less light, in linear values, with shot and read noise, and a display
    curve.

    The Poisson-Gaussian noise of sensors (Foi et al., 2008); exposure 1/6-1/25 and a curve with
    gamma 0.95-1.15, to give pictures about as dark as those of LOL (Wei et al., 2018).
    """
    exposure = 1 / (1 + (rng.uniform(6, 25) - 1) * severity)
    gamma = rng.uniform(0.95, 1.15)
    photons = rng.uniform(2500, 8000)
    read = rng.uniform(0.0003, 0.0010)
    linear = to_linear(picture) * exposure
    noisy = linear + rng.standard_normal(linear.shape, np.float32) * np.sqrt(
        linear / photons + read**2
    )
    dark = to_display(np.clip(noisy, 0, 1) ** gamma)
    parameters = {"exposure": exposure, "gamma": gamma, "photons": photons, "read": read}
    return dark, {name: _rounded(value) for name, value in parameters.items()}


def grain(
    picture: np.ndarray, rng: np.random.Generator, severity: float = 1
) -> tuple[np.ndarray, Parameters]:
    """White Gaussian noise stored in the pair, σ 10-50: the last link of a chain."""
    sigma = rng.uniform(10, 50) * severity
    return noise(picture, sigma, rng), {"sigma": _rounded(sigma)}


def _rounded(value: Any) -> Any:
    return [round(float(v), 5) for v in value] if np.ndim(value) else round(float(value), 5)


SYNTHESISED: dict[str, Callable[..., tuple[np.ndarray, Parameters]]] = {
    "dehaze": haze,
    "derain": rain,
    "deblur": blur,
    "lowlight": low_light,
    "denoise": grain,
}
"""Task -> the function that makes its degraded pictures from clean ones."""


def severities(links: int, rng: np.random.Generator) -> list[float]:
    """How strong each link of a chain is, in (0, 1]; they share one budget.

    A single degradation has its full range (1.0). In a chain each link is weaker, and one strong
    link leaves less for the others: with full strengths a hazy, rainy, dark picture shows nothing.
    """
    if links == 1:
        return [1.0]
    shares = rng.dirichlet(np.full(links, 4.0)) * (1 + 0.25 * (links - 1))
    return [float(share) for share in np.clip(shares, 0.2, 1)]


def synthesise(
    picture: np.ndarray,
    tasks: tuple[str, ...],
    rng: np.random.Generator,
    depth: np.ndarray | None = None,
    severity: Mapping[str, float] | None = None,
) -> tuple[np.ndarray, list[Parameters]]:
    """The degradations of `tasks`, one after the other; the chain with its parameters, in the order
    applied.

    Args:
        picture: (H, W, 3) uint8, clean.
        tasks: keys of `SYNTHESISED`, in order.
        rng: draws the parameters.
        depth: (H, W) in [0, 1], for haze; None to estimate it.
        severity: task -> factor in (0, 1] on its strength; 1 where it is not named.
    """
    chain = []
    for task, share in zip(tasks, severities(len(tasks), rng), strict=True):
        factor = (severity or {}).get(task, 1.0)
        strength = share * factor
        if task == "dehaze":
            picture, parameters = haze(picture, rng, strength, depth)
        else:
            picture, parameters = SYNTHESISED[task](picture, rng, strength)
        noted = {"severity": _rounded(strength)} if len(tasks) > 1 or factor != 1 else {}
        chain.append({"degradation": task, **noted, **parameters})
    return picture, chain
