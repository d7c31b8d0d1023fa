"""What a search varies: dotted `TrainConfig` fields with their ranges, or a fixed list of points.

    experts     N and K of both kinds of expert library, and lambda, which the paper set by hand
    width       the channels of the network, which change its cost far more than K does
    ablation    the six rows of Table VI
    tasks       all tasks in one network against one network per task (Fig. 8)
    FILE.yaml   field: range, one per line; `--vary FIELD=RANGE` adds one on the command line

A range is `2..8`, `0.1..0.9`, `log 1e-6..1e-2`, or the choices `16,24,32`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distributed.config import TrainConfig, flat_fields
from measnet.config import ABLATION, ModelConfig, replace_dotted
from shards.tasks import DEGRADATIONS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

Changes = dict[str, Any]
"""Dotted field -> value."""

EXPERTS = {
    "model.pixel_experts": "2..8",
    "model.pixel_top_k": "1..4",
    "model.image_experts": "2..8",
    "model.image_top_k": "1..4",
    "recipe.balance_weight": "log 1e-5..1",
}
PAPER: Changes = {
    "model.pixel_experts": ModelConfig.pixel_experts,
    "model.pixel_top_k": ModelConfig.pixel_top_k,
    "model.image_experts": ModelConfig.image_experts,
    "model.image_top_k": ModelConfig.image_top_k,
    "recipe.balance_weight": 1e-4,
}
"""Section IV.B of the paper. Trial 0 has these values in the fields that are searched."""
BOUND_BY = {
    "model.pixel_top_k": "model.pixel_experts",
    "model.image_top_k": "model.image_experts",
}
"""K of a library cannot exceed its N."""
SYMBOLS = {
    "model.pixel_experts": "N pixel",
    "model.pixel_top_k": "K pixel",
    "model.image_experts": "N picture",
    "model.image_top_k": "K picture",
    "recipe.balance_weight": "λ",
    "model.dim": "width",
    "recipe.lr": "learning rate",
}
"""Short names for table and plots."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One field and its possible values: a range, or choices."""

    field: str
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an empty range, and choices for a field that has a bound."""
        if self.choices:
            if self.bound:
                raise ValueError(
                    f"{self.field} needs a range such as 1..4, which is cut at {self.bound}"
                )
        elif not self.low < self.high:
            raise ValueError(f"{self.field}: the range {self.low}..{self.high} is empty")
        elif self.log and self.low <= 0:
            raise ValueError(f"{self.field}: a log range must begin above 0, not at {self.low}")

    @property
    def bound(self) -> str | None:
        """The field that this one cannot exceed."""
        return BOUND_BY.get(self.field)

    def distribution(self, values: Iterable[Any] = ()) -> "BaseDistribution":
        """The range for Optuna, widened to include `values`."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.choices:
            return CategoricalDistribution(self.choices)
        kind = IntDistribution if isinstance(self.low, int) else FloatDistribution
        ends = [self.low, self.high, *values]
        return kind(min(ends), max(ends), log=self.log)


@dataclass(frozen=True)
class Point:
    """One row of a fixed list."""

    label: str
    changes: Changes


@dataclass(frozen=True)
class Space:
    """Parameters to search, or points to train one after the other."""

    parameters: tuple[Parameter, ...] = ()
    points: tuple[Point, ...] = ()

    def check(self, base: TrainConfig) -> None:
        """Try the ends of each range on `base`.

        Raises:
            ValueError: the configuration refuses an end, or the choices lack the value of trial 0.
        """
        first, given = self.first(base), flat_fields(base)
        for parameter in self.parameters:
            if parameter.choices and first[parameter.field] not in parameter.choices:
                raise ValueError(
                    f"{parameter.field} has the choices "
                    f"{', '.join(map(str, parameter.choices))}, but trial 0 needs "
                    f"{first[parameter.field]} among them"
                )
            for value in parameter.choices or (parameter.low, parameter.high):
                changes = first | {parameter.field: value}
                if parameter.bound:  # a K above N is cut, so try it with an N that is large enough
                    least = changes.get(parameter.bound, given[parameter.bound])
                    changes[parameter.bound] = max(value, least)
                replace_dotted(base, self._cut(changes, base))
        for point in self.points:
            replace_dotted(base, point.changes)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for the record of the search."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Space":
        """From what `as_dict` gave."""
        rows = [row | {"choices": tuple(row["choices"])} for row in data["parameters"]]
        points = tuple(Point(**row) for row in data["points"])
        return cls(tuple(Parameter(**row) for row in rows), points)

    def first(self, base: TrainConfig) -> Changes:
        """Trial 0: the paper's N, K and lambda where they are searched, else the values of
        `base`."""
        if self.points:
            return dict(self.points[0].changes)
        given = flat_fields(base)
        return {p.field: PAPER.get(p.field, given[p.field]) for p in self.parameters}

    def suggest(self, study: "Study", base: TrainConfig) -> Changes:
        """Let Optuna choose a value for each parameter; a K above its N is cut."""
        return self._cut(study.ask(self.distributions()).params, base)

    def distributions(self, points: Sequence[Changes] = ()) -> "dict[str, BaseDistribution]":
        """The range of each parameter for Optuna, widened to include the values of `points`."""
        return {p.field: p.distribution(c[p.field] for c in points) for p in self.parameters}

    def _cut(self, changes: Changes, base: TrainConfig) -> Changes:
        """Lower each K to its N.

        Raises:
            ValueError: a K that is not searched is above an N that is.
        """
        cut, given = dict(changes), flat_fields(base)
        for field, bound in BOUND_BY.items():
            if field in cut:
                cut[field] = min(cut[field], cut.get(bound, given[bound]))
            elif bound in cut and cut[bound] < given[field]:
                raise ValueError(
                    f"{bound} may become {cut[bound]}, but {field} stays {given[field]}: "
                    f"search it too (--vary {field}=1..{given[field]})"
                )
        return cut


