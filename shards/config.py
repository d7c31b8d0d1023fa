"""`DataConfig`: which shards are read, in which mix, and what happens to a sample on its way into a
batch.

Imports neither torch nor numpy, so that a wrong command line is answered at once.
"""

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
"""Uses of each sample per epoch in the authors' recipe; with their datasets 162,646 samples an
epoch."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how a sample becomes part of a batch."""

    train: str = "data/shards/train"
    """Folder or URI of packed shards (with manifest.json) to train on."""
    validation: str = "data/shards/validation"
    """Folder or URI of packed shards whose whole pictures are restored while training."""
    repeats: dict[str, int] = field(default_factory=lambda: dict(PAPER_REPEATS))
    """Degradation -> uses of each of its samples per epoch; 0, or not named: not trained on."""
    crop: int = 128
    """Side of the square training crops, in pixels."""
    augment: Literal["flips", "dihedral", "none"] = "flips"
    """`flips`: horizontal and vertical, as in the paper; `dihedral`: all eight flips and quarter
    turns."""
    order: Literal["uniform", "local"] = "uniform"
    """`uniform` shuffles over everything; `local` opens few shards at a time, for very large remote
    sets."""
    noise_rounding: Literal["truncate", "round"] = "truncate"
    """How noisy pictures become 8 bit: `truncate` as the field does it (half a grey level
    darker)."""
    loader_workers: int = 2
    """Decoding processes per training worker; 0 decodes in the training process."""
    cache_dir: str = "data/cache"
    """Folder of each node's local copies of remote shards; relative to the folder the command is
    run in."""
    cache_gib: float = 50.0
    """Limit of the cache in GiB; the shards least recently used go first."""
    on_corrupt: Literal["stop", "substitute"] = "stop"
    """A damaged sample stops the run, or another sample of its task takes its place (the same for
    any world)."""
    corrupt_budget: int = 100
    """With `substitute`: the run stops after this many damaged samples."""

    def __post_init__(self) -> None:
        """Refuse unknown degradations and sizes out of range."""
        for name, repeat in self.repeats.items():
            if name not in DEGRADATIONS:
                raise ValueError(
                    f"data.repeats names {name!r}; known degradations: {', '.join(DEGRADATIONS)}"
                )
            if repeat < 0:
                raise ValueError(f"data.repeats.{name} is {repeat}, but must be 0 or more")
        if not any(self.repeats.values()):
            raise ValueError(
                f"data.repeats uses nothing; name at least one of {', '.join(DEGRADATIONS)}"
            )
        if self.crop < 16:
            raise ValueError(f"data.crop is {self.crop}, but must be at least 16 pixels")
        if self.loader_workers < 0:
            raise ValueError(f"data.loader_workers is {self.loader_workers}, but must be 0 or more")
        if self.cache_gib <= 0:
            raise ValueError(f"data.cache_gib is {self.cache_gib}, but must be above 0")
        if self.corrupt_budget < 0:
            raise ValueError(f"data.corrupt_budget is {self.corrupt_budget}, but must be 0 or more")
