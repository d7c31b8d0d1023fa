"""The results in results/: evaluates weights on test sets, and writes results/README.md.

    python bench/results.py WEIGHTS SET [SET ...]    # evaluates, adds to results/, writes README.md
    python bench/results.py WEIGHTS SET --compare cbm3d histogram    # beside classical methods
    python bench/results.py --search runs/NAME       # adds a finished `python -m tune.search`
    python bench/results.py                          # writes README.md from what results/ holds

SET is as for `python -m distributed.evaluate`: packed shards, or LAYOUT=FOLDER for the raw pictures
of a benchmark. No figure of README.md is typed.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "results"
TITLES = {
    "network": "Networks",
    "recipe": "Recipes",
    "routing": "Choice of experts",
    "task": "One network for each task",
}
"""Folders of `bench/compare.py` -> their headings."""
PAPER = "lambda-1e-4"
"""The ways to choose experts are compared with this one."""
KEPT = ("protocol", "held", "degradations", "arithmetic")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate weights, and write results/README.md."""

    weights: tyro.conf.Positional[str] = ""
    """A run, a weights file, or `small`."""
    sets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Packed shards, or LAYOUT=FOLDER."""
    compare: tuple[str, ...] = ()
    """Classical methods on the same pictures, as for `python -m distributed.evaluate`."""
    search: Path | None = None
    """Folder of a search, whose trials are added."""


def main() -> int:
    """Exit code."""
    given = tyro.cli(Arguments, prog="python bench/results.py")
    if bool(given.weights) != bool(given.sets):
        print("error: give WEIGHTS and at least one SET, or neither", file=sys.stderr)
        return 2
    for one in given.sets:
        code = evaluate(given.weights, one, given.compare)
        if code:
            return code
    if given.search:
        try:
            add_search(given.search)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    text = "\n".join(page())
    (RESULTS / "README.md").write_text(text + "\n")
    print(f"written: {RESULTS / 'README.md'}")
    return 0


def evaluate(weights: str, one: str, methods: Sequence[str] = ()) -> int:
    """Run the evaluation, and keep its figures in results/WEIGHTS/SET.json.

    With classical `methods` in results/methods/SET.json.
    """
    from distributed.sources import parse

    name = "methods" if methods else Path(weights).stem
    target = RESULTS / name / f"{parse(one).name}.json"
    with tempfile.TemporaryDirectory() as folder:
        start = origin()
        command = ["-m", "distributed.evaluate", weights, one, "--out", folder]
        command += [part for method in methods for part in ("--compare", method)]
        began = time.monotonic()
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            return code
        report = json.loads(Path(folder, "summary.json").read_text())
        compared = {}
        if methods:
            compared = json.loads(Path(folder, "compare.json").read_text())
    wanted = " --compare " + " ".join(methods) if methods else ""
    record = {
        **start,
        "command": f"python bench/results.py {weights} {shlex.quote(_without_folder(one))}{wanted}",
        "seconds": round(time.monotonic() - began),
        **{key: report[key] for key in KEPT},
    }
    if compared:
        record["about"] = compared["about"]
        record["methods"] = {n: one["degradations"] for n, one in compared["methods"].items()}
    keep(record, target)
    return 0


def add_search(folder: Path) -> None:
    """Keep the trials of a search in results/search/NAME.json, the best first.

    Raises:
        ValueError: the folder holds no search, or one that cannot be read.
    """
    from tune.record import FILE, load
    from tune.report import best_first, effective_experts
    from tune.results import refresh
    from tune.space import symbol

    found = load(str(folder))
    if found is None:
        raise ValueError(f"--search {folder} holds no {FILE}; give the folder of a search")
    for trial in found.trials:
        refresh(trial)  # reads what the choice was worth, if it was measured since
    trials = []
    for trial in best_first(found):
        gain = trial.gain()
        trials.append(
            {
                "number": trial.number,
                "label": trial.label or ("paper" if trial.number == 0 else ""),
                "state": trial.state,
                "values": {symbol(field): value for field, value in trial.changes.items()},
                "samples": trial.samples,
                "seconds": round(trial.seconds),
                "psnr": trial.psnr,
                "gain": None if gain is None else gain[0],
                "gain_error": trial.gain_error,
                "effective_experts": effective_experts(trial),
                "worth": trial.choice_worth,
            }
        )
    record = {
        **origin(),
        "command": found.command,
        "seconds": round(found.seconds),
        "budget": found.budget,
        "trials": trials,
    }
    keep(record, RESULTS / "search" / f"{found.name}.json")


def keep(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _without_folder(one: str) -> str:
    """`cbsd68=/somewhere/CBSD68` -> `cbsd68=CBSD68`: a record names no folder of a machine."""
    layout, separator, folder = one.rpartition("=")
    return f"{layout}{separator}{Path(folder).name}"


def origin() -> dict[str, Any]:
    """Date, commit and machine of a record."""
    from distributed.environment import processor
    from measnet.hardware import this_machine

    cards = [card.name for card in this_machine().cards]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": ", ".join(cards) or processor(),
    }


def commit() -> str:
    """The commit of the running code, with `-dirty` if files were changed since."""
    from distributed.environment import code_version

    version = code_version()
    changed = "-dirty" if version.get("measnet.code_changed") == "true" else ""
    return version.get("mlflow.source.git.commit", "unknown")[:7] + changed


def page() -> Iterator[str]:
    """The lines of results/README.md."""
    yield from (
        "# Results",
        "",
        "Written by `python bench/results.py` from the records beside it; no figure in a table is "
        "typed. PSNR is in dB. *Pictures* says how many of the set there were.",
    )
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        records = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        if folder.name == "speedrun":
            yield from _speed_runs(records)
        elif folder.name == "methods":
            yield from _methods(records)
        elif folder.name == "search":
            yield from _searches(records)
        elif folder.name in TITLES:
            yield from _compared(folder.name, records)
        elif records:
            yield from _weights(folder.name, records)


def _about(folder: str) -> Iterator[str]:
    """The text of results/FOLDER/about.md, which stands above the table."""
    path = RESULTS / folder / "about.md"
    if path.is_file():
        yield from (path.read_text().rstrip(), "")


def _weights(name: str, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", f"## `{name}`", "")
    yield from _about(name)
    yield "| set | degradation | pictures | PSNR before | PSNR after | gain | SSIM after |"
    yield "|---|---|---|---|---|---|---|"
    for dataset, record in records.items():
        for degradation, row in record["degradations"].items():
            held = record["held"][degradation]
            of = f" of {held['benchmark']}" if held["benchmark"] else ""
            gain = row["restored_psnr"] - row["input_psnr"]
            yield _row(
                dataset,
                degradation,
                f"{row['pictures']}{of}",
                f"{row['input_psnr']:.2f}",
                f"{row['restored_psnr']:.2f}",
                f"{gain:+.2f}",
                f"{row['restored_ssim']:.3f}",
            )
    yield ""
    for dataset, record in records.items():
        yield (
            f"* {dataset}: `{record['command']}`, {record['seconds']} s on {record['machine']}, "
            f"{record['date']}, commit {record['commit']}"
        )
    protocols = {record["protocol"]["description"] for record in records.values()}
    yield from ("", *(f"Protocol: {one}." for one in sorted(protocols)))


def _methods(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Weights beside classical methods, on the same pictures."""
    yield from ("", "## Classical methods", "")
    yield from _about("methods")
    yield _row("set", "degradation", "pictures", "PSNR before", "method", "PSNR after")
    yield "|---" * 6 + "|"
    for dataset, record in records.items():
        for degradation, row in record["degradations"].items():
            before = f"{row['input_psnr']:.2f}"
            for method, psnr in record["methods"].items():
                after = f"{psnr[degradation]:.2f}"
                yield _row(dataset, degradation, row["pictures"], before, method, after)
    yield ""
    for line in dict.fromkeys(line for record in records.values() for line in record["about"]):
        yield f"* {line}"
    for dataset, record in records.items():
        yield (
            f"* {dataset}: `{record['command']}`, {record['seconds']} s on {record['machine']}, "
            f"{record['date']}, commit {record['commit']}"
        )


