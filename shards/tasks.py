"""The tasks and their degradations: those of the paper, and `mixed` for several in sequence."""

from typing import NamedTuple


class Degradation(NamedTuple):
    """One degradation that the network learns to remove."""

    task: str
    """The task whose row in a table it counts for."""
    sigma: float | None = None
    """Standard deviation of the noise that is added while loading, in grey levels of 0-255; None
    where the degraded picture is stored."""


DEGRADATIONS: dict[str, Degradation] = {
    "denoise_15": Degradation("denoise", sigma=15.0),
    "denoise_25": Degradation("denoise", sigma=25.0),
    "denoise_50": Degradation("denoise", sigma=50.0),
    "derain": Degradation("derain"),
    "dehaze": Degradation("dehaze"),
    "deblur": Degradation("deblur"),
    "lowlight": Degradation("lowlight"),
    "mixed": Degradation("mixed"),
}
"""`mixed`: two or three of the others applied in sequence, stored as pairs. New rows come last,
because the order of samples and checkpoints refer to rows by their number."""

TASKS: tuple[str, ...] = tuple(dict.fromkeys(row.task for row in DEGRADATIONS.values()))
"""All tasks in their fixed order; a batch's `task` indexes this."""

PAPER_TASKS: tuple[str, ...] = ("denoise", "derain", "dehaze", "deblur", "lowlight")
"""The tasks of the paper."""
