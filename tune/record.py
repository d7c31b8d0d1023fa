"""`search.json`: all that is known about a search, written whole after each event.

Optuna's and Ray's own states are not kept: what comes next follows from this record alone. So a
search that was killed goes on from here, and the report is made from here.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.storage import open_folder, read_json, write_json
from tune.space import Changes

FILE = "search.json"
VERSION = 1

State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")


@dataclass
class Row:
    """One trial."""

    number: int
    """Counts from 0; 0 is the paper's point."""
    name: str
    """Of its folder below `trials/`, and of its run in MLflow."""
    changes: Changes
    """Dotted field -> value."""
    label: str = ""
    """Row of a fixed list, such as `full` of the ablation."""
    state: State = "waiting"
    reason: str = ""
    """Why it was stopped or failed, in one line."""
    samples: int = 0
    """Samples it was trained on when it was last heard of."""
    psnr: float | None = None
    """Validation PSNR in dB, mean over tasks, at `samples`."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Task -> validation PSNR in dB at its end."""
    costs: dict[str, float] = field(default_factory=dict)
    """`parameters`, `multiply_adds` (256x256), and `latency` in ms where it was asked for."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(samples, PSNR) of each validation."""
    inherited: list[dict[str, Any]] = field(default_factory=list)
    """PBT: at how many samples it took over whose weights, and its values from there on."""
    routing: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Task -> expert library -> mean share per expert, at its end."""
    seconds: float = 0.0
    """Time that its launches took."""
    folder: str = ""
    mlflow_run_id: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ENDED

    def validated(self, samples: int, psnr: float) -> bool:
        """Take a validation; False where it was known already."""
        if self.curve and samples <= self.curve[-1][0]:
            return False
        self.curve.append((samples, psnr))
        self.samples, self.psnr = samples, psnr
        return True


@dataclass
class Record:
    """The search and its trials."""

    name: str
    config: dict[str, Any]
    """`tune.config.SearchConfig` as plain data."""
    command: str
    """The command that goes on with it."""
    budget: int
    """Samples of a trial that runs to its end."""
    cost: str
    """The second objective, or `none`."""
    rows: list[Row] = field(default_factory=list)
    state: Literal["running", "finished", "stopped"] = "running"
    front: list[int] = field(default_factory=list)
    """Numbers of the finished trials that no other beats in PSNR and cost, cheapest first."""
    champion: int | None = None
    """Number of the finished trial with the best PSNR."""
    best_command: str = ""
    """Trains the champion at full length."""
    pruned: list[str] = field(default_factory=list)
    """Names of trials whose checkpoints were deleted."""
    seconds: float = 0.0
    """Time of all launches of the search."""
    mlflow_run_id: str = ""
    tracking_uri: str = ""
    folder: str = ""
    version: int = VERSION
    written: float = 0.0

    def row(self, name: str) -> Row:
        """The trial of this name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def finished(self) -> list[Row]:
        """Trials that ran to the end and have a figure."""
        return [r for r in self.rows if r.state == "finished" and is_number(r.psnr)]

    @property
    def samples(self) -> int:
        """Samples that all trials were trained on."""
        return sum(row.samples for row in self.rows)

    def rank(self) -> None:
        """Work out the front and the champion from the trials that ran to the end."""
        self.front = [row.number for row in front(self.finished, self.cost)]
        best = max(self.finished, key=lambda r: (r.psnr or 0.0, -r.number), default=None)
        self.champion = None if best is None else best.number

    def best(self, count: int) -> list[Row]:
        """The champion, the front, and the next best finished trials, up to `count` or the
        front."""
        ordered = sorted(self.finished, key=lambda r: -(r.psnr or 0.0))
        chosen = [r for r in ordered if r.number in self.front]
        chosen += [r for r in ordered if r.number not in self.front]
        return chosen[: max(count, len(self.front))]

    def save(self) -> None:
        """Write it aside and rename."""
        self.written = time.time()
        self.rank()
        fs, root = open_folder(self.folder)
        fs.makedirs(root, exist_ok=True)
        data = _plain(dataclasses.asdict(self))
        data["trials"] = data.pop("rows")
        write_json(fs, f"{root}/{FILE}", data)


def load(folder: str) -> Record | None:
    """The record of the search in `folder`; None where there is none.

    Raises:
        ValueError: a file that this version cannot read.
    """
    fs, root = open_folder(folder)
    path = f"{root}/{FILE}"
    if not fs.exists(path):
        return None
    try:
        data = read_json(fs, path)
        if data.get("version") != VERSION:
            raise ValueError(f"its version is {data.get('version')}, not {VERSION}")
        rows = [_row(row) for row in data.pop("trials")]
        return Record(rows=rows, **(data | {"folder": folder}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def front(rows: list[Row], cost: str) -> list[Row]:
    """The rows that no other beats in PSNR (up) and cost (down), cheapest first; with cost `none`
    the best alone."""
    known = [r for r in rows if cost == "none" or is_number(r.costs.get(cost))]
    price = {r.number: 0.0 if cost == "none" else r.costs[cost] for r in known}

    def beats(a: Row, b: Row) -> bool:
        better = (a.psnr or 0.0, -price[a.number]), (b.psnr or 0.0, -price[b.number])
        return all(x >= y for x, y in zip(*better, strict=True)) and better[0] != better[1]

    kept = [b for b in known if not any(beats(a, b) for a in known)]
    return sorted(kept, key=lambda r: (price[r.number], r.number))


def is_number(value: Any) -> bool:
    """Whether it is there, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def _row(data: dict[str, Any]) -> Row:
    data["curve"] = [(int(s), math.nan if p is None else float(p)) for s, p in data["curve"]]
    return Row(**data)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