def _searches(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The trials of each search, the best first; those that were stopped come last."""
    from tune.space import show

    yield from ("", "## Search", "")
    yield from _about("search")
    for record in records.values():
        fields = list(dict.fromkeys(name for one in record["trials"] for name in one["values"]))
        after = ("samples", "PSNR", "gain", "standard error", "effective experts", "worth")
        header = ("trial", *fields, *after)
        yield from (_row(*header), "|---" * len(header) + "|")
        for one in record["trials"]:
            yield _row(
                f"{one['number']}" + (f" ({one['label']})" if one["label"] else ""),
                *(show(one["values"].get(name, "")) for name in fields),
                f"{one['samples']:,}",
                _figure(one["psnr"], ".2f"),
                _figure(one["gain"], "+.2f"),
                _figure(one["gain_error"], ".2f"),
                _figure(one["effective_experts"], ".2f"),
                _figure(one["worth"], "+.2f"),
            )
        minutes = f"{record['seconds'] / 60:.0f} minutes on {record['machine']}"
        yield from (
            "",
            f"`{record['command']}`, {minutes}, {record['date']}, commit {record['commit']}",
        )


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _speed_runs(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", "## Speed run", "", "Minutes from nothing to a PSNR on CBSD68, sigma 25;")
    yield "[docs/speedrun.md](../docs/speedrun.md) has the rules."
    marks: Sequence[str] = list(next(iter(records.values()), {}).get("seconds_to", {}))
    after = ("whole run", "PSNR", "samples", "pictures", "machine", "commit")
    header = ("date", *(f"{mark} dB" for mark in marks), *after)
    yield from ("", _row(*header), "|---" * len(header) + "|")
    for record in records.values():
        machine = record["machine"]
        yield _row(
            record["date"],
            *(_minutes(record["seconds_to"][mark]) for mark in marks),
            _minutes(record["seconds"]),
            f"{record['psnr']:.2f}",
            f"{record['samples']:,}",
            record["pictures"],
            f"{machine['cores']} cores, {machine['processor']}",
            record["commit"],
        )
    draw_speed_runs(records, RESULTS / "speedrun" / "curves.png")
    yield from ("", "![PSNR over the minutes of training](speedrun/curves.png)", "")
    for record in records.values():
        yield f"* {record['date']}: `{record['command'].strip()}`, {record['workers']} workers"


def draw_speed_runs(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """PSNR over the minutes of training, a line per record, with the marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, record in records.items():
        minutes = [point["seconds"] / 60 for point in record["curve"]]
        axes.plot(minutes, [point["psnr"] for point in record["curve"]], "o-", label=name)
        for mark in record["seconds_to"]:
            axes.axhline(float(mark), color="0.7", linewidth=0.8, zorder=0)
            axes.annotate(f"{mark} dB", (0, float(mark)), va="bottom", color="0.4", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("PSNR in dB, CBSD68, sigma 25")
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Software": None})


def _compared(what: str, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A row per recipe or network, over its seeds.

    Only what was trained and tested alike is compared.
    """
    if not records:
        return
    yield from ("", f"## {TITLES[what]}", "")
    yield from _about(what)
    groups: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records.values():
        same = (record["samples"], record["crop"], *sorted(record["pictures"].items()))
        groups.setdefault(same, {}).setdefault(record["name"], []).append(record)
    for (samples, crop, *pictures), rows in groups.items():
        tested = ", ".join(f"{name} {count}" for name, count in pictures)
        degradations = [name for name, _ in pictures]
        yield (
            f"{samples:,} samples of crops of {crop}; gain over the degraded picture, in dB, on "
            f"pictures of {tested}:"
        )
        yield ""
        yield _row(what, "seeds", *degradations, "mean PSNR", "least - most")
        yield "|---" * (len(degradations) + 4) + "|"
        for name, runs in sorted(rows.items(), key=lambda row: fmean(_means(row[1]))):
            means = _means(runs)
            gains = (fmean(run["gain"][one] for run in runs) for one in degradations)
            spread = f"{min(means):.2f} - {max(means):.2f}"
            seeds = ", ".join(str(run["seed"]) for run in runs)
            yield _row(
                name, seeds, *(f"{gain:+.2f}" for gain in gains), f"{fmean(means):.2f}", spread
            )
        yield ""
        if what == "routing":
            yield from _choices(rows)
    origins = dict.fromkeys(
        f"{one['date']}, {one['machine']}, commit {one['commit']}" for one in records.values()
    )
    names = " ".join(dict.fromkeys(one["name"] for one in records.values()))
    seeds = " ".join(map(str, sorted({one["seed"] for one in records.values()})))
    command = f"python bench/compare.py {what} --train SHARDS --test SHARDS"
    yield f"`{command} --names {names} --seeds {seeds}`, {'; '.join(origins)}"


def _choices(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """How the experts are used, and what the choice is worth; all seeds, and their mean."""
    libraries = list(next(iter(rows.values()))[0]["effective_experts"])
    pixel = [one for one in libraries if one.startswith("encoder")]
    picture = [one for one in libraries if one not in pixel]
    yield (
        "Effective experts and information of task and choice (nat): means of the seeds. Worth of "
        "the choice per pixel, less `fixed`, in dB, seed by seed. *Better by*: mean PSNR less that "
        f"of `{PAPER}` with the same seed, seed by seed, and the mean with its standard error:"
    )
    yield ""
    kinds = ("per pixel", "per picture")
    measured = (f"{name}, {kind}" for name in ("experts", "information") for kind in kinds)
    yield _row("routing", *measured, "worth", "mean worth", "better by", "mean")
    yield "|---" * 9 + "|"
    paper = {run["seed"]: run["mean_psnr"] for run in rows.get(PAPER, ())}
    for name, runs in sorted(rows.items(), key=lambda row: fmean(_means(row[1]))):
        worth = [run["worth"]["mean"] for run in runs]
        better = [
            run["mean_psnr"] - paper[run["seed"]]
            for run in runs
            if run["seed"] in paper and name != PAPER
        ]
        yield _row(
            name,
            *(
                f"{fmean(run[measure][one] for run in runs for one in kind):.2f}"
                for measure in ("effective_experts", "information")
                for kind in (pixel, picture)
            ),
            ", ".join(f"{one:+.2f}" for one in worth),
            f"{fmean(worth):+.2f}",
            ", ".join(f"{one:+.2f}" for one in better) or "–",
            _with_error(better) or "–",
        )
    yield ""


def _with_error(values: Sequence[float]) -> str:
    """Mean ± standard error; the mean alone if there is one value."""
    if len(values) < 2:
        return "".join(f"{one:+.2f}" for one in values)
    return f"{fmean(values):+.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def _means(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [run["mean_psnr"] for run in runs]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _minutes(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    raise SystemExit(main())
