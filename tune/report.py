"""The page of a search: `python -m tune.report SEARCH [--out FILE.html]`.

One HTML file without links to anywhere: table, front, learning curves, parallel coordinates,
importance, expert usage, cost, and the command that trains the best at full length. All of it is
made from search.json.
"""

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from measnet.config import from_dict
from shards.storage import open_folder, write_whole
from tune import plots
from tune.config import SearchConfig
from tune.record import FILE, Record, Row, is_number, load
from tune.space import Space, build, show, symbol


@dataclass(frozen=True)
class Arguments:
    """Write the page of a search."""

    search: tyro.conf.Positional[str]
    """Folder of the search, such as runs/demo-search."""
    out: Path | None = None
    """The file to write; default: report.html in the search's folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 after a message where there is no search."""
    given = tyro.cli(Arguments, args=argv, prog="python -m tune.report")
    folder = given.search.removesuffix(FILE).rstrip("/") or "."
    try:
        record = load(folder)
        if record is None:
            raise ValueError(f"{folder} holds no {FILE}; give the folder that tune.search named")
        record.rank()
        print(write(record, given.out or Path(folder) / "report.html"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(record: Record, path: Path) -> Path:
    """Write the page and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(*open_folder(str(path)), page(record).encode())
    return path


def page(record: Record) -> str:
    """The whole page as HTML."""
    config, space = _config(record)
    sections = [
        _heading(record),
        _best(record),
        _section("Trials", _table(record, config), _table_note(record)),
        *_fixed(record, space),
        *_plots(record, space),
        _section("Cost of the search", _spent(record, config)),
        _section("How it was measured", _protocol(record, config)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(record.name)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{_SORT}</script></body></html>\n"
    )


def importance(record: Record, config: SearchConfig, space: Space) -> dict[str, float]:
    """Share of each parameter in what makes trials good, by Optuna's PED-ANOVA; empty where too
    little is known.

    Trials are compared at equal length: at the end where enough ran to it, else at the first
    validation, which all of them reached.
    """
    import dataclasses

    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    from tune.propose import build_study

    rows = [
        dataclasses.replace(row, state="finished", psnr=psnr)
        for row, psnr in comparable_rows(record)
    ]
    if len(rows) < 5 or len(space.parameters) < 2:
        return {}
    study = build_study(space, rows, config.base(), cost="none", whole=True)
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(value) for name, value in found.items()}


def comparable_rows(record: Record) -> list[tuple[Row, float]]:
    """Trials and their PSNR at one length that all of them reached."""
    if len(record.finished) >= 8:
        return [(row, row.psnr or 0.0) for row in record.finished]
    alive = [r for r in record.rows if r.state != "failed" and r.curve]
    if not alive:
        return []
    first = max(row.curve[0][0] for row in alive)
    at = [(row, dict(row.curve).get(first)) for row in alive]
    return [(row, psnr) for row, psnr in at if psnr is not None and is_number(psnr)]


def tendency(values: Sequence[float], scores: Sequence[float]) -> float:
    """Spearman's rank correlation, in [-1, 1]; 0 where one of them does not vary."""
    import numpy as np

    def ranks(numbers: Sequence[float]) -> Any:
        array = np.asarray(numbers, dtype=float)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])

    a, b = ranks(values), ranks(scores)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _config(record: Record) -> tuple[SearchConfig, Space]:
    config = from_dict(SearchConfig, record.config)
    try:
        return config, build(config.space, config.vary, config.base())
    except ValueError:  # a FILE.yaml of ranges that has gone
        return config, Space()


# ---- parts of the page ---------------------------------------------------------------------------


