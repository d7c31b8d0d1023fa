"""Results beside the paper's and the field's, as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distributed.published import TABLES, Row, Table
from distributed.scores import EvaluationReport


def write(name: str, reports: Sequence[EvaluationReport], folder: Path) -> list[Path]:
    """Write tables.md and tables.tex; returns their paths.

    Args:
        name: of our row.
        reports: of all evaluated sets. If two hold the same degradation, the first counts.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {"tables.md": markdown(name, reports), "tables.tex": latex(name, reports)}
    for file, text in made.items():
        (folder / file).write_text(text)
    return [folder / file for file in made]


def markdown(name: str, reports: Sequence[EvaluationReport]) -> str:
    """A table of our figures, then each published one that shares a column with them."""
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
    for table, cells in _comparable(reports):
        headings = ["method", "parameters", *table.columns.values(), "average"]
        rule = "|---|---|" + "---:|" * (len(headings) - 2)
        lines += [f"### {table.title}", "", _row(headings), rule]
        lines += [_row(_published(other)) for other in table.rows]
        lines += [_row([f"**{name}**", "", *(f"**{cell}**" for cell in cells)]), ""]
        lines += [f"Others: {table.source}. {_reading(reports, table)}", ""]
    return "\n".join(lines)


def latex(name: str, reports: Sequence[EvaluationReport]) -> str:
    """The published tables that share a column with our figures, each a `tabular`."""
    parts = []
    for table, cells in _comparable(reports):
        headings = ["method", "parameters", *map(_escaped, table.columns.values()), "average"]
        rows = [_published(row) for row in table.rows]
        rows.append([_escaped(name), "", *map(_escaped, cells)])
        body = [" & ".join(cells) + r" \\" for cells in rows]
        parts += [
            f"% {table.title}. {_reading(reports, table)}",
            r"\begin{tabular}{ll" + "r" * (len(headings) - 2) + "}",
            " & ".join(headings) + r" \\ \hline",
            *body[:-1],
            r"\hline",
            body[-1],
            r"\end{tabular}",
            "",
        ]
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _published(row: Row) -> list[str]:
    return [row.method, row.parameters, *(f"{psnr:.2f}" for psnr in (*row.psnr, row.average))]


def _comparable(reports: Sequence[EvaluationReport]) -> list[tuple[Table, list[str]]]:
    """Published tables, with our cells: PSNR, or a dash where the degradation was not evaluated."""
    own = _psnr(reports)
    found = []
    for table in TABLES:
        values = [own.get(name) for name in table.columns]
        known = [value for value in values if value is not None]
        if known:
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
            average = f"{sum(known) / len(known):.2f}" if len(known) == len(values) else "–"
            found.append((table, [*cells, average]))
    return found


def _psnr(reports: Sequence[EvaluationReport]) -> Mapping[str, float]:
    own: dict[str, float] = {}
    for report in reports:
        for name, row in report.degradations.items():
            own.setdefault(name, row.restored_psnr)
    return own


def _reading(reports: Sequence[EvaluationReport], table: Table) -> str:
    """Which of our columns are of a part of a benchmark."""
    parts = []
    for report in reports:
        for name in report.degradations:
            held = report.held.get(name)
            restored = report.degradations[name].pictures
            if name in table.columns and held and restored < (held.benchmark or restored):
                parts.append(f"{table.columns[name]} {restored:,} of {held.benchmark:,} pictures")
    if not parts:
        return "Ours: all pictures that the sets hold."
    return f"Ours is of a sample, not comparable with whole benchmarks: {', '.join(parts)}."


def _escaped(text: str) -> str:
    text = text.replace("σ", r"$\sigma$").replace("–", "--")
    for sign in "_%&#":
        text = text.replace(sign, "\\" + sign)
    return text
