"""`DataConfig`: which shards are read, how tasks are mixed, and how samples are augmented.

Imports neither torch nor numpy, so that a wrong command line is refused at once.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

from shards.tasks import DEGRADATIONS

PAPER_REPEATS = {
    "denoise_15": 3,
    "denoise_25": 3,
    "denoise_50": 3,
    "derain": 120,
    "dehaze": 1,
    "deblur": 5,
    "lowlight": 20,
}
"""Uses of each sample per epoch in the authors' recipe: 162,646 samples per epoch with their
datasets."""


MAY_CHANGE = {"may_change": True}
"""Mark (dataclass metadata) of a field that may differ when a run resumes: it does not change what
is learnt beyond rounding. Of shards the fingerprint is compared instead of the folder."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data is read, and how a sample becomes part of a batch."""

    train: str = field(default="data/shards/train", metadata=MAY_CHANGE)
    """Folder or URI of shards with a manifest.json (`python -m shards.pack`, or `shards.index`
    for WebDataset tars)."""
    validation: str = field(default="data/shards/validation", metadata=MAY_CHANGE)
    """Folder or URI of shards whose whole pictures are restored for validation."""
    repeats: dict[str, int] = field(default_factory=lambda: dict(PAPER_REPEATS))
    """Degradation -> uses of each of its samples per epoch; not trained on where it is 0 or
    missing."""
    crop: int = 128
    """Side of the square training crops, in pixels."""
    later_crops: str = ""
    """Other sides later on, as `12000:96,15000:128`: from 12,000 samples of the run on crops of 96
    pixels, from 15,000 on crops of 128. SAMPLES are a multiple of `recipe.global_batch`; after the
    end of the run they have no effect."""
    augment: Literal["flips", "dihedral", "none"] = "flips"
    """`flips`: horizontal and vertical, as in the paper; `dihedral`: all eight combinations of
    flips and quarter turns."""
    order: Literal["uniform", "local"] = "uniform"
    """`uniform` shuffles over all samples; `local` opens few shards at a time, for very large
    remote datasets."""
    sigma: dict[str, str] = field(default_factory=dict)
    """Noise degradation -> standard deviations to draw from in training, instead of its fixed
    one: a range such as `5..50`, or a list such as `15,25,50`, in grey levels of 0-255."""
    noise_rounding: Literal["truncate", "round"] = "truncate"
    """How noisy pictures become 8 bit: `truncate` as the field does it (half a grey level
    darker), or `round`."""
    loader_workers: int = field(default=2, metadata=MAY_CHANGE)
    """Loader processes per training worker; 0 decodes in the training process."""
    prefetch: int = field(default=64, metadata=MAY_CHANGE)
    """Micro-batches whose remote shards are fetched in advance; 0 fetches a shard when it is
    read."""
    cache_dir: str = field(default="~/.cache/measnet/shards", metadata=MAY_CHANGE)
    """Folder for each node's local copies of remote shards: one for all runs of a node, for
    training and validation."""
    cache_gib: float = field(default=50.0, metadata=MAY_CHANGE)
    """Limit of the cache in GiB; the least recently used shards are removed first, earlier if the
    disk is full."""
    on_corrupt: Literal["stop", "substitute"] = "stop"
    """A corrupt sample stops the run (`stop`), or is replaced by another sample of its task
    (`substitute`; the same one for any world size)."""
    corrupt_budget: int = 100
    """With `substitute`: the run stops after this many corrupt samples."""

    def __post_init__(self) -> None:
        """ValueError for unknown degradations and values out of range."""
        for name, repeat in self.repeats.items():
            if name not in DEGRADATIONS:
                raise ValueError(
                    f"data.repeats names {name!r}; known degradations: {', '.join(DEGRADATIONS)}"
                )
            if repeat < 0:
                raise ValueError(f"data.repeats.{name} is {repeat}, but must be 0 or more")
        if not any(self.repeats.values()):
            raise ValueError(
                "data.repeats uses no degradation; set at least one of "
                f"{', '.join(DEGRADATIONS)} above 0"
            )
        for name, levels in self.sigma.items():
            if DEGRADATIONS.get(name) is None or DEGRADATIONS[name].sigma is None:
                noisy = [known for known, row in DEGRADATIONS.items() if row.sigma is not None]
                raise ValueError(
                    f"data.sigma names {name!r}, which is not a noise degradation; known: "
                    + ", ".join(noisy)
                )
            parse_levels(name, levels)
        if self.crop < 16:
            raise ValueError(f"data.crop is {self.crop}, but must be at least 16 pixels")
        _ = self.crop_changes  # ValueError where it cannot be read
        if self.loader_workers < 0:
            raise ValueError(f"data.loader_workers is {self.loader_workers}, but must be 0 or more")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch is {self.prefetch}, but must be 0 or more")
        if self.cache_gib <= 0:
            raise ValueError(f"data.cache_gib is {self.cache_gib}, but must be above 0")
        if self.corrupt_budget < 0:
            raise ValueError(f"data.corrupt_budget is {self.corrupt_budget}, but must be 0 or more")

    @functools.cached_property
    def crop_changes(self) -> tuple[tuple[int, int], ...]:
        """`later_crops` as (samples, side), in order.

        Raises:
            ValueError: it cannot be read, is not in order, or a side is below 16.
        """
        try:
            parts = [part.split(":") for part in self.later_crops.split(",") if part]
            changes = tuple((int(samples), int(side)) for samples, side in parts)
        except ValueError:
            changes = ((0, 0),)
        places = [samples for samples, _ in changes]
        if any(samples < 1 or side < 16 for samples, side in changes) or places != sorted(
            set(places)
        ):
            raise ValueError(
                f"data.later_crops is {self.later_crops!r}, but must be SAMPLES:SIDE, such as "
                "12000:96,15000:128, with samples that increase and sides of 16 or more"
            )
        return changes

    def crop_at(self, position: int) -> int:
        """Side of the crops at a sample of the run, in pixels."""
        return next(
            (side for samples, side in reversed(self.crop_changes) if position >= samples),
            self.crop,
        )

    def crop_stages(self, samples: int) -> list[tuple[int, int]]:
        """Number of samples and side of the crops, stage by stage, of a run of `samples`.

        Changes after its end do not happen.
        """
        starts = [(0, self.crop), *(row for row in self.crop_changes if row[0] < samples)]
        ends = [*(start for start, _ in starts[1:]), samples]
        return [(end - start, side) for (start, side), end in zip(starts, ends, strict=True)]


def parse_levels(name: str, text: str) -> tuple[bool, tuple[float, ...]]:
    """`5..50` -> (True, (5, 50)), a range; `15,25,50` -> (False, (15, 25, 50)), a list."""
    is_range = ".." in text
    try:
        levels = tuple(float(part) for part in text.split(".." if is_range else ","))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level <= 255 for level in levels):
        levels = ()
    if not levels or (is_range and (len(levels) != 2 or levels[0] > levels[1])):
        raise ValueError(
            f"data.sigma.{name} is {text!r}, but must be a range such as 5..50 or a list such as "
            "15,25,50, of grey levels above 0 and up to 255"
        )
    return is_range, levels
