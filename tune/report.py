"""The report of a search: `python -m tune.report SEARCH [--out FILE.html]`.

One HTML file without external files: table, front, learning curves, parallel coordinates,
importance, expert usage, cost, and the command that trains the best trial at full length. It is
made from search.json alone, by the template `distributed/pages/templates/search.html`.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import tyro
from markupsafe import Markup

from distributed.pages.render import count, fixed, render, signed
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
    if record.space is not None:
        space = Space.from_dict(record.space)
    else:  # of an earlier version
        try:
            space = build(config.space, config.vary, config.base())
        except ValueError:  # the FILE.yaml of its ranges is gone
            space = Space()
    best = record.best
    return render(
        "search.html",
        record=record,
        config=config,
        best=best,
        against=_against(record),
        warning=best and noise_warning(best),
        values=[(symbol(f), show(v)) for f, v in best.changes.items()] if best else [],
        trials=_trials_table(record),
        tasks=_tasks_table(record),
        alone=_alone_rows(record) if "tasks" in config.space else [],
        added=_added_chart(record) if "ablation" in config.space else "",
        fronts=[] if "tasks" in config.space else _fronts(record),
        curves=plots.curves(record),
        parallel=_parallel(record, space),
        importance=_importance(record, space),
        usage=list(_usage(record).items()),
        spent=_spent(record),
    )


def importance(record: SearchRecord, space: Space) -> dict[str, float]:
    """Importance of each parameter for the PSNR by Optuna's PED-ANOVA, in [0, 1], largest first.

    Empty if there are too few trials. Trials are compared at equal length, see `comparable_trials`.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    trials = comparable_trials(record)
    if len(trials) < 5 or len(space.parameters) < 2:
        return {}
    study = _complete_study(trials, space)
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(value) for name, value in found.items()}


def effective_experts(trial: TrialRecord) -> float | None:
    """Experts that are used, mean over the per-pixel libraries; None: there are none."""
    own = [one for name, one in measures(trial.routing).items() if name in PIXEL_LIBRARIES]
    return fmean(one.effective_experts for one in own) if own else None


def comparable_trials(record: SearchRecord) -> list[tuple[TrialRecord, float]]:
    """Trials with their PSNR at the same length: at the end if 8 or more finished, else at
    the first validation that all reached."""
    if _compares_ends(record):
        return [(trial, trial.psnr or 0.0) for trial in record.finished]
    alive = [t for t in record.trials if t.state != "failed" and t.curve]
    first = max((trial.curve[0][0] for trial in alive), default=0)
    at = [(trial, dict(trial.curve).get(first)) for trial in alive]
    return [(trial, psnr) for trial, psnr in at if psnr is not None and is_number(psnr)]


def _compares_ends(record: SearchRecord) -> bool:
    return len(record.finished) >= 8


def _complete_study(trials: Iterable[tuple[TrialRecord, float]], space: Space) -> "optuna.Study":
    """A study in which all trials count as complete."""
    complete = [dataclasses.replace(t, state="finished", psnr=psnr) for t, psnr in trials]
    return build_study(space, complete, cost="none")


# ---- what the template shows ---------------------------------------------------------------------


def _against(record: SearchRecord) -> str:
    """How much better the best trial is than trial 0, as text."""
    best = record.best
    if best is None:
        return ""
    first = record.trials[0]
    if first is best:
        return "" if first.label else ": the paper's own point"
    if first not in record.finished:
        return ""
    gain, name = (best.psnr or 0) - (first.psnr or 0), first.label or "the paper's point"
    return f", {gain:+.2f} dB against {name} ({first.title})"


