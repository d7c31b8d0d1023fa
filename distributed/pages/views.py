"""What a network does with a picture, as small pictures: experts per pixel, frequency bands."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor, nn

from distributed.figures import as_uint8
from distributed.pages.charts import colour
from measnet.network import PIXEL_LIBRARIES, MEASNet
from measnet.routing import record
from measnet.selection import Choice

STEP = 8
"""Windows begin and end at multiples of it, so that they fit the pixels of all levels."""


class Window(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: Tensor, scale: int = 1) -> Tensor:
        """The part of (..., H/scale, W/scale)."""
        top, left = self.top // scale, self.left // scale
        height, width = -(-self.height // scale), -(-self.width // scale)
        return picture[..., top : top + height, left : left + width]


def centre(height: int, width: int, widest: int, highest: int) -> Window:
    """The centre of a picture, at most `widest` and `highest` (multiples of `STEP`)."""
    top = max(0, (height - highest) // 2) // STEP * STEP
    left = max(0, (width - widest) // 2) // STEP * STEP
    return Window(top, left, min(height, highest), min(width, widest))


@dataclass
class Look:
    """What the last forward pass did, for one picture."""

    choices: dict[str, Choice] = field(default_factory=dict)
    """As of `measnet.routing.record`."""
    prompt: Tensor | None = None
    """(T,) weights of the learnt prompts, summing to 1; None without prompts."""
    bands: tuple[Tensor, Tensor] | None = None
    """F_low and F_high of the last decoder level, (H, W, C) each; None without FD."""


@contextmanager
def looking(model: MEASNet) -> Iterator[Look]:
    """Within it, `Look` holds what each forward pass of one picture did."""
    look = Look()

    def read(_module: nn.Module, _inputs: object, read_bchw: Tensor) -> None:
        if model.prompt is not None:
            look.prompt = model.prompt.weights(read_bchw.mean((2, 3)))[0].float().cpu()

    def split(_module: nn.Module, _inputs: object, bands: tuple[Tensor, Tensor]) -> None:
        look.bands = (bands[0][0].float().cpu(), bands[1][0].float().cpu())

    hooks = []
    if model.prompt is not None:
        hooks.append(model.prompt.reader.register_forward_hook(read))
    splitter = getattr(model.frequency1, "split", None)
    if splitter is not None:
        hooks.append(splitter.register_forward_hook(split))
    try:
        with record(model) as choices:
            look.choices = choices
            yield look
    finally:
        for hook in hooks:
            hook.remove()


def expert_maps(
    choices: Mapping[str, Choice], window: Window, number: int = 0
) -> dict[str, Image.Image]:
    """Library -> the most probable expert of each pixel as a colour, at the library's own scale.

    Args:
        choices: of a batch, from `measnet.routing.record`.
        window: the part of the picture.
        number: of the picture in the batch.
    """
    maps = {}
    for level, name in enumerate(PIXEL_LIBRARIES):
        if name in choices:
            first_hw = choices[name].chosen[number, ..., 0].cpu()
            experts = choices[name].probability.shape[-1]
            maps[name] = _palette(window.cut(first_hw, 2**level), experts)
    return maps


def coloured(maps: Mapping[str, Tensor], experts: int) -> dict[str, Image.Image]:
    """The same maps, from `measnet.routing.record_maps`, as colours."""
    return {name: _palette(numbers_hw, experts) for name, numbers_hw in maps.items()}


def _palette(numbers_hw: Tensor, experts: int) -> Image.Image:
    image = Image.fromarray(numbers_hw.to(torch.uint8).numpy())
    image.putpalette([v for n in range(experts) for v in ImageColor.getrgb(colour(n))])
    return image


def band_pictures(bands: tuple[Tensor, Tensor], window: Window) -> dict[str, Image.Image]:
    """`low`: mean over the channels; `high`: root mean square over them; each with full contrast.

    The brightest and darkest hundredth of the pixels are clipped.
    """
    low, high = (window.cut(band.permute(2, 0, 1)) for band in bands)
    return {"low": _grey(low.mean(0)), "high": _grey(high.square().mean(0).sqrt())}


def high_share(bands: tuple[Tensor, Tensor]) -> float:
    """Share of the high band in the energy of both, 0 to 1; without each channel's mean."""
    low, high = (float((band - band.mean((0, 1))).double().square().sum()) for band in bands)
    return high / (low + high) if low + high else 0.0


def _grey(values: Tensor) -> Image.Image:
    array = values.numpy()
    low, high = np.quantile(array, (0.01, 0.99))
    scaled = (array - low) / max(high - low, 1e-12)
    return Image.fromarray(as_uint8(scaled))


def picture(image_3hw: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an image; values outside are clipped."""
    return Image.fromarray(as_uint8(image_3hw.permute(1, 2, 0).numpy()))


def principal_axes(rows: NDArray[np.floating]) -> tuple[NDArray[np.floating], tuple[float, float]]:
    """The two main directions of the rows' spread (PCA).

    Args:
        rows: (n, T).

    Returns:
        Coordinates (n, 2), and the share of the variance along each; 0 where there is none.
    """
    centred = rows - rows.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(rows), 2))
    found[:, : min(2, len(values))] = centred @ directions[:2].T
    energy = values**2
    total = energy.sum()
    shares = [float(one / total) if total > 0 else 0.0 for one in energy[:2]] + [0.0, 0.0]
    return found, (shares[0], shares[1])
