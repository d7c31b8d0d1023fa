"""Figures of the field, PSNR in dB, to print beside ours. Each row names where it was read.

They were computed by the authors of each method, on whole benchmarks, in RGB; crop and noise are
not the same in all programs. What the paper prints for single tasks (Tables III to V) is not here.
"""

from typing import NamedTuple

LEADERBOARD = "leaderboard"
"""Of Harbinzzy/All-in-One-Image-Restoration-Survey, 2026-06-28."""


class Row(NamedTuple):
    """One method."""

    method: str
    parameters: str
    """As claimed by its authors; empty: not known."""
    psnr: tuple[float | None, ...]
    """Of the table's columns; None: not known. Empty: only the average is known."""
    average: float | None
    """As printed; it is not always the mean of the columns. None: not printed."""
    source: str
    """Where it was read: `X's figure` is the picture of a table in the repository of X."""


class Table(NamedTuple):
    """One table of the paper, with later methods."""

    title: str
    columns: dict[str, str]
    """Degradation -> heading."""
    rows: tuple[Row, ...]


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
        Row("AirNet", "9M", (27.94, 34.90, 33.92, 31.26, 28.00), 31.20, "MoCE-IR's figure"),
        Row("IDR", "15M", (29.87, 36.03, 33.89, 31.32, 28.04), 31.83, "VLU-Net's figure"),
        Row("PromptIR", "36M", (30.58, 36.37, 33.98, 31.31, 28.06), 32.06, "PromptIR's figure"),
        Row("Gridformer", "34M", (30.37, 37.15, 33.93, 31.37, 28.11), 32.19, "MoCE-IR's figure"),
        Row(
            "InstructIR-3D",
            "16M+17M",
            (30.22, 37.98, 34.15, 31.52, 28.30),
            32.43,
            "InstructIR's figure",
        ),
        Row("Perceive-IR", "42M+86M", (30.87, 38.29, 34.13, 31.42, 28.09), 32.56, LEADERBOARD),
        Row("MoCE-IR-S", "11M", (30.94, 38.22, 34.08, 31.42, 28.16), 32.57, "MoCE-IR's figure"),
        Row("AdaIR", "29M", (31.06, 38.64, 34.12, 31.45, 28.19), 32.69, "AdaIR's figure"),
        Row(
            "UniProcessor", "1002M", (31.66, 38.17, 34.08, 31.42, 28.17), 32.70, "MoCE-IR's figure"
        ),
        Row("HAIR", "29M", (30.98, 38.59, 34.16, 31.51, 28.24), 32.70, LEADERBOARD),
        Row("VLU-Net", "35M+88M", (30.71, 38.93, 34.13, 31.48, 28.23), 32.70, "VLU-Net's figure"),
        Row("MoCE-IR", "25M", (31.34, 38.57, 34.11, 31.45, 28.18), 32.73, "MoCE-IR's figure"),
        Row("AnyIR", "6M", (31.75, 38.61, 34.12, 31.46, 28.20), 32.83, LEADERBOARD),
        Row("BaryIR", "", (31.33, 38.95, 34.16, 31.54, 28.25), 32.85, LEADERBOARD),
        Row("DCPT-PromptIR", "35M", (31.91, 38.43, 34.17, 31.53, 28.30), 32.87, LEADERBOARD),
        Row("MTAIR", "", (31.34, 39.15, 34.14, 31.50, 28.24), 32.87, LEADERBOARD),
        Row("BioIR-L", "15.9M", (), 32.87, "DACG-IR's figure"),
        Row("DFPIR", "31M+63M", (31.87, 38.65, 34.14, 31.47, 28.25), 32.88, "DFPIR's figure"),
        Row("DyNet", "16M", (31.98, 38.71, 34.11, 31.44, 28.18), 32.88, LEADERBOARD),
        Row("MIRAGE", "10M", (31.86, 38.94, 34.12, 31.46, 28.19), 32.91, LEADERBOARD),
        Row("PIP-Restormer", "27M", (32.09, 38.29, 34.24, 31.60, 28.35), 32.91, LEADERBOARD),
        Row("DACG-IR-S", "13.9M", (), 32.99, "DACG-IR's figure"),
        Row("EvoIR", "36.7M", (), 33.00, "EvoIR's README"),
        Row("DACG-IR", "30.9M", (), 33.02, "DACG-IR's figure"),
        Row("ABAIR (extra data)", "41M", (33.53, 38.69, 34.18, 31.38, 28.25), 33.21, LEADERBOARD),
        Row("MEASNet (paper)", "31M", (31.61, 39.00, 34.12, 31.46, 28.19), 32.85, "the paper"),
    ),
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
        Row("AirNet", "9M", (21.04, 32.98, 30.91, 24.35, 18.18), 25.49, "AdaIR's figure"),
        Row("IDR", "15M", (25.24, 35.63, 31.60, 27.87, 21.34), 28.34, "AdaIR's figure"),
        Row("PromptIR", "36M", (26.54, 36.37, 31.47, 28.71, 22.68), 29.15, "VLU-Net's figure"),
        Row(
            "InstructIR-5D",
            "16M+17M",
            (27.10, 36.84, 31.40, 29.40, 23.00),
            29.55,
            "InstructIR's figure",
        ),
        Row("Perceive-IR", "42M+86M", (28.19, 37.25, 31.44, 29.46, 22.88), 29.84, LEADERBOARD),
        Row("MoCE-IR-S", "11M", (31.33, 37.21, 31.25, 28.90, 21.68), 30.08, "MoCE-IR's figure"),
        Row("VLU-Net", "35M+88M", (30.84, 38.54, 31.43, 27.46, 22.29), 30.11, "VLU-Net's figure"),
        Row("AdaIR", "29M", (30.53, 38.02, 31.35, 28.12, 23.00), 30.20, "AdaIR's figure"),
        Row("MoCE-IR", "25M", (30.48, 38.04, 31.34, 30.05, 23.00), 30.58, "MoCE-IR's figure"),
        Row("DFPIR", "31M+63M", (31.64, 37.62, 31.29, 28.82, 23.82), 30.64, "DFPIR's README"),
        Row("AnyIR", "6M", (31.41, 38.51, 31.37, 28.85, 23.11), 30.65, LEADERBOARD),
        Row("BaryIR", "", (31.12, 38.05, 31.43, 29.30, 23.38), 30.66, LEADERBOARD),
        Row("MIRAGE", "10M", (31.45, 38.92, 31.41, 28.10, 23.59), 30.68, LEADERBOARD),
        Row("DACG-IR-S", "13.9M", (), 30.76, "DACG-IR's figure"),
        Row("PIP-Restormer", "27M", (32.11, 38.09, 30.94, 28.61, 24.06), 30.81, LEADERBOARD),
        Row("BioIR-L", "15.9M", (), 30.99, "DACG-IR's figure"),
        Row("DACG-IR", "30.9M", (), 31.07, "DACG-IR's figure"),
        Row("ABAIR (extra data)", "41M", (33.46, 38.18, 31.38, 29.00, 24.20), 31.24, LEADERBOARD),
        Row("MaskDCPT + NAFNet (extra data)", "", (), 32.09, "MaskDCPT's figure"),
        Row("MEASNet (paper)", "31M", (31.05, 38.32, 31.40, 29.41, 23.00), 30.64, "the paper"),
    ),
)
TABLES = (THREE_TASKS, FIVE_TASKS)

_DENOISED = {"denoise_15": "σ = 15", "denoise_25": "σ = 25", "denoise_50": "σ = 50"}
SINGLE_TASKS = {
    "dehaze": Table("Tables III to V, one task: dehazing", {"dehaze": "PSNR / SSIM"}, ()),
    "derain": Table("Tables III to V, one task: deraining", {"derain": "PSNR / SSIM"}, ()),
    "denoise": Table("Tables III to V, one task: denoising", _DENOISED, ()),
}
"""Task -> layout of its table; without the paper's figures, which are not known here."""
CBSD68 = (
    Row("CBM3D", "", (None, 30.71, None), None, "MDIRNet's README"),
    Row("FFDNet", "", (None, 31.21, 27.97), None, "MDIRNet's README; σ = 50: cszn/DPIR"),
    Row("DnCNN", "", (None, 31.23, None), None, "MDIRNet's README"),
    Row("AirNet", "9M", (None, 31.48, None), None, "MDIRNet's README"),
    Row("DRUNet", "", (None, None, 28.51), None, "cszn/DPIR"),
)
"""Denoising on CBSD68."""
