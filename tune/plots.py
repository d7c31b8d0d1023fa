"""The plots of a search's page, as SVG text.

The same colours everywhere: the best trial blue, the paper's point orange, other finished trials
slate, stopped ones light, failed ones not drawn.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tune.record import Record, Row, is_number
from tune.record import front as best_of
from tune.space import show, symbol

BEST, PAPER, FINISHED, STOPPED, INK = "#1565c0", "#e07b00", "#5f7285", "#c3ccd4", "#22303c"
COST_NAMES = {
    "multiply_adds": ("multiply-adds of 256×256 (G)", 1e-9),
    "parameters": ("parameters (M)", 1e-6),
    "latency": ("latency (ms)", 1.0),
}


def colour(record: Record, row: Row) -> str:
    """The colour of a trial."""
    if row.number == record.champion:
        return BEST
    if row.number == 0:
        return PAPER
    return FINISHED if row.state == "finished" else STOPPED


def front(record: Record, cost: str) -> str | None:
    """PSNR against a cost, with the front; None where nothing is known."""
    rows = [r for r in record.rows if is_number(r.psnr) and is_number(r.costs.get(cost))]
    done = [r for r in rows if r.state == "finished"]
    if not done:
        return None
    label, scale = COST_NAMES[cost]
    figure, axis = _axes(5.6, 3.7)
    steps = best_of(done, cost)
    for row in _back_to_front(record, done):
        axis.scatter(
            row.costs[cost] * scale,
            row.psnr,
            s=90 if row.number in (0, record.champion) else 50,
            color=colour(record, row),
            edgecolor="white",
            linewidth=0.8,
            zorder=3,
        )
        if row.number not in (0, record.champion) and row not in steps:
            continue
        axis.annotate(
            str(row.number),
            (row.costs[cost] * scale, row.psnr or 0),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axis.step(
        [r.costs[cost] * scale for r in steps],
        [r.psnr for r in steps],
        where="post",
        color=BEST,
        linewidth=1.2,
        linestyle="--",
        zorder=2,
    )
    axis.set_xlabel(label)
    axis.set_ylabel("validation PSNR (dB)")
    axis.margins(0.1)
    return _svg(figure)


def curves(record: Record) -> str | None:
    """PSNR over the samples, stopped trials to where they were stopped."""
    rows = [r for r in record.rows if any(is_number(p) for _, p in r.curve)]
    if not rows:
        return None
    figure, axis = _axes(10.2, 4.2)
    for row in _back_to_front(record, rows):
        special = row.number in (0, record.champion)
        points = [(s, p) for s, p in row.curve if is_number(p)]
        axis.plot(
            *zip(*points, strict=True),
            color=colour(record, row),
            linewidth=2.2 if special else 1.2,
            marker="o" if len(points) == 1 else None,  # a line of one point is not seen
            zorder=3 if special else 2,
        )
        if row.state == "stopped":
            axis.plot(*points[-1], marker="x", color=FINISHED, markersize=6, zorder=3)
        if row.state == "failed":
            axis.plot(*points[-1], marker="x", color="#c62828", markersize=8, zorder=3)
        for event in row.inherited:
            axis.axvline(event["samples"], color=STOPPED, linewidth=0.6, linestyle=":")
    axis.set_xlabel("samples")
    axis.set_ylabel("validation PSNR (dB)")
    axis.set_xlim(0, record.budget * 1.02)
    return _svg(figure)


def parallel(record: Record, logs: Mapping[str, bool]) -> str | None:
    """A line per trial through its values, to its PSNR."""
    rows = [r for r in record.rows if is_number(r.psnr) and r.state != "failed"]
    fields = [f for f in rows[0].changes if f in logs] if rows else []
    if len(rows) < 2 or not fields:
        return None
    done = [r for r in rows if r.state == "finished"] or rows
    figure, axis = _axes(10.2, 4.2)
    columns = [_column([r.changes[f] for r in rows], logs[f]) for f in fields]
    columns.append(_column([r.psnr for r in rows], False))
    names = [symbol(f) for f in fields] + ["PSNR (dB)"]
    by_number = {row.number: at for at, row in enumerate(rows)}
    for row in _back_to_front(record, rows):
        special = row.number in (0, record.champion)
        line = [positions[by_number[row.number]] for positions, _ in columns]
        axis.plot(
            range(len(line)),
            line,
            color=colour(record, row),
            linewidth=2.4 if special else 1.1,
            alpha=1 if special or row in done else 0.8,
            zorder=3 if special else 2,
        )
    for at, (_, ticks) in enumerate(columns):
        axis.axvline(at, color=INK, linewidth=0.8, zorder=1)
        for y, text in ticks:
            axis.annotate(
                text,
                (at, y),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                color=INK,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
                zorder=4,
            )
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(axis="x", length=0)
    axis.set_yticks([])
    axis.set_xlim(-0.15, len(names) - 0.6)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.grid(False)
    return _svg(figure)


def bars(values: Mapping[str, float], label: str, *, notes: Mapping[str, str] | None = None) -> str:
    """Horizontal bars, the longest on top."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    figure, axis = _axes(6.4, 0.36 * len(ordered) + 1.0)
    names = [name for name, _ in ordered]
    axis.barh(names, [value for _, value in ordered], color=FINISHED, height=0.6)
    for name, value in ordered:
        axis.annotate(
            (notes or {}).get(name, f"{value:.2f}"),
            (value, name),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axis.set_xlim(0, max([value for _, value in ordered] + [1e-9]) * 1.45)
    axis.set_xlabel(label)
    axis.grid(False)
    return _svg(figure)


def levels(rows: Sequence[Row]) -> str | None:
    """PSNR of the rows of a fixed list, in their order, on an axis cut to where they differ."""
    known = [r for r in rows if is_number(r.psnr)]
    if not known:
        return None
    figure, axis = _axes(6.4, 0.42 * len(known) + 1.0)
    names = [r.label for r in known][::-1]
    values = [float(r.psnr or 0) for r in known][::-1]
    axis.hlines(names, min(values), values, color=STOPPED, linewidth=2)
    axis.scatter(values, names, color=BEST, s=60, zorder=3)
    for name, value in zip(names, values, strict=True):
        axis.annotate(
            f"{value:.2f}", (value, name), xytext=(8, 0), textcoords="offset points", va="center"
        )
    axis.margins(x=0.18, y=0.12)
    axis.set_xlabel("validation PSNR (dB), mean over tasks")
    return _svg(figure)


def usage(rows: Sequence[tuple[str, Row]], library: str) -> str | None:
    """How much each task uses each expert of a library, a heat map per trial, side by side."""
    known = [(title, row) for title, row in rows if row.routing]
    tables = [
        (title, [shares.get(library, []) for shares in row.routing.values()], list(row.routing))
        for title, row in known
    ]
    tables = [t for t in tables if t[1] and t[1][0]]
    if not tables:
        return None
    figure, axes = _figure(
        10.2, 0.34 * len(tables[0][1]) + 0.9, len(tables), [len(t[1][0]) for t in tables]
    )
    for axis, (title, shares, tasks) in zip(axes, tables, strict=True):
        table = np.array(shares)
        axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            axis.text(
                x,
                y,
                f"{value:.2f}".removeprefix("0") if value < 1 else "1",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else INK,
            )
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xticks(range(table.shape[1]), [str(n) for n in range(table.shape[1])])
        axis.set_yticks(range(len(tasks)), tasks)
        axis.tick_params(length=0)
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return _svg(figure)


def _column(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of the values, and the ticks of their axis."""
    if any(isinstance(v, bool) or not is_number(v) for v in values):
        kinds = list(dict.fromkeys(map(str, values)))
        at = {kind: n / max(1, len(kinds) - 1) for n, kind in enumerate(kinds)}
        return [at[str(v)] for v in values], [(y, kind) for kind, y in at.items()]
    numbers = np.array(values, dtype=float)
    scaled = np.log10(numbers) if log else numbers
    low, high = float(scaled.min()), float(scaled.max())
    span = (high - low) or 1.0
    positions = [(v - low) / span if high > low else 0.5 for v in scaled]
    if all(isinstance(v, int) for v in values) and high - low <= 8:
        marks = list(range(int(numbers.min()), int(numbers.max()) + 1))
        ticks = [((m - low) / span if high > low else 0.5, str(m)) for m in marks]
    else:
        places = np.linspace(low, high, 5 if high > low else 1)
        worth = 10**places if log else places
        ticks = [
            ((p - low) / span if high > low else 0.5, _tick(float(w)))
            for p, w in zip(places, worth, strict=True)
        ]
    return positions, ticks


def _tick(value: float) -> str:
    return f"{value:.2f}" if 1 <= abs(value) < 1000 else show(value)


def _back_to_front(record: Record, rows: Sequence[Row]) -> list[Row]:
    rank = {STOPPED: 0, FINISHED: 1, PAPER: 2, BEST: 3}
    return sorted(rows, key=lambda r: rank[colour(record, r)])


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, (axis,) = _figure(width, height, 1, [1])
    return figure, axis


def _figure(
    width: float, height: float, count: int, ratios: Sequence[float]
) -> tuple[Any, list[Any]]:
    """A figure outside of pyplot, which would look for a display."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(1, count, squeeze=False, width_ratios=list(ratios)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#9aa7b2")
        axis.tick_params(labelsize=9, colors=INK)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
        axis.grid(color="#e6eaee", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an SVG element that scales with the page and links to nothing."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "measnet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("DejaVu Sans", "system-ui, DejaVu Sans")
