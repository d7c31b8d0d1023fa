"""Figures of a run: before/after grids, expert usage per task, training curves.

Grids are drawn with Pillow at the scale of the pictures, charts with matplotlib; no display is
needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_GAP, _CAPTION, _TITLE, _LINE, _NARROWEST = 8, 26, 30, 16, 190
_INK, _FAINT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


class GridRow(NamedTuple):
    """One picture of a grid: (H, W, 3) floats in [0, 1]; values outside are clipped."""

    label: str
    degraded: NDArray[np.floating]
    restored: NDArray[np.floating]
    clean: NDArray[np.floating]
    input_psnr: float
    restored_psnr: float


def panel(row: GridRow, *, widest: int = 640) -> Image.Image:
    """Draw degraded | restored | clean side by side, with PSNR in dB underneath.

    A picture wider or higher than `widest` pixels is scaled down, which hides noise, so its caption
    gives the scale.
    """
    height, width = row.clean.shape[:2]
    scale = min(1.0, widest / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gain = row.restored_psnr - row.input_psnr
    captions = (
        f"degraded  {row.input_psnr:.2f} dB",
        f"restored  {row.restored_psnr:.2f} dB  ({gain:+.2f})",
        "clean" if scale == 1 else f"clean  (shown at {scale:.0%})",
    )
    step = max(size[0], _NARROWEST) + _GAP
    sheet = Image.new("RGB", (_GAP + 3 * step, _TITLE + size[1] + _CAPTION), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 8), row.label, _INK, ImageFont.load_default(16))
    pictures = (row.degraded, row.restored, row.clean)
    for at, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        image = Image.fromarray(as_uint8(picture))
        if scale < 1:
            image = image.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(image, (_GAP + at * step, _TITLE))
        draw.text((_GAP + at * step, _TITLE + size[1] + 4), caption, _INK, font)
    return sheet


def grid(panels: Sequence[Image.Image], path: Path, *, footer: str = "") -> None:
    """Write panels one below the other as a PNG; below them `footer`, in as many lines as needed.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("a grid needs at least one picture")
    width, height = max(p.width for p in panels), sum(p.height for p in panels)
    font = ImageFont.load_default(11)
    lines = wrap(footer, font, width - 2 * _GAP)
    sheet = Image.new("RGB", (width, height + _LINE * len(lines) + _GAP), _PAPER)
    y = 0
    for picture in panels:
        sheet.paste(picture, (0, y))
        y += picture.height
    for line in lines:
        ImageDraw.Draw(sheet).text((_GAP, y + 2), line, _FAINT, font)
        y += _LINE
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def expert_usage(usage: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Write heat maps of the use of each expert by each task, a panel per expert library.

    Args:
        usage: task (or degradation) -> library -> share per expert, in [0, 1]; a row sums to K.
        path: of the PNG.

    Raises:
        ValueError: nothing to draw.
    """
    tasks = list(usage)
    libraries = list(dict.fromkeys(name for shares in usage.values() for name in shares))
    if not libraries:
        raise ValueError("no expert library was used: the network has mese and mee switched off")
    columns = min(3, len(libraries))
    lines = -(-len(libraries) // columns)
    figure, axes = _figure(lines, columns, (3.6 * columns + 1.2, (0.42 * len(tasks) + 1.3) * lines))
    for at, (axis, library) in enumerate(zip(axes, libraries, strict=False)):
        table = np.array([usage[task][library] for task in tasks])
        image = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(library, fontsize=10)
        axis.set_xticks(range(table.shape[1]), range(table.shape[1]))
        axis.set_yticks(range(len(tasks)), tasks if at % columns == 0 else [""] * len(tasks))
        for (row, column), share in np.ndenumerate(table):
            ink = "black" if share > 0.6 else "white"
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", color=ink, fontsize=7)
    for axis in axes[len(libraries) :]:
        axis.axis("off")
    figure.supxlabel("expert", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of pixels or pictures", shrink=0.8)
    _save(figure, path)


def curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the curve of each metric over the samples, a panel per group.

    Args:
        records: `{"step": samples, "metrics": {"group/name": value}}`, from `read_metrics`.
        path: of the PNG.

    Raises:
        ValueError: no metrics.
    """
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for name, value in record["metrics"].items():
            group, _, leaf = name.rpartition("/")
            if group == "system":
                continue
            panel = group if group.startswith("val_") else name  # tasks share a panel
            series.setdefault(panel, {}).setdefault(leaf, []).append((record["step"], value))
    if not series:
        raise ValueError("no metrics to draw")
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure, axes = _figure(lines, columns, (4.2 * columns, 2.9 * lines))
    for axis, (panel, lanes) in zip(axes, series.items(), strict=False):
        for name, points in lanes.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, marker="o" if len(points) < 8 else None)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel("samples", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(lanes) > 1:
            axis.legend(fontsize=7)
    for axis in axes[len(series) :]:
        axis.axis("off")
    _save(figure, path)


def as_uint8(picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Floats in [0, 1] as 8 bit, clipped and rounded."""
    return (picture.clip(0, 1) * 255.0).round().astype(np.uint8)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure without pyplot, which needs a display, and its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
