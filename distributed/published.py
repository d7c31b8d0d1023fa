"""Figures of the field, PSNR in dB, to print beside ours. Read in the place named with each table.

They were computed by the authors of each method, on whole benchmarks, in RGB; crop and noise are
not the same in all programs.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One method."""

    method: str
    parameters: str
    """As claimed by its authors; empty: not known."""
    psnr: tuple[float, ...]
    """Of the table's columns."""
    average: float
    """As printed; it is not always the mean of the columns."""


class Table(NamedTuple):
    """One table of the paper, with later methods."""

    title: str
    columns: dict[str, str]
    """Degradation -> heading."""
    rows: tuple[Row, ...]
    source: str


_LEADERBOARD = (
    "the leaderboard Harbinzzy/All-in-One-Image-Restoration-Survey (2026-06-28) and the methods' "
    "own tables"
)

THREE_TASKS = Table(
    "Table I: three degradations",
    {
        "dehaze": "SOTS",
        "derain": "Rain100L",
        "denoise_15": "σ = 15",
        "denoise_25": "σ = 25",
        "denoise_50": "σ = 50",
    },
    (
        Row("AirNet", "9M", (27.94, 34.90, 33.92, 31.26, 28.00), 31.20),
        Row("PromptIR", "36M", (30.58, 36.37, 33.98, 31.31, 28.06), 32.06),
        Row("InstructIR-3D", "16M+17M", (30.22, 37.98, 34.15, 31.52, 28.30), 32.43),
        Row("AdaIR", "29M", (31.06, 38.64, 34.12, 31.45, 28.19), 32.69),
        Row("MoCE-IR", "25M", (31.34, 38.57, 34.11, 31.45, 28.18), 32.73),
        Row("DFPIR", "31M+63M", (31.87, 38.65, 34.14, 31.47, 28.25), 32.88),
        Row("MIRAGE", "10M", (31.86, 38.94, 34.12, 31.46, 28.19), 32.91),
        Row("MEASNet (paper)", "31M", (31.61, 39.00, 34.12, 31.46, 28.19), 32.85),
    ),
    _LEADERBOARD,
)
FIVE_TASKS = Table(
    "Table II: five degradations",
    {
        "dehaze": "SOTS",
        "derain": "Rain100L",
        "denoise_25": "σ = 25",
        "deblur": "GoPro",
        "lowlight": "LOL",
    },
    (
        Row("AirNet", "9M", (21.04, 32.98, 30.91, 24.35, 18.18), 25.49),
        Row("PromptIR", "36M", (26.54, 36.37, 31.47, 28.71, 22.68), 29.15),
        Row("InstructIR-5D", "16M+17M", (27.10, 36.84, 31.40, 29.40, 23.00), 29.55),
        Row("AdaIR", "29M", (30.53, 38.02, 31.35, 28.12, 23.00), 30.20),
        Row("MoCE-IR", "25M", (30.48, 38.04, 31.34, 30.05, 23.00), 30.58),
        Row("DFPIR", "31M+63M", (31.64, 37.62, 31.29, 28.82, 23.82), 30.64),
        Row("MIRAGE", "10M", (31.45, 38.92, 31.41, 28.10, 23.59), 30.68),
        Row("MEASNet (paper)", "31M", (31.05, 38.32, 31.40, 29.41, 23.00), 30.64),
    ),
    _LEADERBOARD,
)
TABLES = (THREE_TASKS, FIVE_TASKS)