def _heading(record: Record) -> str:
    states = [row.state for row in record.rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return (
        f"<header><h1>{_text(record.name)}</h1><p>{counts or 'no trials yet'}; "
        f"{record.budget:,} samples per full trial. {_LEGEND}</p></header>"
    )


def _best(record: Record) -> str:
    if record.champion is None:
        return _section("Best", "<p>No trial has run to its end yet.</p>")
    best = record.rows[record.champion]
    first = record.rows[0]
    against = ""
    if first.number != best.number and is_number(first.psnr) and first.state == "finished":
        gain = (best.psnr or 0) - (first.psnr or 0)
        against = f", {gain:+.2f} dB against {_first_name(record)} ({first.psnr:.2f} dB)"
    elif first.number == best.number and not first.label:
        against = ": the paper's own point"
    values = "".join(
        f"<div><dt>{_text(symbol(f))}</dt><dd>{_text(show(v))}</dd></div>"
        for f, v in best.changes.items()
    )
    return _section(
        "Best",
        f'<p class="big">{best.psnr:.2f} dB<small> trial {best.number}'
        f"{' · ' + _text(best.label) if best.label else ''}{against}</small></p>"
        f'<dl class="values">{values}</dl>'
        f"<p>Train it at full length:</p><pre>{_text(record.best_command)}</pre>",
    )


def _first_name(record: Record) -> str:
    return _text(record.rows[0].label) or "the paper's point"


def _table(record: Record, config: SearchConfig) -> str:
    fields = list(dict.fromkeys(f for row in record.rows for f in row.changes))
    tasks = list(dict.fromkeys(t for row in record.rows for t in row.tasks))
    labelled = any(row.label for row in record.rows)
    costs = [c for c in plots.COST_NAMES if any(c in row.costs for row in record.rows)]
    units = {"multiply_adds": "G mult-adds", "parameters": "M params", "latency": "ms"}
    if labelled:
        fields = [f for f in fields if not f.startswith("data.")]
    head = [
        "trial",
        "state",
        *(["row"] if labelled else []),
        *map(symbol, fields),
        "PSNR",
        *tasks,
        *(units[c] for c in costs),
        "samples",
    ]
    order = {"finished": 0, "stopped": 1, "running": 2, "waiting": 2, "failed": 3}
    rows = sorted(
        record.rows,
        key=lambda r: (order[r.state], -(r.psnr if is_number(r.psnr) and r.psnr else 0)),
    )
    lines = []
    for row in rows:
        values = [show(row.changes.get(f, "")) for f in fields]
        psnr = f"{row.psnr:.2f}" if is_number(row.psnr) else ""
        figures = [f"{row.tasks[t]:.2f}" if is_number(row.tasks.get(t)) else "" for t in tasks]
        prices = [
            f"{row.costs[c] * plots.COST_NAMES[c][1]:.2f}" if c in row.costs else "" for c in costs
        ]
        cells = [*values, f"<b>{psnr}</b>", *figures, *prices, f"{row.samples:,}"]
        label = [f'<td class="left">{_text(row.label)}</td>'] if labelled else []
        lines.append(
            f'<tr class="{_marks(record, row)}"><td>{row.number}{_badges(record, row)}</td>'
            + f'<td class="left" title="{_text(row.reason)}">{row.state}</td>'
            + "".join(label)
            + "".join(f"<td>{c if c.startswith('<b>') else _text(c)}</td>" for c in cells)
            + "</tr>"
        )
    words = ("state", "row")
    top = "".join(f"<th{' class=left' * (h in words)}>{_text(h)}</th>" for h in head)
    return (
        f'<div class="wide"><table class="sort"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _table_note(record: Record) -> str:
    failed = "".join(
        f"<li>trial {row.number}: {_text(row.reason)}</li>"
        for row in record.rows
        if row.state == "failed"
    )
    return (f"Failed:<ul>{failed}</ul>" if failed else "") + (
        "PSNR in dB on the validation pictures, mean over tasks; a stopped trial's is that of its "
        "last validation and not to be compared with those that ran to the end. A click on a "
        "heading sorts."
    )


def _marks(record: Record, row: Row) -> str:
    return f"{row.state} best" if row.number == record.champion else row.state


def _badges(record: Record, row: Row) -> str:
    names = []
    if row.number == record.champion:
        names.append(("best", "best"))
    if row.number == 0 and not row.label:
        names.append(("paper", "paper"))
    if record.cost != "none" and row.number in record.front:
        names.append(("front", "front"))
    return "".join(f' <span class="badge {kind}">{name}</span>' for kind, name in names)


def _fixed(record: Record, space: Space) -> list[str]:
    """What compares the rows of a fixed list."""
    if not any(row.label for row in record.rows):
        return []
    if any("data.repeats" in row.changes for row in record.rows):
        return [_section("All in one network against one per task", _single_tasks(record))]
    plot = plots.levels(record.rows)
    return [_section("What each part adds", plot)] if plot else []


def _single_tasks(record: Record) -> str:
    together = record.rows[0]
    lines = []
    for row in record.rows[1:]:
        one, alone = together.tasks.get(row.label), row.tasks.get(row.label)
        cells = [f"{v:.2f}" if is_number(v) else "" for v in (one, alone)]
        both = one is not None and alone is not None
        cells.append(f"{one - alone:+.2f}" if both and one and alone else "")
        lines.append(
            f'<tr><td class="left">{_text(row.label)}</td>'
            + "".join(f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
    return (
        "<table><thead><tr><th class=left>task</th><th>all in one</th><th>alone</th>"
        "<th>difference</th></tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table>"
        "<p>PSNR in dB on the task's own pictures. Each network was trained on the same number of "
        "samples, so a network for one task saw more of that task.</p>"
    )


def _plots(record: Record, space: Space) -> list[str]:
    config = from_dict(SearchConfig, record.config)
    found = []
    costs = [record.cost] if record.cost != "none" else ["multiply_adds", "parameters"]
    fronts = [plot for cost in costs if (plot := plots.front(record, cost))]
    if fronts and not any("data.repeats" in row.changes for row in record.rows):
        found.append(
            _section(
                "PSNR against cost",
                f'<div class="pair">{"".join(fronts)}</div>',
                "Trials that ran to the end; dashed: what no other trial beats in both.",
            )
        )
    if curves := plots.curves(record):
        found.append(
            _section(
                "Learning curves",
                curves,
                "A grey cross: stopped by the search; a red one: failed.",
            )
        )
    logs = {p.field: p.log for p in space.parameters}
    if lines := plots.parallel(record, logs):
        found.append(_section("Parallel coordinates", lines, "Each line is a trial."))
    if space.parameters:
        found.append(_importance(record, config, space))
    found.append(_usage(record))
    return found


def _importance(record: Record, config: SearchConfig, space: Space) -> str:
    shares = importance(record, config, space)
    if not shares:
        return _section("Importance", "<p>Too few trials to tell.</p>")
    rows = comparable_rows(record)
    scores = [psnr for _, psnr in rows]
    notes = {}
    for field, share in shares.items():
        values = [row.changes[field] for row, _ in rows]
        trend = tendency(values, scores) if all(map(is_number, values)) else 0.0
        words = "more is better" if trend > 0 else "less is better"
        strong = f", {words} (rank correlation {trend:+.2f})" if abs(trend) >= 0.3 else ""
        notes[symbol(field)] = f"{share:.2f}{strong}"
    length = "at the end" if len(record.finished) >= 8 else "at their first validation"
    return _section(
        "Importance",
        plots.bars({symbol(f): v for f, v in shares.items()}, "share (PED-ANOVA)", notes=notes),
        f"From {len(rows)} trials {length}; with fewer than some dozens only large differences "
        "mean something.",
    )


def _usage(record: Record) -> str:
    if record.champion is None:
        return ""
    rows = [(f"trial {record.champion}, the best", record.rows[record.champion])]
    if record.champion != 0:
        name = record.rows[0].label or "the paper's point"
        rows.append((f"trial 0, {name}", record.rows[0]))
    libraries = list(
        dict.fromkeys(
            library for _, row in rows for shares in row.routing.values() for library in shares
        )
    )
    parts = [
        f"<h3>{_text(library)}</h3>{plot}"
        for library in libraries
        if (plot := plots.usage(rows, library))
    ]
    if not parts:
        return ""
    shown = "".join(parts[:2]) + (
        f"<details><summary>{len(parts) - 2} more libraries</summary>{''.join(parts[2:])}</details>"
        if len(parts) > 2
        else ""
    )
    return _section(
        "Expert usage",
        shown,
        "Share of the pixels (encoder) or pictures (decoder) that chose each expert; a row sums to "
        "K. An expert that no task uses is one too many.",
    )


def _spent(record: Record, config: SearchConfig) -> str:
    full = len(record.rows) * record.budget
    seconds = sum(row.seconds for row in record.rows)
    unused = sum(record.budget - row.samples for row in record.rows if row.state == "stopped")
    facts = [
        ("samples trained on", f"{record.samples:,}"),
        ("the same trials at full length", f"{full:,}"),
        ("saved by stopping early", f"{unused / max(1, full):.0%}"),
        ("hours of trials", f"{seconds / 3600:.2f}"),
        ("hours of the search", f"{record.seconds / 3600:.2f}"),
    ]
    cells = "".join(f"<div><dt>{_text(n)}</dt><dd>{_text(v)}</dd></div>" for n, v in facts)
    return f'<dl class="values">{cells}</dl>'


def _protocol(record: Record, config: SearchConfig) -> str:
    train = config.train
    limit = train.every.validation_pictures
    pictures = f"{limit} per degradation" if limit else "all"
    method = f"{config.algorithm}, {config.scheduler}, seed {config.search_seed}"
    if config.fixed:
        method = "a fixed list, every row trained to the end"
    return (
        f"<p>PSNR in RGB, range [0, 1], no border cut, on whole pictures of "
        f"<code>{_text(train.data.validation)}</code> ({pictures}), averaged weights, seed "
        f"{train.seed}. Multiply-adds: one multiply and add counts 1, one picture of 256×256, "
        f"without activations and norms. Search: {method}.</p>"
        f"<p>The same search again, or on with it:</p>"
        f"<pre>{_text(record.command)}</pre>"
    )


def _section(title: str, body: str | None, note: str = "") -> str:
    if not body:
        return ""
    small = f'<div class="note">{note}</div>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{body}{small}</section>"


def _text(value: object) -> str:
    return html.escape(str(value))


_LEGEND = (
    f'<span class="key" style="background:{plots.BEST}"></span>best '
    f'<span class="key" style="background:{plots.PAPER}"></span>trial 0 '
    f'<span class="key" style="background:{plots.FINISHED}"></span>finished '
    f'<span class="key" style="background:{plots.STOPPED}"></span>stopped'
)

_STYLE = """
:root { color: #22303c; background: #f4f6f8; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
body { margin: 0; } main { max-width: 1060px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 13px; margin: 12px 0 2px; color: #5f7285; }
header p { margin: 4px 0 18px; color: #5f7285; }
section { background: #fff; border: 1px solid #e1e6ea; border-radius: 8px; padding: 16px 20px;
  margin: 0 0 16px; }
.big { font-size: 30px; font-weight: 650; margin: 0 0 6px; }
.big small { font-size: 15px; font-weight: 400; color: #5f7285; }
.values { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 0 8px; }
.values dt { font-size: 12px; color: #5f7285; } .values dd { margin: 0; font-weight: 600; }
pre { background: #f4f6f8; padding: 10px 12px; border-radius: 6px; overflow-x: auto; margin: 4px 0;
  font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #edf0f3;
  white-space: nowrap; }
td.left, th.left { text-align: left; }
th { color: #5f7285; font-weight: 600; } table.sort th { cursor: pointer; }
tr.best td { background: #e8f1fb; } tr.stopped td, tr.waiting td { color: #7c8a97; }
tr.failed td { color: #b23b3b; }
.badge { font-size: 11px; color: #fff; border-radius: 4px; padding: 0 5px; }
.badge.best { background: #1565c0; } .badge.paper { background: #e07b00; }
.badge.front { background: #5f7285; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 4px 0 10px; }
.note { color: #5f7285; font-size: 13px; margin: 8px 0 0; }
svg { max-width: 100%; height: auto; } .pair { display: flex; flex-wrap: wrap; gap: 8px; }
.pair svg { flex: 0 1 480px; min-width: 0; } ul { margin: 4px 0; }
summary { cursor: pointer; color: #1565c0; }
"""

_SORT = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((th, at) => {
    let up = false;
    th.addEventListener("click", () => {
      up = !up;
      const rows = [...table.tBodies[0].rows];
      const value = (r) => { const t = r.cells[at].textContent.replace(/,/g, "");
        const n = parseFloat(t); return isNaN(n) ? t : n; };
      rows.sort((a, b) => { const x = value(a), y = value(b);
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
      rows.forEach((r) => table.tBodies[0].append(r));
    });
  });
}
"""

if __name__ == "__main__":
    sys.exit(main())
