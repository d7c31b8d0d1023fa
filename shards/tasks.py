"""The five tasks of the paper and their seven degradations, one row each."""

from typing import NamedTuple


class Degradation(NamedTuple):
    """One kind of damage that the network learns to undo."""

    task: str
    """The task it counts for in tables: denoise, derain, dehaze, deblur or lowlight."""
    sigma: float | None = None
    """Standard deviation of the noise added while loading, in grey levels of 0-255; None where
    pairs are stored."""


DEGRADATIONS: dict[str, Degradation] = {
    "denoise_15": Degradation("denoise", sigma=15.0),
    "denoise_25": Degradation("denoise", sigma=25.0),
    "denoise_50": Degradation("denoise", sigma=50.0),
    "derain": Degradation("derain"),
    "dehaze": Degradation("dehaze"),
    "deblur": Degradation("deblur"),
    "lowlight": Degradation("lowlight"),
}

TASKS: tuple[str, ...] = tuple(dict.fromkeys(row.task for row in DEGRADATIONS.values()))
"""denoise, derain, dehaze, deblur, lowlight: the tasks in their fixed order; a batch's `task`
indexes this."""
