"""Restore pictures and compare them with the clean ones.

Pictures come in chunks. Those of a chunk that have one size are restored together; while the
network restores a chunk, a thread reads and degrades the next one.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from distributed import figures
from distributed.iqa import Name, Perceptual
from distributed.scores import Grids, Score
from measnet.ensemble import TURNS, self_ensemble
from measnet.metrics import FIELD, Protocol, quality
from measnet.network import MEASNet
from measnet.tiling import Restored, Tiling, restore_routed
from shards.stream import Picture

Restore = Callable[[Sequence[Picture]], list[Restored]]
"""Pictures of one size -> each of them restored, (3, H, W) on any device."""
Seen = Callable[[Score, Picture, Tensor], None]
"""Is called with each score, its picture, and the restored picture (3, H, W) on the CPU."""
T = TypeVar("T")

GPU_BATCH = 16
"""Pictures of a chunk on a GPU by default. On a CPU it is 1: there a batch is not faster."""
_COMPARED = tuple(
    f"{side}_{kind}{colour}"
    for colour in ("", "_y")
    for kind in ("psnr", "ssim")
    for side in ("input", "restored")
)
"""Figures of a `Score`: first both PSNR of RGB, then both SSIM, then those of luma."""
_OVERVIEW = 240
"""Pixels of the longer side in the grid that shows one picture per task."""


class Scored(NamedTuple):
    """A picture with its result."""

    score: Score
    picture: Picture
    image: Tensor
    """(3, H, W), restored."""


class Scorer:
    """Restores and compares the pictures of chunks, one chunk after the other."""

    def __init__(
        self,
        restore: Restore,
        *,
        protocol: Protocol = FIELD,
        device: torch.device | str = "cpu",
        turns: int = 1,
        iqa: Sequence[Name] = (),
    ) -> None:
        """Takes the method, how and where to compare, the method's turns, and further metrics."""
        self._restore, self._protocol, self._turns = restore, protocol, turns
        self._perceptual = Perceptual(iqa, device) if iqa else None
        self._luma = dataclasses.replace(protocol, colour="y")
        self._device = torch.device(device)

    def __call__(self, chunk: Sequence[Picture]) -> list[Scored]:
        """The results, in the order of the chunk."""
        found: dict[int, Scored] = {}
        for pictures in _of_one_size(chunk):
            start = time.perf_counter()
            restored = self._restore(pictures)
            if self._device.type == "cuda":  # its kernels run on after the call
                torch.cuda.synchronize(self._device)
            seconds = (time.perf_counter() - start) / len(pictures)
            for picture, one in zip(pictures, restored, strict=True):
                score = self._compare(picture, one, seconds)
                found[picture.position] = Scored(score, picture, one.image)
        return [found[picture.position] for picture in chunk]

    def _compare(self, picture: Picture, restored: Restored, seconds: float) -> Score:
        clean = picture.clean.to(self._device)[None]
        sides = (picture.degraded, restored.image)
        both = torch.stack([side.to(self._device) for side in sides])
        rgb, luma = (quality(both, clean, one) for one in (self._protocol, self._luma))
        figures_of = dict(zip(_COMPARED, torch.cat([*rgb, *luma]).tolist(), strict=True))
        height, width = picture.clean.shape[-2:]
        perceptual = self._perceptual(both, clean) if self._perceptual else {}
        return Score(
            position=picture.position,
            degradation=picture.degradation,
            task=picture.task,
            name=picture.name,
            height=height,
            width=width,
            tile=restored.tile or 0,
            overlap=restored.overlap,
            **figures_of,
            seconds=seconds,
            routing={name: shares[0].tolist() for name, shares in restored.routing.items()},
            turns=self._turns,
            iqa=perceptual,
        )


def network_scorer(
    model: MEASNet,
    tiling: Tiling,
    *,
    protocol: Protocol = FIELD,
    ensemble: bool = False,
    iqa: Sequence[Name] = (),
) -> Scorer:
    """Restores by a network, on its device.

    Args:
        model: its mode does not change.
        tiling: of large pictures.
        protocol: how to compare.
        ensemble: restore each picture as `measnet.ensemble` says.
        iqa: further metrics.
    """
    device = next(model.parameters()).device

    def restore(pictures: Sequence[Picture]) -> list[Restored]:
        degraded = torch.stack([picture.degraded for picture in pictures])
        if tiling.side(*degraded.shape[-2:]) is None:  # a picture in tiles stays on the CPU
            degraded = degraded.to(device)
        if not ensemble:
            return _restore(model, degraded, tiling)
        turned: list[list[Restored]] = []

        def one_turn(batch: Tensor, turn: int) -> Tensor:
            turned.append(_restore(model, batch, tiling))
            return torch.stack([one.image for one in turned[-1]])

        images = self_ensemble(one_turn, degraded)
        upright = turned[0]  # whose experts are reported
        return [one._replace(image=image) for one, image in zip(upright, images, strict=True)]

    turns = TURNS if ensemble else 1
    return Scorer(restore, protocol=protocol, device=device, turns=turns, iqa=iqa)


