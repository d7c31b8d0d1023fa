"""Charts as SVG elements for a page, drawn by matplotlib.

Their colours are variables of the page's style, so that they fit its dark mode.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

INK, FAINT, GRID, PAPER = "#22303c", "#9aa7b2", "#e6eaee", "#fefefe"
BLUE, ORANGE, MIDDLE, PALE, RED = "#1565c0", "#e07b00", "#5f7285", "#b4bfc9", "#c62828"
SERIES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
"""Colours of lines, points and experts, in this order; matplotlib's own."""
MARKERS = "osD^vPX*"
_VARIABLES = {
    INK: "--ink",
    FAINT: "--axis",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--accent",
    ORANGE: "--second",
    MIDDLE: "--muted",
    PALE: "--pale",
    RED: "--bad",
}
"""Colour in the SVG -> variable of the page's style that replaces it."""

Points = Sequence[tuple[float, float]]


def colour(number: int) -> str:
    """Colour of a series or an expert."""
    return SERIES[number % len(SERIES)]


def figure(width: float, height: float, ratios: Sequence[float] = (1,)) -> tuple[Any, list[Any]]:
    """A figure in inches with axes side by side; not from pyplot, which needs a display."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = list(made.subplots(1, len(ratios), squeeze=False, width_ratios=list(ratios)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(labelsize=9, colors=INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return made, axes


def legend_below(figure: Any, handles: Mapping[str, Any] | None = None) -> None:
    """A legend below the axes, where it covers nothing; `handles`: name -> line, default: all."""
    shown = {} if handles is None else {"labels": list(handles), "handles": [*handles.values()]}
    style: dict[str, Any] = {"fontsize": 8.5, "labelcolor": INK, "frameon": False}
    names = list(handles) if handles is not None else figure.axes[0].get_legend_handles_labels()[1]
    inches = 0.55 + 0.075 * max(map(len, names), default=0)  # of a column: the mark and its name
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(loc="outside lower center", ncols=columns, **shown, **style)


def svg(figure: Any, alt: str) -> Markup:
    """The figure as an SVG element that scales with the page and links to nothing.

    Args:
        figure: of matplotlib.
        alt: what it shows, for readers who do not see it.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    # The salt gives the parts of equal charts equal names, so it has to differ between charts.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"measnet {alt}"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("DejaVu Sans", "system-ui, DejaVu Sans")
    for hexadecimal, variable in _VARIABLES.items():
        text = text.replace(hexadecimal, f"var({variable})")
    # Ids are unique on a page, but the groups of matplotlib are named alike in each figure.
    text = re.sub(
        r' id="(figure|axes|patch|line2d|text|xtick|ytick|legend|matplotlib)[^"]*"', "", text
    )
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))


def lines(
    series: Mapping[str, Points], *, title: str, unit: str, size: tuple[float, float] = (4.6, 2.9)
) -> Markup:
    """A line per series over the training samples.

    Args:
        series: name -> (samples, value); a series of one point is drawn as a mark.
        title: of the chart.
        unit: title of the vertical axis.
        size: in inches.
    """
    made, (axis,) = figure(*size)
    for number, (name, points) in enumerate(series.items()):
        mean = name == "mean"
        axis.plot(
            *zip(*points, strict=True),
            color=INK if mean else colour(number),
            linewidth=2.4 if mean else 1.6,
            marker=MARKERS[number % len(MARKERS)] if len(points) < 12 else None,
            markersize=4,
            label=name,
        )
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.set_xlabel("training samples", fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.xaxis.set_major_locator(_few_ticks())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    if len(series) > 1:
        legend_below(made)
    ends = "; ".join(
        f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items()
    )
    return svg(made, f"{title} over training samples: {ends}")


def scatter(groups: Mapping[str, Points], *, title: str, axes: tuple[str, str]) -> Markup:
    """Points of some groups, each with its own colour and mark."""
    made, (axis,) = figure(4.6, 3.6)
    for number, (name, points) in enumerate(groups.items()):
        mark = MARKERS[number % len(MARKERS)]
        axis.scatter(
            *zip(*points, strict=True), color=colour(number), marker=mark, s=46, label=name
        )
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.set_xlabel(axes[0], fontsize=9)
    axis.set_ylabel(axes[1], fontsize=9)
    axis.margins(0.12)
    legend_below(made)
    counts = ", ".join(f"{len(points)} of {name}" for name, points in groups.items())
    return svg(made, f"{title}: points {counts}")


def annotate(axis: Any, text: str, at: Any, offset: tuple[float, float]) -> None:
    """Write a text beside a point; `offset` in typographic points to its left end."""
    axis.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
    )


LETTER, LINE, MARK = 5.4, 10.0, 4.5
"""Width of a digit, height of a line and radius of a mark, in typographic points."""


def name_points(figure: Any, axis: Any, names: Mapping[tuple[float, float], str]) -> None:
    """Write the name of each point (x, y) beside it, where it covers no other name or point."""
    figure.draw_without_rendering()  # fixes the positions of the axes
    per_point = figure.dpi / 72
    places = [tuple(axis.transData.transform(at) / per_point) for at in names]
    offsets = free_offsets(places, [LETTER * len(name) for name in names.values()])
    for (at, name), offset in zip(names.items(), offsets, strict=True):
        annotate(axis, name, at, offset)


def free_offsets(
    places: Sequence[tuple[float, float]], widths: Sequence[float]
) -> list[tuple[float, float]]:
    """For each point the offset of its label's left end, so that labels do not collide.

    Args:
        places: (x, y) of the points, in typographic points.
        widths: of the labels.

    Returns:
        Of eight directions, near and further away, the first that covers no point and no earlier
        label; if all do, the nearest to the upper left.
    """
    from matplotlib.transforms import Bbox

    boxes = [Bbox.from_bounds(x - MARK, y - MARK, 2 * MARK, 2 * MARK) for x, y in places]
    found = []
    for (x, y), width in zip(places, widths, strict=True):
        labels = {
            offset: Bbox.from_bounds(x + offset[0], y + offset[1] - LINE / 2, width, LINE)
            for away in (6.0, 12.0, 20.0)
            for offset in (
                *((-away - width, away), (away, -away)),  # the front's line passes neither
                *((-away - width, 0.0), (away, 0.0)),
                *((-width / 2, away + 3), (-width / 2, -away - 3)),
                *((away, away), (-away - width, -away)),
            )
        }
        free = (offset for offset, box in labels.items() if not box.count_overlaps(boxes))
        offset = next(free, next(iter(labels)))
        boxes.append(labels[offset])
        found.append(offset)
    return found


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)
