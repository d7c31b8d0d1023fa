"""Results beside the paper's and the field's, as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distributed.published import CBSD68, LEADERBOARD, SINGLE_TASKS, TABLES, Table
from distributed.scores import EvaluationReport, Summary

_LEADERBOARD = (
    f"The source `{LEADERBOARD}` is that of Harbinzzy/All-in-One-Image-Restoration-Survey, "
    "2026-06-28; others are tables in the methods' own repositories."
)


class Sheet(NamedTuple):
    """A table that is ready to print."""

    title: str
    headings: list[str]
    """The first is left-aligned, as are those named parameters and source."""
    others: list[list[str]]
    own: list[str]
    notes: list[str]


def write(name: str, reports: Sequence[EvaluationReport], folder: Path) -> list[Path]:
    """Write tables.md and tables.tex; returns their paths.

    Args:
        name: of our row.
        reports: of all evaluated sets. If two hold the same degradation, the first counts in the
            tables of several tasks.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {"tables.md": markdown(name, reports), "tables.tex": latex(name, reports)}
    for file, text in made.items():
        (folder / file).write_text(text)
    return [folder / file for file in made]


def markdown(name: str, reports: Sequence[EvaluationReport]) -> str:
    """A table of our figures, then each of the paper's that shares a column with them."""
    lines = [
        "| task | set | pictures | input | restored | gain | SSIM |",
        "|---|---|---|" + "---:|" * 4,
    ]
    for report in reports:
        for degradation, row in report.degradations.items():
            gain = row.restored_psnr - row.input_psnr
            psnr = (row.input_psnr, row.restored_psnr)
            cells = [*(f"{one:.2f}" for one in psnr), f"{gain:+.2f}", f"{row.restored_ssim:.4f}"]
            about = [degradation, Path(report.data).name, report.count(degradation)]
            lines.append(_row([*about, *cells]))
    lines += ["", f"PSNR in dB; {reports[0].protocol.describe()}.", ""]
    for sheet in sheets(name, reports):
        rule = "|" + "".join("---|" if _is_text(name) else "---:|" for name in sheet.headings)
        lines += [f"### {sheet.title}", "", _row(sheet.headings), rule]
        lines += [_row(other) for other in sheet.others]
        lines += [_row([f"**{cell}**" if cell else "" for cell in sheet.own]), ""]
        lines += [" ".join(sheet.notes), ""]
    return "\n".join(lines)


def latex(name: str, reports: Sequence[EvaluationReport]) -> str:
    """The paper's tables that share a column with our figures, each a `tabular`."""
    parts = []
    for sheet in sheets(name, reports):
        columns = "".join("l" if _is_text(name) else "r" for name in sheet.headings)
        rows = [sheet.headings, *sheet.others, sheet.own]
        head, *body = [" & ".join(map(_escaped, cells)) + r" \\" for cells in rows]
        parts += [f"% {text}" for text in (f"{sheet.title}.", *sheet.notes)]
        parts += [
            rf"\begin{{tabular}}{{{columns}}}",
            rf"{head} \hline",
            *body[:-1],
            r"\hline",
            body[-1],
            r"\end{tabular}",
            "",
        ]
    return "\n".join(parts)


def sheets(name: str, reports: Sequence[EvaluationReport]) -> list[Sheet]:
    """The paper's tables, with our figures in each that shares a column with them."""
    own: dict[str, Summary] = {}
    for report in reports:
        for degradation, summary in report.degradations.items():
            own.setdefault(degradation, summary)
    found = [
        _several_tasks(name, table, own, reports)
        for table in TABLES
        if own.keys() & table.columns.keys()
    ]
    for report in reports:
        for task, table in SINGLE_TASKS.items():
            if task in report.tasks:
                found.append(_one_task(name, task, table, report))
    return found


def _several_tasks(
    name: str, table: Table, own: Mapping[str, Summary], reports: Sequence[EvaluationReport]
) -> Sheet:
    values = [own[column].restored_psnr if column in own else None for column in table.columns]
    known = [value for value in values if value is not None]
    average = sum(known) / len(known) if len(known) == len(values) else None
    others = [
        [
            *(row.method, row.parameters),
            *(_cell(psnr) for psnr in row.psnr or [None] * len(values)),
            *(_cell(row.average), row.source),
        ]
        for row in table.rows
    ]
    return Sheet(
        title=table.title,
        headings=["method", "parameters", *table.columns.values(), "average", "source"],
        others=others,
        own=[name, "", *map(_cell, values), _cell(average), ""],
        notes=[_LEADERBOARD, _reading(reports, table.columns)],
    )


def _one_task(name: str, task: str, table: Table, report: EvaluationReport) -> Sheet:
    """One task on one set: before and after, PSNR and SSIM."""
    place = Path(report.data).name
    rows = [report.degradations.get(column) for column in table.columns]
    others: list[list[str]] = [["input", *(_pair(row, "input") for row in rows), ""]]
    if task == "denoise" and place.startswith("cbsd68"):
        others += [[row.method, *map(_cell, row.psnr), row.source] for row in CBSD68]
    return Sheet(
        title=f"{table.title}, {place}",
        headings=["method", *table.columns.values(), "source"],
        others=others,
        own=[name, *(_pair(row, "restored") for row in rows), ""],
        notes=[
            "PSNR in dB / SSIM. The paper's own figures for single tasks are not included.",
            _reading([report], {name: name for name in table.columns}),
        ],
    )


def _pair(row: Summary | None, side: str) -> str:
    if row is None:
        return "–"
    return f"{getattr(row, side + '_psnr'):.2f} / {getattr(row, side + '_ssim'):.4f}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_text(heading: str) -> bool:
    return heading in ("method", "parameters", "source")


def _reading(reports: Sequence[EvaluationReport], columns: Mapping[str, str]) -> str:
    """Which of our columns (degradation -> name) are of a part of a benchmark."""
    parts = []
    for report in reports:
        for name in report.degradations:
            held = report.held.get(name)
            restored = report.degradations[name].pictures
            if name in columns and held and restored < (held.benchmark or restored):
                parts.append(f"{columns[name]} {restored:,} of {held.benchmark:,} pictures")
    if not parts:
        return "Ours: all pictures that the sets hold."
    return f"Ours is of a sample, not comparable with whole benchmarks: {', '.join(parts)}."


def _escaped(text: str) -> str:
    text = text.replace("σ", r"$\sigma$").replace("–", "--")
    for sign in "_%&#":
        text = text.replace(sign, "\\" + sign)
    return text