def score(
    model: MEASNet,
    source: Iterable[Picture],
    tiling: Tiling,
    *,
    protocol: Protocol = FIELD,
    seen: Seen | None = None,
    ensemble: bool = False,
) -> Iterator[Score]:
    """Restore pictures by a network and compare them, one by one; see `network_scorer`."""
    scorer = network_scorer(model, tiling, protocol=protocol, ensemble=ensemble)
    return score_with(scorer, chunks(source), seen=seen)


def score_with(
    scorer: Scorer, source: Iterable[list[Picture]], *, seen: Seen | None = None
) -> Iterator[Score]:
    """The scores of chunks, in order; the next chunk is made while one is restored."""
    for chunk in ahead(source):
        for one in scorer(chunk):
            if seen is not None:
                seen(one.score, one.picture, one.image.cpu())
            yield one.score


def chunks(
    source: Iterable[Picture], batch: int = 1, most_pixels: int = 0
) -> Iterator[list[Picture]]:
    """Consecutive pictures in lists; those of a list that have one size are restored together.

    Args:
        source: the pictures.
        batch: length of a list.
        most_pixels: of a list with several pictures.
    """
    chunk: list[Picture] = []
    pixels = 0
    for picture in source:
        size = picture.clean.shape[-2:].numel()
        if chunk and (len(chunk) == batch or pixels + size > most_pixels):
            yield chunk
            chunk, pixels = [], 0
        chunk.append(picture)
        pixels += size
    if chunk:
        yield chunk


def ahead(source: Iterable[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while the caller works with one."""
    items = iter(source)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


class Panels:
    """Rows of the before/after grids, collected while pictures are scored."""

    def __init__(self, rows: int) -> None:
        """Keep the first `rows` pictures of each degradation."""
        self._rows = rows
        self.grids: Grids = {}
        self._overview: dict[str, Image.Image] = {}

    def keep(self, score: Score, picture: Picture, restored: Tensor) -> None:
        """Add a scored picture, unless its degradation has enough rows."""
        own = self.grids.setdefault(score.degradation, [])
        if len(own) >= self._rows:
            return
        row = _row(score, picture, restored)
        if not own:  # the last, strongest degradation of a task stays in the overview
            self._overview[score.task] = figures.panel(row, widest=_OVERVIEW)
            self.grids["overview"] = list(self._overview.values())
        own.append(figures.panel(row))


def _of_one_size(chunk: Sequence[Picture]) -> list[list[Picture]]:
    found: dict[torch.Size, list[Picture]] = {}
    for picture in chunk:
        found.setdefault(picture.degraded.shape, []).append(picture)
    return list(found.values())


def _restore(model: MEASNet, degraded: Tensor, tiling: Tiling) -> list[Restored]:
    """Restore a batch (B, 3, H, W), on its device; the network's mode does not change."""
    training = model.training
    tile = tiling.side(*degraded.shape[-2:])
    try:
        model.eval()
        together = restore_routed(model, degraded, tile=tile, overlap=tiling.overlap)
    finally:
        model.train(training)
    if together.tile != tile and len(degraded) > 1:  # out of memory: one by one may fit whole
        return [_restore(model, one[None], tiling)[0] for one in degraded]
    return [
        together._replace(
            image=image, routing={name: own[at, None] for name, own in together.routing.items()}
        )
        for at, image in enumerate(together.image)
    ]


def _row(score: Score, picture: Picture, restored: Tensor) -> figures.GridRow:
    degraded, image, clean = (
        one.permute(1, 2, 0).numpy() for one in (picture.degraded, restored, picture.clean)
    )
    return figures.GridRow(
        label=f"{score.degradation}   {score.name}",
        degraded=degraded,
        restored=image,
        clean=clean,
        input_psnr=score.input_psnr,
        restored_psnr=score.restored_psnr,
    )