def build(names: Sequence[str], vary: Sequence[str], base: TrainConfig) -> Space:
    """The space that the command line asks for.

    Raises:
        ValueError: an unknown name or field, or a range that cannot be read or that `base` refuses.
    """
    fixed = [name for name in names if name in ("ablation", "tasks")]
    if fixed:
        if len(names) > 1 or vary:
            raise ValueError(f"--space {fixed[0]} is a fixed list: nothing can be added to it")
        space = Space(points=_ablation() if fixed[0] == "ablation" else _tasks(base))
    else:
        ranges: dict[str, Any] = {}
        for name in names:
            ranges |= _named(name, base)
        for item in vary:
            field, equals, text = item.partition("=")
            if not equals:
                raise ValueError(f"--vary {item!r}; write FIELD=RANGE, as recipe.lr=log 1e-4..1e-2")
            ranges[field.strip()] = text
        space = Space(tuple(parameter(field, text, base) for field, text in ranges.items()))
        if not space.parameters:
            raise ValueError("nothing to search: give --space experts or --vary FIELD=RANGE")
    space.check(base)
    return space


def parameter(field: str, text: Any, base: TrainConfig) -> Parameter:
    """Read one range: `2..8`, `log 1e-6..1e-2`, `16,24,32`, or a YAML list of choices.

    Raises:
        ValueError: an unknown field, or not a range.
    """
    known = flat_fields(base)
    if field not in known:
        near = [name for name in known if name.rpartition(".")[2] == field.rpartition(".")[2]]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"cannot search {field}: there is no such field{hint}")
    if isinstance(text, list):
        return Parameter(field=field, choices=tuple(text))
    unreadable = ValueError(
        f"cannot read the range {text!r} of {field}; write 2..8, log 1e-6..1e-2 or 16,24,32"
    )
    words = str(text).replace(":", " ").split()
    log = words[:1] == ["log"]
    body = "".join(words[log:])
    if ".." in body:
        number = int if isinstance(known[field], int) else float
        low, _, high = body.partition("..")
        try:
            ends = number(low), number(high)
        except ValueError:
            raise unreadable from None
        return Parameter(field=field, low=ends[0], high=ends[1], log=log)
    choices = [yaml.safe_load(item) for item in body.split(",") if item]
    if len(choices) < 2 or log:
        raise unreadable
    if isinstance(known[field], float):
        choices = [float(choice) for choice in choices]
    return Parameter(field=field, choices=tuple(choices))


def describe(changes: Mapping[str, Any]) -> str:
    """One short line: `N pixel 6  K pixel 2  λ 0.0001`."""
    return "  ".join(f"{symbol(f)} {show(v)}" for f, v in changes.items())


def symbol(field: str) -> str:
    """Short name of a field."""
    return SYMBOLS.get(field, field.removeprefix("model.").removeprefix("recipe."))


def show(value: Any) -> str:
    """A value as short text."""
    if isinstance(value, dict):
        return "+".join(name for name, count in value.items() if count) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _named(name: str, base: TrainConfig) -> dict[str, Any]:
    if name == "experts":
        return dict(EXPERTS)
    if name == "width":
        widths = {_multiple_of_4(base.model.dim * part) for part in (0.5, 0.75, 1.0)}
        return {"model.dim": sorted(widths)}
    if name.endswith((".yaml", ".yml")):
        try:
            ranges = yaml.safe_load(Path(name).read_text())
        except OSError as error:
            raise ValueError(f"cannot read --space {name}: {error.strerror}") from error
        if not isinstance(ranges, dict):
            raise ValueError(f"{name} must hold lines such as `model.dim: 16,24,32`")
        return ranges
    raise ValueError(
        f"unknown --space {name!r}; choose experts, width, ablation, tasks, or a FILE.yaml"
    )


def _ablation() -> tuple[Point, ...]:
    switches = ("tspg", "mese", "fd", "mee")
    return tuple(
        Point(label, {f"model.{name}": getattr(make(), name) for name in switches})
        for label, make in ABLATION.items()
    )


def _tasks(base: TrainConfig) -> tuple[Point, ...]:
    used = {name: count for name, count in base.data.repeats.items() if count}
    tasks = list(dict.fromkeys(DEGRADATIONS[name].task for name in used))
    if len(tasks) < 2:
        raise ValueError(
            f"--space tasks compares tasks, but data.repeats uses only {tasks[0]}; "
            "use a preset with several"
        )
    single = [
        Point(
            task,
            {"data.repeats": {n: c for n, c in used.items() if DEGRADATIONS[n].task == task}},
        )
        for task in tasks
    ]
    return (Point("all in one", {"data.repeats": used}), *single)


def _multiple_of_4(channels: float) -> int:
    return max(4, round(channels / 4) * 4)
