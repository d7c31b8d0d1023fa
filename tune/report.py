"""The report of a search: `python -m tune.report SEARCH [--out FILE.html]`.

One HTML file without external files: table, front, learning curves, parallel coordinates,
importance, expert usage, cost, and the command that trains the best trial at full length. It is
made from search.json alone.
"""

import dataclasses
import html
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import tyro
from markupsafe import Markup

from distributed.pages.render import parts, render, signed
from measnet.config import from_dict
from measnet.network import PIXEL_LIBRARIES
from measnet.routing import measures
from shards.storage import join, open_folder, write_whole
from tune import plots
from tune.config import SearchConfig
from tune.record import FILE, SearchRecord, TrialRecord, is_number, load
from tune.results import noise_warning
from tune.sampler import build_study
from tune.space import Space, build, show, symbol

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Arguments:
    """Write the report of a search."""

    search: tyro.conf.Positional[str]
    """Folder of the search, such as runs/demo-search."""
    out: str = ""
    """The file to write; empty: report.html in the search's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 after a message if there is no search."""
    given = tyro.cli(Arguments, args=argv, prog="python -m tune.report")
    folder = given.search.removesuffix(FILE).rstrip("/") or "."
    try:
        record = load(folder)
        if record is None:
            raise ValueError(f"{folder} holds no {FILE}; give the folder of a search")
        record.rank()
        out = given.out or join(folder, "report.html")
        write(record, out)
        print(out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(record: SearchRecord, uri: str) -> None:
    """Write the report to a file or an object of a store."""
    write_whole(*open_folder(uri), page(record).encode())


def page(record: SearchRecord) -> str:
    """The whole report as HTML."""
    config = from_dict(SearchConfig, record.config)
    try:
        space = build(config.space, config.vary, config.base())
    except ValueError:  # the FILE.yaml of its ranges is gone
        space = Space()
    sections = [
        _best(record),
        _section("Trials", _trials_table(record), _table_note(record)),
        _section("PSNR by task", _tasks_table(record)),
        _fixed_list(record),
        *_plots(record, config, space),
        _section("Cost of the search", _spent(record)),
        _section("How it was measured", _protocol(record, config)),
    ]
    return render(
        "search.html",
        name=record.name,
        summary=f"{record.counts}; {record.budget:,} samples per full trial.",
        sections=[Markup(section) for section in sections if section],
    )


def importance(record: SearchRecord, config: SearchConfig, space: Space) -> dict[str, float]:
    """Importance of each parameter for the PSNR by Optuna's PED-ANOVA, in [0, 1], largest first.

    Empty if there are too few trials. Trials are compared at equal length, see `comparable_trials`.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = comparable_trials(record)
    if len(trials) < 5 or len(space.parameters) < 2:
        return {}
    study = _complete_study(trials, config, space)
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(value) for name, value in found.items()}


def effective_experts(trial: TrialRecord) -> float | None:
    """Experts that are used, mean over the per-pixel libraries; None: there are none."""
    own = [one for name, one in measures(trial.routing).items() if name in PIXEL_LIBRARIES]
    return fmean(one.effective_experts for one in own) if own else None


def comparable_trials(record: SearchRecord) -> list[tuple[TrialRecord, float]]:
    """Trials with their PSNR at the same length: at the end if 8 or more finished, else at
    the first validation that all reached."""
    if len(record.finished) >= 8:
        return [(trial, trial.psnr or 0.0) for trial in record.finished]
    alive = [t for t in record.trials if t.state != "failed" and t.curve]
    first = max((trial.curve[0][0] for trial in alive), default=0)
    at = [(trial, dict(trial.curve).get(first)) for trial in alive]
    return [(trial, psnr) for trial, psnr in at if psnr is not None and is_number(psnr)]


def _complete_study(
    trials: Iterable[tuple[TrialRecord, float]], config: SearchConfig, space: Space
) -> "optuna.Study":
    """A study in which all trials count as complete."""
    complete = [dataclasses.replace(t, state="finished", psnr=psnr) for t, psnr in trials]
    return build_study(space, complete, config.base(), cost="none", whole=True)


# ---- sections ------------------------------------------------------------------------------------


def _best(record: SearchRecord) -> str:
    best = record.best
    if best is None:
        return _section("Best", "<p>No trial has run to its end yet.</p>")
    first, against = record.trials[0], ""
    if first is best:
        against = "" if first.label else ": the paper's own point"
    elif first in record.finished:
        gain = (best.psnr or 0) - (first.psnr or 0)
        name = _text(first.label) or "the paper's point"
        against = f", {gain:+.2f} dB against {name} ({first.title})"
    label = f" · {_text(best.label)}" if best.label else ""
    known, warning = best.gain(), noise_warning(best)
    from_input = (
        f"<p>The degraded pictures have {best.input_psnr:.2f} dB: a gain of {known[0]:+.2f} dB.</p>"
        if known
        else ""
    )
    return _section(
        "Best",
        f'<p class="big">{best.title}<small> trial {best.number}{label}{against}</small></p>'
        + from_input
        + (f'<p class="warning">Warning: {_text(warning)}.</p>' if warning else "")
        + _facts((symbol(f), show(v)) for f, v in best.changes.items())
        + f"<p>Train it at full length:</p><pre>{_text(record.best_command)}</pre>"
        + (f"<p>Model registry: {_text(record.registration)}.</p>" if record.registration else ""),
    )


def _trials_table(record: SearchRecord) -> str:
    fields = list(dict.fromkeys(f for trial in record.trials for f in trial.changes))
    costs = [c for c in plots.COSTS if any(c in trial.costs for trial in record.trials)]
    units = {"multiply_adds": "10⁹ mult.-adds", "parameters": "10⁶ param.", "latency": "ms"}
    labelled = any(trial.label for trial in record.trials)
    if labelled:
        fields = [f for f in fields if not f.startswith("data.")]
    head = ["trial", "state", *(["row"] if labelled else []), *map(symbol, fields), "PSNR"]
    effective = {trial.number: effective_experts(trial) for trial in record.trials}
    experts = any(one is not None for one in effective.values())
    worth = any(trial.choice_worth is not None for trial in record.trials)
    head += ["effective experts"] if experts else []
    head += [*(["worth of the choice"] if worth else []), *(units[c] for c in costs), "samples"]
    rows = []
    for trial in _sorted(record):
        cells = [f"{trial.number}{_badges(record, trial)}", trial.state]
        cells += [_text(trial.label)] if labelled else []
        cells += [_text(show(trial.changes.get(f, ""))) for f in fields]
        cells.append(f"<b>{_db(trial.psnr)}</b>")
        cells += [_db(effective[trial.number])] if experts else []
        cells += [signed(trial.choice_worth)] if worth else []
        cells += [
            f"{trial.costs[c] * plots.COSTS[c][1]:.2f}" if c in trial.costs else "" for c in costs
        ]
        best = " best" if trial.number == record.champion else ""
        rows.append((f"{trial.state}{best}", [*cells, f"{trial.samples:,}"]))
    return _table(head, rows, words=2 if labelled else 1, sort=True)


def _tasks_table(record: SearchRecord) -> str:
    """PSNR of each task; a table of its own, so that the table of trials fits a screen."""
    tasks = list(dict.fromkeys(task for trial in record.trials for task in trial.tasks))
    rows = [
        (trial.state, [str(trial.number), *(_db(trial.tasks.get(task)) for task in tasks)])
        for trial in _sorted(record)
        if trial.tasks
    ]
    return _table(["trial", *tasks], rows, words=0, sort=True) if rows else ""


def _sorted(record: SearchRecord) -> list[TrialRecord]:
    """Finished trials first, then by PSNR."""
    order = {"finished": 0, "stopped": 1, "running": 2, "waiting": 2, "failed": 3}
    return sorted(record.trials, key=lambda t: (order[t.state], -(_number(t.psnr))))


def _badges(record: SearchRecord, trial: TrialRecord) -> str:
    names = {
        "best": trial.number == record.champion,
        "paper": trial.number == 0 and not trial.label,
        "front": record.cost != "none" and trial.number in record.front,
    }
    return "".join(
        f' <span class="badge {name}">{name}</span>' for name, there in names.items() if there
    )


def _table_note(record: SearchRecord) -> str:
    failed = "".join(
        f"<li>trial {trial.number}: {_text(trial.reason)}</li>"
        for trial in record.trials
        if trial.state == "failed"
    )
    return (f"Failed:<ul>{failed}</ul>" if failed else "") + (
        "PSNR in dB on the validation pictures, mean over tasks. A stopped trial has the PSNR of "
        "its last validation; do not compare it with trials that ran to the end. Effective "
        "experts: the exponential of the entropy of their use, mean over the libraries per pixel. "
        "Worth of the choice: PSNR less that with the same experts for all pixels, if it was "
        "evaluated. Click a heading to sort."
    )


def _fixed_list(record: SearchRecord) -> str:
    """A comparison of the rows of a fixed list."""
    if not any(trial.label for trial in record.trials):
        return ""
    if not any("data.repeats" in trial.changes for trial in record.trials):
        known = {t.label: float(t.psnr or 0) for t in record.trials if is_number(t.psnr)}
        label = f"{plots.VALIDATION_PSNR}, mean over tasks"
        plot = plots.bars(known, label, start=min(known.values())) if known else ""
        return _section("What each part adds", plot)
    rows = []
    for trial in record.trials[1:]:
        one, alone = record.trials[0].tasks.get(trial.label), trial.tasks.get(trial.label)
        difference = "" if one is None or alone is None else f"{one - alone:+.2f}"
        rows.append(("", [_text(trial.label), _db(one), _db(alone), difference]))
    return _section(
        "All in one against one per task",
        _table(["task", "all in one", "alone", "difference"], rows, words=0, first="left"),
        "PSNR in dB on the task's own pictures. All networks were trained on the same number of "
        "samples, so a network for one task saw more samples of that task.",
    )


def _plots(record: SearchRecord, config: SearchConfig, space: Space) -> list[str]:
    costs = [record.cost] if record.cost != "none" else ["multiply_adds", "parameters"]
    fronts = [plot for cost in costs if (plot := plots.cost_plot(record, cost))]
    if any("data.repeats" in trial.changes for trial in record.trials):
        fronts = []
    shown = [
        (t, t.psnr) for t in record.trials if t.state != "failed" and t.psnr and is_number(t.psnr)
    ]
    lines = ""
    if len(shown) > 1 and space.parameters:
        lines = plots.parallel(_complete_study(shown, config, space))
    return [
        _section(
            "PSNR against cost",
            f'<div class="pair">{"".join(fronts)}</div>' if fronts else "",
            "Trials that ran to the end. Dashed: the Pareto front.",
        ),
        _section("Learning curves", plots.curves(record)),
        _section(
            "Parallel coordinates",
            f'<div class="light">{lines}</div>' if lines else "",
            "Each line is a trial: the darker, the better.",
        ),
        _importance(record, config, space) if space.parameters else "",
        _usage(record, config),
    ]


def _importance(record: SearchRecord, config: SearchConfig, space: Space) -> str:
    from scipy.stats import spearmanr

    shares = importance(record, config, space)
    if not shares:
        return _section("Importance", "<p>Too few trials.</p>")
    trials = comparable_trials(record)
    scores = [psnr for _, psnr in trials]
    notes = {}
    for field, share in shares.items():
        values = [trial.changes[field] for trial, _ in trials]
        numeric = all(map(is_number, values)) and len(set(values)) > 1 and len(set(scores)) > 1
        trend = float(spearmanr(values, scores).statistic) if numeric else 0.0
        words = "more is better" if trend > 0 else "less is better"
        strong = f", {words} (rank correlation {trend:+.2f})" if abs(trend) >= 0.3 else ""
        notes[symbol(field)] = f"{share:.2f}{strong}"
    length = "at the end" if len(record.finished) >= 8 else "at their first validation"
    return _section(
        "Importance",
        plots.bars({symbol(f): v for f, v in shares.items()}, "share (PED-ANOVA)", notes=notes),
        f"From {len(trials)} trials {length}. With fewer than some dozens of trials, only large "
        "differences mean something.",
    )


def _usage(record: SearchRecord, config: SearchConfig) -> str:
    if record.best is None:
        return ""
    trials = [(f"trial {record.champion}, the best", record.best)]
    if record.champion != 0:
        first = record.trials[0]
        trials.append((f"trial 0, {first.label or 'the paper’s point'}", first))
    libraries = dict.fromkeys(
        library for _, t in trials for shares in t.routing.values() for library in shares
    )
    tables = [
        f'<h3>{_text(library)}</h3><div class="row">{"".join(_usage_of(trials, library))}</div>'
        for library in libraries
    ]
    shown = "".join(tables[:2])
    if len(tables) > 2:
        rest = "".join(tables[2:])
        more = "1 more library" if len(tables) == 3 else f"{len(tables) - 2} more libraries"
        shown += f"<details><summary>{more}</summary>{rest}</details>"
    trained_fully = record.budget >= config.train.recipe.samples
    return _section(
        "Expert usage",
        shown,
        "Share of the pixels (encoder) or pictures (decoder) that chose each expert. A row sums to "
        "K." + (" If no task uses an expert, N can be smaller." if trained_fully else ""),
    )


def _usage_of(trials: Sequence[tuple[str, TrialRecord]], library: str) -> list[str]:
    """Use of each expert of a library by each task: a table per trial that has the library."""
    found = []
    for title, trial in trials:
        rows = {task: own[library] for task, own in trial.routing.items() if library in own}
        if rows:
            experts = range(len(next(iter(rows.values()))))
            found.append(str(parts().heat(title, list(experts), rows, "task")))
    return found


def _spent(record: SearchRecord) -> str:
    full = len(record.trials) * record.budget
    saved = sum(record.budget - t.samples for t in record.trials if t.state == "stopped")
    seconds = sum(trial.seconds for trial in record.trials)
    return _facts(
        [
            ("samples trained on", f"{record.samples:,}"),
            ("the same trials at full length", f"{full:,}"),
            ("saved by early stopping", f"{saved / max(1, full):.0%}"),
            ("hours of all trials", f"{seconds / 3600:.2f}"),
            ("hours of the search", f"{record.seconds / 3600:.2f}"),
        ]
    )


def _protocol(record: SearchRecord, config: SearchConfig) -> str:
    train, limit = config.train, config.train.every.validation_pictures
    pictures = f"{limit} per degradation" if limit else "all"
    method = f"{config.algorithm}, {config.scheduler}, seed {config.search_seed}"
    if config.fixed:
        method = "a fixed list, every row trained to the end"
    return (
        f"<p>PSNR in RGB, range [0, 1], no border cut, on whole pictures of "
        f"<code>{_text(train.data.validation)}</code> ({pictures}), averaged weights, seed "
        f"{train.seed}. Noise: twice the standard error of the mean gain over these pictures. "
        f"Multiply-adds: one multiply and add counts 1, one picture of 256×256, without "
        f"activations and norms. Search: {method}.</p><p>Run or resume the same search:</p>"
        f"<pre>{_text(record.command)}</pre>"
    )


# ---- HTML ----------------------------------------------------------------------------------------


def _section(title: str, body: str | None, note: str = "") -> str:
    return str(parts().section(title, Markup(body or ""), Markup(note)))


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    return str(parts().facts(list(pairs)))


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    words: int,
    sort: bool = False,
    first: str = "right",
) -> str:
    """A table of (CSS class, cells in HTML); `words` cells after the first are aligned left."""
    left = ([0] if first == "left" else []) + list(range(1, words + 1))
    marked = [(kind, [Markup(cell) for cell in cells]) for kind, cells in rows]
    return str(parts().table(list(head), marked, left, sort))


def _number(psnr: float | None) -> float:
    return psnr if psnr is not None and is_number(psnr) else 0.0


def _db(psnr: float | None) -> str:
    return f"{psnr:.2f}" if is_number(psnr) else ""


def _text(value: Any) -> str:
    return html.escape(str(value))


if __name__ == "__main__":
    sys.exit(main())