def _trials_table(record: SearchRecord) -> dict[str, Any]:
    """All trials: `head`, `rows`, and the numbers of the columns of words (`left`)."""
    trials = best_first(record)
    fields = dict.fromkeys(f for trial in record.trials for f in trial.changes)
    fields.pop("data.repeats", None)  # the label says it
    columns: dict[str, list[Any]] = {
        "trial": [Markup("{}{}").format(t.number, _badges(record, t)) for t in trials],
        "state": [t.state for t in trials],
        "row": [t.label for t in trials],
        **{symbol(f): [show(t.changes.get(f, "")) for t in trials] for f in fields},
        "PSNR": [Markup("<b>{}</b>").format(_db(t.psnr)) for t in trials],
        "effective experts": [_db(effective_experts(t)) for t in trials],
        "worth of the choice": [
            "" if t.choice_worth is None else signed(t.choice_worth) for t in trials
        ],
        **{
            cost.unit: [_db(t.costs[name] * cost.factor) if name in t.costs else "" for t in trials]
            for name, cost in plots.COSTS.items()
        },
        "samples": [count(t.samples) for t in trials],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    classes = [t.state + " best" * (t.number == record.champion) for t in trials]
    return {
        "head": list(shown),
        "rows": list(zip(classes, zip(*shown.values(), strict=True), strict=True)),
        "left": [n for n, name in enumerate(shown) if name in ("state", "row")],
    }


def _tasks_table(record: SearchRecord) -> dict[str, Any]:
    """PSNR of each task; a table of its own, so that the table of trials fits a screen."""
    tasks = list(dict.fromkeys(task for trial in record.trials for task in trial.tasks))
    rows = [
        (t.state, [t.number, *(_db(t.tasks.get(task)) for task in tasks)])
        for t in best_first(record)
        if t.tasks
    ]
    return {"head": ["trial", *tasks], "rows": rows}


def best_first(record: SearchRecord) -> list[TrialRecord]:
    """Finished trials first, then by PSNR."""
    order = {"finished": 0, "stopped": 1, "running": 2, "waiting": 2, "failed": 3}
    return sorted(
        record.trials, key=lambda t: (order[t.state], -(t.psnr or 0) if is_number(t.psnr) else 0)
    )


def _badges(record: SearchRecord, trial: TrialRecord) -> Markup:
    names = {
        "best": trial.number == record.champion,
        "paper": trial.number == 0 and not trial.label,
        "front": record.cost != "none" and trial.number in record.front,
    }
    badge = Markup(' <span class="badge {0}">{0}</span>')
    return Markup("").join(badge.format(name) for name, shown in names.items() if shown)


def _alone_rows(record: SearchRecord) -> list[tuple[str, list[str]]]:
    """A row per task: PSNR of the network for all tasks, of its own network, the difference."""
    rows = []
    for trial in record.trials[1:]:
        one, alone = record.trials[0].tasks.get(trial.label), trial.tasks.get(trial.label)
        difference = None if one is None or alone is None else one - alone
        rows.append(("", [trial.label, fixed(one), fixed(alone), signed(difference)]))
    return rows


def _added_chart(record: SearchRecord) -> str:
    """PSNR of each row of the ablation."""
    known = {t.label: float(t.psnr or 0) for t in record.trials if is_number(t.psnr)}
    label = f"{plots.VALIDATION_PSNR}, mean over tasks"
    return plots.bars(known, label, start=min(known.values())) if known else ""


def _fronts(record: SearchRecord) -> list[str]:
    costs = [record.cost] if record.cost != "none" else ["multiply_adds", "parameters"]
    return [plot for cost in costs if (plot := plots.cost_plot(record, cost))]


def _parallel(record: SearchRecord, space: Space) -> str:
    shown = [
        (t, t.psnr) for t in record.trials if t.state != "failed" and t.psnr and is_number(t.psnr)
    ]
    if len(shown) < 2 or not space.parameters:
        return ""
    return plots.parallel(_complete_study(shown, space))


def _importance(record: SearchRecord, space: Space) -> dict[str, Any] | None:
    """The `chart`, and on which `trials` of which length; None if nothing is searched."""
    from scipy.stats import spearmanr

    if not space.parameters:
        return None
    shares = importance(record, space)
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
    named = {symbol(f): share for f, share in shares.items()}
    return {
        "chart": plots.bars(named, "share (PED-ANOVA)", notes=notes) if shares else "",
        "trials": len(trials),
        "length": "at the end" if _compares_ends(record) else "at their first validation",
    }


def _usage(record: SearchRecord) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Library -> the best trial, and trial 0 -> task -> share of each expert."""
    if record.best is None:
        return {}
    trials = {f"trial {record.champion}, the best": record.best}
    if record.champion != 0:
        first = record.trials[0]
        trials[f"trial 0, {first.label or 'the paper’s point'}"] = first
    tables: dict[str, dict[str, dict[str, list[float]]]] = {}
    for title, trial in trials.items():
        for task, libraries in trial.routing.items():
            for library, shares in libraries.items():
                tables.setdefault(library, {}).setdefault(title, {})[task] = shares
    return tables


def _spent(record: SearchRecord) -> list[tuple[str, str]]:
    full = len(record.trials) * record.budget
    saved = sum(record.budget - t.samples for t in record.trials if t.state == "stopped")
    seconds = sum(trial.seconds for trial in record.trials)
    return [
        ("samples trained on", count(record.samples)),
        ("the same trials at full length", count(full)),
        ("saved by early stopping", f"{saved / max(1, full):.0%}"),
        ("hours of all trials", fixed(seconds / 3600)),
        ("hours of the search", fixed(record.seconds / 3600)),
    ]


def _db(value: float | None) -> str:
    """Two digits; empty if there is no finite number."""
    return fixed(value) if is_number(value) else ""


if __name__ == "__main__":
    sys.exit(main())
