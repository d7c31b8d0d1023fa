"""Restore a picture part by part, with the result of restoring it whole.

The network runs block by block. Each block passes over all parts of the picture before the next
block starts. So features of the whole picture exist between blocks (`measnet.features` keeps them),
but the many intermediate features inside a block exist for one part only. A block that needs sums
over the whole picture (`measnet.ops.whole`) passes over it once more for each of them.

A part is a window with a halo: neighbouring pixels that its convolutions reach, which are computed
again in the neighbouring part. The network is that of the paper.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from measnet.features import Features, InMemory, Store
from measnet.network import MEASNet
from measnet.ops.whole import Incomplete, Totals
from measnet.prompts import PROMPT_MIN_SIDE, PromptConcat

HALO = 2
"""Pixels that two 3×3 convolutions reach: of a transformer block, or of FD and MEE."""
MULTIPLE = 8
"""Windows begin at multiples of this, so that they can be halved and doubled."""

Progress = Callable[[float], None]
"""Called with the share of the work that is done, from 0 to 1."""


class Whole(NamedTuple):
    """A picture that was restored in windows."""

    image: Tensor
    """(3, H, W) in [0, 1], on the CPU or the device of the input."""
    routing: dict[str, Tensor]
    """As `Restoration.routing`, (1, N) fp32 on the CPU."""


def restore_in_windows(
    model: MEASNet,
    image: Tensor,
    *,
    side: int,
    store: Store,
    progress: Progress = lambda share: None,
) -> Whole:
    """Restore one picture as the network would restore it whole.

    Args:
        model: variant `paper`, in evaluation mode, on any device.
        image: (3, H, W) in [0, 1], any size.
        side: of the windows at full resolution, in pixels; at lower ones they hold fewer pixels,
            because features have more channels there.
        store: keeps the features of the whole picture.
        progress: called after each block.
    """
    if model.config.variant != "paper":
        raise ValueError(f"variant {model.config.variant} has no exact windows")
    return _Run(model, side, store, progress).restore(image)


class _Run:
    """The network's `forward` in windows; the order of the blocks is the same."""

    def __init__(self, model: MEASNet, side: int, store: Store, progress: Progress) -> None:
        self.model, self.store = model, store
        self.device = next(model.parameters()).device
        self.pixels = side * side
        self.shares: dict[str, Tensor] = {}
        self._progress = progress
        self._work = work(model)
        self._done = 0.0

    def restore(self, image: Tensor) -> Whole:
        padded = self.model.pad(image[None])[0]
        picture = InMemory(padded.permute(1, 2, 0))
        prompt = self._prompt(picture)

        x = self._embed(picture)
        x = self._select("1", x, prompt)
        skip1 = self._blocks("encoder1", x)
        x = self._select("2", self._down("down1", skip1), prompt)
        skip2 = self._blocks("encoder2", x)
        x = self._select("3", self._down("down2", skip2), prompt)
        skip3 = self._blocks("encoder3", x)
        x = self._blocks("latent", self._down("down3", skip3))

        x = self._up("3", x, skip3)
        x = self._blocks("decoder3", self._decompose("3", x))
        x = self._up("2", x, skip2)
        x = self._blocks("decoder2", self._decompose("2", x))
        x = self._concatenate(x, skip1)
        x = self._blocks("decoder1", self._decompose("1", x))
        x = self._blocks("refinement", x)

        restored = torch.empty_like(padded)
        self._residual(x, picture, InMemory(restored.permute(1, 2, 0)))
        return Whole(restored[:, : image.shape[-2], : image.shape[-1]], self.shares)

    def _prompt(self, picture: InMemory) -> Tensor | None:
        prompt = self.model.prompt
        if prompt is None:
            return None
        # Its two convolutions of stride 3 ignore what is left beside their windows of 9 pixels.
        stride = PROMPT_MIN_SIDE
        height, width = (size // stride * stride for size in (picture.height, picture.width))
        seen = InMemory(picture.read(0, height)[0, :, :width])
        found: list[Tensor] = []

        def read(x_bhwc: Tensor) -> Tensor:
            found[:] = [prompt(x_bhwc.permute(0, 3, 1, 2))]
            return x_bhwc

        self._pass(read, seen, None, multiple=stride)
        return found[0]

    def _embed(self, picture: Features) -> Features:
        x = self.store.new(picture.height, picture.width, self.model.config.dim)
        self._pass(self.model.patch_embed, picture, x, halo=1)
        return x

    def _select(self, level: str, x: Features, prompt: Tensor | None) -> Features:
        experts = getattr(self.model, f"experts{level}")
        if experts is None:
            return x

        def select(x_bhwc: Tensor) -> Tensor:
            if isinstance(experts, PromptConcat):
                return experts(x_bhwc, prompt)
            out, use = experts(x_bhwc, prompt)
            area = x_bhwc.shape[1] * x_bhwc.shape[2] / (x.height * x.width)
            name = f"encoder{level}"
            self.shares[name] = self.shares.get(name, 0) + area * use.shares
            return out

        self._pass(select, x, x)
        self._advance(f"experts{level}")
        return x

    def _decompose(self, level: str, x: Features) -> Features:
        experts = getattr(self.model, f"frequency{level}")
        if experts is None:
            return x

        def decompose(x_bhwc: Tensor) -> Tensor:
            out, uses = experts(x_bhwc)
            self.shares |= {f"decoder{level}.{band}": use.shares for band, use in uses.items()}
            return out

        self._pass(decompose, x, x, halo=HALO)
        self._advance(f"frequency{level}")
        return x

    def _blocks(self, name: str, x: Features) -> Features:
        blocks = getattr(self.model, name)
        for block in blocks:
            self._pass(block, x, x, halo=HALO)
            self._advance(name, 1 / len(blocks))
        return x

    def _down(self, name: str, x: Features) -> Features:
        half = self.store.new(x.height // 2, x.width // 2, 2 * x.channels)
        self._pass(getattr(self.model, name), x, half, halo=2, down=2)  # even, so that it halves
        return half

    def _up(self, level: str, x: Features, skip: Features) -> Features:
        """Merged with the encoder's features of the level, and in their place."""
        up, merge = (getattr(self.model, name + level) for name in ("up", "reduce"))
        self._pass(up, x, skip, halo=1, up=2, beside=skip, finish=merge)
        x.close()
        return skip

    def _concatenate(self, x: Features, skip: Features) -> Features:
        both = self.store.new(skip.height, skip.width, 2 * skip.channels)

        def concatenate(x_bhwc: Tensor, skip_bhwc: Tensor) -> Tensor:
            return torch.cat([x_bhwc, skip_bhwc], dim=-1)

        self._pass(self.model.up1, x, both, halo=1, up=2, beside=skip, finish=concatenate)
        x.close()
        skip.close()
        return both

    def _residual(self, x: Features, picture: Features, restored: Features) -> None:
        def add(residual_bhwc: Tensor, picture_bhwc: Tensor) -> Tensor:
            return (picture_bhwc + residual_bhwc).clamp(0, 1)

        self._pass(self.model.output, x, restored, halo=1, beside=picture, finish=add)
        x.close()

    def _pass(
        self,
        block: Callable[[Tensor], Tensor],
        source: Features,
        target: Features | None,
        *,
        halo: int = 0,
        up: int = 1,
        down: int = 1,
        multiple: int = MULTIPLE,
        beside: Features | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """target = finish(block(source), beside), window by window.

        Args:
            block: (B, h, w, C) -> (B, h · up / down, w · up / down, C out); its sums over the whole
                picture are taken by `measnet.ops.whole`.
            source: may be the target.
            target: None drops the output.
            halo: pixels of the source that a pixel of the block's output depends on.
            up: the target has so many times more rows and columns.
            down: or so many times fewer.
            multiple: windows begin at multiples of it.
            beside: features of the target's size, or the target itself, for `finish`.
            finish: (output of `block`, `beside`) -> (B, h, w, C of the target), pixel by pixel.
        """
        channels = max(source.channels, 2 * self.model.config.dim)
        pixels = self.pixels * 2 * self.model.config.dim // channels
        rows, columns = window(source.width, pixels, multiple)
        totals, complete = Totals(), False
        while not complete:
            for top, bottom, first, strip in self._strips(source, rows, halo):
                out_top, out_bottom = (at * up // down for at in (top, bottom))
                other = None if beside is None else beside.read(out_top, out_bottom)
                parts = []
                for left, right in spans(source.width, columns):
                    start, end = max(0, left - halo), min(source.width, right + halo)
                    inside = slice(top - first, bottom - first), slice(left - start, right - start)
                    try:
                        with totals.part(*inside):
                            y = block(strip[:, :, start:end].contiguous())
                    except Incomplete:
                        continue
                    y = y[:, _scaled(inside[0], up, down), _scaled(inside[1], up, down)]
                    if other is not None and finish is not None:
                        columns_out = _scaled(slice(left, right), up, down)
                        y = finish(y, other[:, :, columns_out].to(self.device))
                    parts.append(y)
                if parts and target is not None:
                    target.write(out_top, torch.cat(parts, dim=2))
            complete = totals.complete()

    def _strips(
        self, source: Features, rows: int, halo: int
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """Rows `top` to `bottom`, with a halo from row `first` on; they may then be replaced."""
        above: Tensor | None = None
        for top, bottom in spans(source.height, rows):
            strip = source.read(top, min(bottom + halo, source.height)).to(self.device)
            first = top
            if above is not None:
                first = top - above.shape[1]
                strip = torch.cat([above, strip], dim=1)
            above = strip[:, bottom - first - halo : bottom - first].clone() if halo else None
            yield top, bottom, first, strip

    def _advance(self, name: str, share: float = 1.0) -> None:
        self._done += share * self._work[name]
        self._progress(self._done / sum(self._work.values()))


def work(model: MEASNet) -> dict[str, float]:
    """Share of each part in the work, in any unit: its parameters times its pixels."""
    names = [f"experts{n}" for n in (1, 2, 3)] + [f"encoder{n}" for n in (1, 2, 3)] + ["latent"]
    names += [f"frequency{n}" for n in (1, 2, 3)] + [f"decoder{n}" for n in (1, 2, 3)]
    level = {name: int(name[-1]) for name in names if name != "latent"} | {"latent": 4}
    level["refinement"] = 1
    parts = {name: getattr(model, name) for name in level}
    return {
        name: sum(p.numel() for p in part.parameters()) / 4 ** (level[name] - 1)
        for name, part in parts.items()
        if part is not None
    }


def window(width: int, pixels: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """Rows and columns of a window of about `pixels` in a picture of this width.

    A window is square where it can be. All windows beside each other are read together, and they
    should not take more memory than what a block computes from one of them: so windows of a wide
    picture are low and wide.
    """
    rows = min(math.isqrt(pixels), 4 * pixels // width)
    rows = max(1, rows // multiple) * multiple
    columns = max(1, pixels // rows // multiple) * multiple
    return rows, min(columns, width)


def spans(size: int, step: int) -> list[tuple[int, int]]:
    """Begin and end of the parts of `step` that cover `size`; the last may be smaller."""
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _scaled(part: slice, up: int, down: int) -> slice:
    return slice(part.start * up // down, part.stop * up // down)
