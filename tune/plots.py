"""The plots of a search's report, as SVG text.

Colours: the best trial blue, trial 0 orange, other finished trials dark grey, stopped ones light
grey, failed ones red.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from distributed.pages import charts
from distributed.pages.charts import MIDDLE, PALE, figure, svg
from shards.wording import counted
from tune.record import SearchRecord, TrialRecord, front, is_number
from tune.space import symbol

if TYPE_CHECKING:
    from optuna import Study

BEST, PAPER, FINISHED, STOPPED, FAILED = charts.BLUE, charts.ORANGE, MIDDLE, PALE, charts.RED


class Cost(NamedTuple):
    """How a cost is shown."""

    title: str
    """Of its axis."""
    unit: str
    """Heading of its column."""
    factor: float
    """From the stored number to the unit."""


COSTS = {
    "multiply_adds": Cost("multiply-adds of 256×256 (10⁹)", "10⁹ mult.-adds", 1e-9),
    "parameters": Cost("parameters (10⁶)", "10⁶ param.", 1e-6),
    "latency": Cost("latency (ms)", "ms", 1.0),
}
VALIDATION_PSNR = "validation PSNR (dB)"


def cost_plot(record: SearchRecord, cost: str) -> str | None:
    """PSNR against a cost, with the front; None if there is nothing to plot."""
    done = [t for t in record.finished if is_number(t.costs.get(cost))]
    if not done:
        return None
    label, _, scale = COSTS[cost]
    made, (axis,) = figure(5.6, 3.7)
    steps = front(done, cost)
    named: dict[tuple[float, float], str] = {}
    for trial in _best_last(record, done):
        special = trial.number in (0, record.champion)
        at = (trial.costs[cost] * scale, trial.psnr or 0)
        colour, size = _style(record, trial)[1], 90 if special else 50
        axis.scatter(*at, s=size, color=colour, edgecolor="white", linewidth=0.8, zorder=3)
        if special or trial in steps:
            named[at] = str(trial.number)
    line = [(t.costs[cost] * scale, t.psnr) for t in steps]
    axis.step(*zip(*line, strict=True), where="post", color=BEST, linestyle="--", linewidth=1.2)
    axis.set_xlabel(label)
    axis.set_ylabel(VALIDATION_PSNR)
    axis.margins(0.1)
    charts.name_points(made, axis, named)
    return svg(made, f"Validation PSNR against {label} of {counted(len(done), 'trial')}")


def curves(record: SearchRecord) -> str | None:
    """PSNR over the samples; a stopped trial's curve ends where it was stopped."""
    trials = [t for t in record.trials if any(is_number(p) for _, p in t.curve)]
    if not trials:
        return None
    made, (axis,) = figure(10.2, 4.2)
    for trial in _best_last(record, trials):
        special = trial.number in (0, record.champion)
        _, colour, name = _style(record, trial)
        points = [(s, p) for s, p in trial.curve if is_number(p)]
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            linewidth=2.2 if special else 1.2,
            marker="o" if len(points) == 1 else None,  # a line of one point is invisible
            zorder=3 if special else 2,
            label=name,
        )
        if trial.state in ("stopped", "failed"):
            cross = FAILED if trial.state == "failed" else FINISHED
            axis.plot(*points[-1], "x", color=cross, markersize=7, label=f"{trial.state} here")
        for event in trial.inherited:
            style: Any = {"color": STOPPED, "linestyle": ":", "label": "took over better weights"}
            axis.axvline(event["samples"], **style)
    handles, labels = axis.get_legend_handles_labels()
    charts.legend_below(made, dict(zip(labels, handles, strict=True)))
    axis.set_xlabel("training samples")
    axis.set_ylabel(VALIDATION_PSNR)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(0, record.budget * 1.02)
    return svg(made, f"Validation PSNR over training samples of {counted(len(trials), 'trial')}")


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
    made: Any = axis.figure
    for one in made.axes:
        for label in (*one.get_yticklabels(), *one.get_yticklabels(minor=True)):
            label.set_fontsize(8)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})
    made.set_size_inches(10.2, 4.2)
    text = svg(made, "Parallel coordinates: the values and the PSNR of each trial")
    pyplot.close(made)
    return text


def bars(
    values: Mapping[str, float],
    label: str,
    *,
    start: float = 0.0,
    notes: Mapping[str, str] | None = None,
) -> str:
    """A row per value, from top to bottom; the axis begins at `start`."""
    made, (axis,) = figure(6.4, 0.4 * len(values) + 1.0)
    names, lengths = list(values)[::-1], list(values.values())[::-1]
    axis.hlines(names, start, lengths, color=STOPPED, linewidth=2)
    axis.scatter(lengths, names, color=BEST, s=60, zorder=3)
    for name, value in zip(names, lengths, strict=True):
        charts.annotate(axis, (notes or {}).get(name, f"{value:.2f}"), (value, name), (8, 0))
    span = max([*lengths, start]) - start or 1.0
    axis.set_xlim(start - 0.05 * span, start + span * (2 if notes else 1.2))
    axis.margins(y=0.12)
    axis.set_xlabel(label)
    return svg(
        made, f"{label}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    )


def _style(record: SearchRecord, trial: TrialRecord) -> tuple[int, str, str]:
    """Of a trial: the order of drawing (the best is last, above the others), colour and name."""
    if trial.number == record.champion:
        return 4, BEST, f"trial {trial.number}, the best"
    if trial.number == 0:
        return 3, PAPER, f"trial 0, {trial.label or 'the paper’s point'}"
    if trial.state == "finished":
        return 2, FINISHED, "finished"
    return (1, FAILED, "failed") if trial.state == "failed" else (0, STOPPED, "stopped or running")


def _best_last(record: SearchRecord, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(trials, key=lambda trial: _style(record, trial)[0])
