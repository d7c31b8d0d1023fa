"""The plots of a search's report, as SVG text.

Colours: the best trial blue, trial 0 orange, other finished trials dark grey, stopped ones light
grey, failed ones red.
"""

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tune.record import SearchRecord, TrialRecord, front, is_number
from tune.space import symbol

if TYPE_CHECKING:
    from optuna import Study

BEST, PAPER, FINISHED, STOPPED, INK = "#1565c0", "#e07b00", "#5f7285", "#b4bfc9", "#22303c"
FAILED = "#c62828"
COSTS = {
    "multiply_adds": ("multiply-adds of 256×256 (10⁹)", 1e-9),
    "parameters": ("parameters (10⁶)", 1e-6),
    "latency": ("latency (ms)", 1.0),
}
"""Cost -> its axis title, and the factor to its unit."""
VALIDATION_PSNR = "validation PSNR (dB)"


def cost_plot(record: SearchRecord, cost: str) -> str | None:
    """PSNR against a cost, with the front; None if there is nothing to plot."""
    done = [t for t in record.finished if is_number(t.costs.get(cost))]
    if not done:
        return None
    label, scale = COSTS[cost]
    figure, axis = _axes(5.6, 3.7)
    steps = front(done, cost)
    for trial in _best_last(record, done):
        special = trial.number in (0, record.champion)
        at = (trial.costs[cost] * scale, trial.psnr or 0)
        colour, size = _colour(record, trial), 90 if special else 50
        axis.scatter(*at, s=size, color=colour, edgecolor="white", linewidth=0.8, zorder=3)
        if special or trial in steps:
            _annotate(axis, str(trial.number), at, (5, 4), va="baseline")
    line = [(t.costs[cost] * scale, t.psnr) for t in steps]
    axis.step(*zip(*line, strict=True), where="post", color=BEST, linestyle="--", linewidth=1.2)
    axis.set_xlabel(label)
    axis.set_ylabel(VALIDATION_PSNR)
    axis.margins(0.1)
    return _svg(figure)


def curves(record: SearchRecord) -> str | None:
    """PSNR over the samples; a stopped trial's curve ends where it was stopped."""
    trials = [t for t in record.trials if any(is_number(p) for _, p in t.curve)]
    if not trials:
        return None
    figure, axis = _axes(10.2, 4.2)
    for trial in _best_last(record, trials):
        special = trial.number in (0, record.champion)
        points = [(s, p) for s, p in trial.curve if is_number(p)]
        axis.plot(
            *zip(*points, strict=True),
            color=_colour(record, trial),
            linewidth=2.2 if special else 1.2,
            marker="o" if len(points) == 1 else None,  # a line of one point is invisible
            zorder=3 if special else 2,
            label=_kind(record, trial),
        )
        if trial.state in ("stopped", "failed"):
            cross = FAILED if trial.state == "failed" else FINISHED
            axis.plot(*points[-1], "x", color=cross, markersize=7, label=f"{trial.state} here")
        for event in trial.inherited:
            style: Any = {"color": STOPPED, "linestyle": ":", "label": "took over better weights"}
            axis.axvline(event["samples"], **style)
    handles, labels = axis.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    axis.legend(legend.values(), legend.keys(), loc="lower right", fontsize=9)
    axis.set_xlabel("training samples")
    axis.set_ylabel(VALIDATION_PSNR)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(0, record.budget * 1.02)
    return _svg(figure)


def parallel(study: "Study") -> str:
    """A line per trial through its values, the darker the higher its PSNR."""
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    with warnings.catch_warnings(), pyplot.rc_context({"backend": "svg"}):
        warnings.simplefilter("ignore")  # experimental; an axis on which nothing varies
        axis = plot_parallel_coordinate(study, target_name="PSNR (dB)")
    axis.set_title("")
    fields = list(study.trials[0].params)
    shown = [tick.get_text() for tick in axis.get_xticklabels()]  # long names are cut
    names = [
        next((symbol(f) for f in fields if f.startswith(text.removesuffix("..."))), text)
        for text in shown
    ]
    axis.set_xticklabels(names, rotation=0)
    figure: Any = axis.figure
    figure.set_size_inches(10.2, 4.2)
    text = _svg(figure)
    pyplot.close(figure)
    return text


def bars(
    values: Mapping[str, float],
    label: str,
    *,
    start: float = 0.0,
    notes: Mapping[str, str] | None = None,
) -> str:
    """A row per value, from top to bottom; the axis begins at `start`."""
    figure, axis = _axes(6.4, 0.4 * len(values) + 1.0)
    names, lengths = list(values)[::-1], list(values.values())[::-1]
    axis.hlines(names, start, lengths, color=STOPPED, linewidth=2)
    axis.scatter(lengths, names, color=BEST, s=60, zorder=3)
    for name, value in zip(names, lengths, strict=True):
        _annotate(axis, (notes or {}).get(name, f"{value:.2f}"), (value, name), (8, 0))
    span = max([*lengths, start]) - start or 1.0
    axis.set_xlim(start - 0.05 * span, start + span * (2 if notes else 1.2))
    axis.margins(y=0.12)
    axis.set_xlabel(label)
    return _svg(figure)


def usage(trials: Sequence[tuple[str, TrialRecord]], library: str) -> str | None:
    """Use of each expert of a library by each task: a heat map per trial, side by side."""
    tables = [
        (title, {task: shares[library] for task, shares in t.routing.items() if library in shares})
        for title, t in trials
    ]
    tables = [(title, rows) for title, rows in tables if rows]
    if not tables:
        return None
    widths = [len(next(iter(rows.values()))) for _, rows in tables]
    figure, axes = _figure(10.2, 0.34 * len(tables[0][1]) + 0.9, widths)
    for axis, (title, rows) in zip(axes, tables, strict=True):
        table = np.array(list(rows.values()))
        axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            text = f"{value:.2f}".removeprefix("0") if value < 1 else "1"
            ink = "white" if value > 0.6 else INK
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xticks(range(table.shape[1]))
        axis.set_yticks(range(len(rows)), list(rows))
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return _svg(figure)


def _kind(record: SearchRecord, trial: TrialRecord) -> str:
    if trial.number == record.champion:
        return f"trial {trial.number}, the best"
    if trial.number == 0:
        return f"trial 0, {trial.label or 'the paper’s point'}"
    return {"finished": "finished", "failed": "failed"}.get(trial.state, "stopped or running")


def _colour(record: SearchRecord, trial: TrialRecord) -> str:
    if trial.number == record.champion:
        return BEST
    if trial.number == 0:
        return PAPER
    return {"finished": FINISHED, "failed": FAILED}.get(trial.state, STOPPED)


def _best_last(record: SearchRecord, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """In the order of drawing: the best trial is drawn last, above the others."""
    order = [STOPPED, FAILED, FINISHED, PAPER, BEST]
    return sorted(trials, key=lambda t: order.index(_colour(record, t)))


def _annotate(axis: Any, text: str, at: Any, offset: tuple[int, int], va: str = "center") -> None:
    where = {"xytext": offset, "textcoords": "offset points", "va": va}
    axis.annotate(text, at, fontsize=8.5, color=INK, **where)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, (axis,) = _figure(width, height, [1])
    return figure, axis


def _figure(width: float, height: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure with axes side by side; not from pyplot, which needs a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, len(ratios), squeeze=False, width_ratios=list(ratios)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#9aa7b2")
        axis.tick_params(labelsize=9, colors=INK)
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
