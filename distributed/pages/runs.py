"""Reads runs for their report, and restores the pictures that it shows."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from distributed.checkpoint import Checkpoint, RunState, newest_complete
from distributed.config import TrackingConfig
from distributed.cost import amount
from distributed.evaluate import held_by
from distributed.mlflow_tracker import KEY_FILE, Run, read_metrics, tracking_uri
from distributed.pages import charts, views
from distributed.scores import EvaluationReport, Score
from distributed.scoring import score
from measnet.complexity import Complexity, count
from measnet.config import ModelConfig, from_dict
from measnet.metrics import FIELD
from measnet.network import PIXEL_LIBRARIES, MEASNet
from measnet.routing import Measures, has_collapsed, measures
from measnet.tiling import Tiling, choose_tiling
from shards.storage import open_folder
from shards.stream import Picture, pictures
from shards.wording import counted

WIDEST, HIGHEST = 400, 304
"""Size of the shown part of a picture, in pixels."""
QUALITY = 88
"""Of WebP for photographs, 0 to 100."""
POINTS = 200
"""Points of a curve; longer ones are averaged over equal numbers of points."""
ALIKE = 1e-3
"""Mixtures of prompts whose weights differ by less count as the same."""

Curves = dict[str, list[tuple[float, float]]]


class Shown(NamedTuple):
    """A held-out picture on the page; all its images show the same part at full scale."""

    degradation: str
    name: str
    height: int
    width: int
    part: views.Window
    degraded: Image.Image
    clean: Image.Image


@dataclass
class Restorations:
    """What a run's network did with the pictures."""

    data: str = ""
    """Folder or URI of the pictures."""
    images: dict[tuple[str, str], Image.Image] = field(default_factory=dict)
    """(Degradation, name) -> restored."""
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    maps: dict[tuple[str, str], dict[str, Image.Image]] = field(default_factory=dict)
    """(Degradation, name) -> per-pixel library -> most probable expert as a colour."""
    bands: dict[tuple[str, str], dict[str, Image.Image]] = field(default_factory=dict)
    """(Degradation, name) -> `low` and `high`."""
    high: dict[str, list[float]] = field(default_factory=dict)
    """Task -> share of the high band of each picture."""
    prompts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Task -> (T,) weights of the prompts of each picture."""


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """All that a page shows of one run."""

    name: str
    folder: str
    checkpoint: Checkpoint
    state: RunState
    curves: Curves
    hardware: list[dict[str, Any]]
    """Groups of equal workers, from environment.json; empty: not known."""
    hours: float | None
    """Of training, from the samples per second of the curves."""
    price: float
    """Of one worker per hour; 0: unknown."""
    tracked: Run | None
    """Its run in MLflow; None: it has none."""
    restored: Restorations = field(default_factory=Restorations)
    shown: dict[tuple[str, str], Shown] = field(default_factory=dict)

    @cached_property
    def model(self) -> ModelConfig:
        """Configuration of the network."""
        return from_dict(ModelConfig, self.state.config["model"], "model")

    @cached_property
    def complexity(self) -> Complexity:
        """Parameters and multiply-adds."""
        return _complexity(self.model)

    @cached_property
    def report(self) -> dict[str, Any]:
        """The last validation, as `EvaluationReport.as_dict`; else the restored pictures."""
        if "report" in self.state.validation:
            return dict(self.state.validation["report"])
        scores = sorted(self.restored.scores.values())
        if not scores:
            return {}
        data = self.restored.data
        return EvaluationReport(data, FIELD, scores, held_by(data)).as_dict()

    @property
    def measured(self) -> str:
        """What the figures were measured on."""
        if "report" in self.state.validation:
            return f"validation after {self.state.validation['at']:,} samples"
        return f"{counted(len(self.restored.scores), 'picture')}, restored for this page"

    @property
    def tasks(self) -> list[str]:
        """Tasks with figures."""
        return list(self.report.get("tasks", {}))

    @property
    def usage(self) -> dict[str, dict[str, list[float]]]:
        """Library -> task -> share of the pixels or pictures that chose each expert."""
        routing = self.report.get("routing", {})
        libraries = dict.fromkeys(name for own in routing.values() for name in own)
        return {
            name: {task: own[name] for task, own in routing.items() if name in own}
            for name in libraries
        }

    @property
    def measures(self) -> dict[str, Measures]:
        """Library -> how the tasks use it."""
        return measures(self.report.get("routing", {}))

    def distances(self, libraries: Sequence[str]) -> dict[str, dict[str, float]]:
        """Task -> task -> Jensen-Shannon distance of their usage, mean over the libraries."""
        found: dict[str, dict[str, float]] = {one: {one: 0.0} for one in self.tasks}
        for one, other in itertools.combinations(self.tasks, 2):
            pair = f"{one}/{other}"
            mean = statistics.fmean(self.measures[name].similarity[pair] for name in libraries)
            found[one][other] = found[other][one] = mean
        return found

    @property
    def similarity(self) -> dict[str, dict[str, dict[str, float]]]:
        """Kind of library -> `distances`."""
        pixel = [name for name in self.measures if name in PIXEL_LIBRARIES]
        picture = [name for name in self.measures if name not in PIXEL_LIBRARIES]
        kinds = {"experts per pixel": pixel, "experts per picture": picture}
        return {kind: self.distances(own) for kind, own in kinds.items() if own}

    @staticmethod
    def similarity_rows(distances: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
        """`distances` as rows of a table, all in the same order of tasks."""
        return {one: [own[other] for other in distances] for one, own in distances.items()}

    @property
    def collapsed(self) -> list[str]:
        """Libraries that use hardly more than K experts."""
        return [
            name
            for name, own in self.measures.items()
            if has_collapsed(
                own.effective_experts,
                experts=len(own.shares),
                top_k=self.model.pixel_top_k if name in PIXEL_LIBRARIES else self.model.image_top_k,
            )
        ]

    @property
    def mean_prompts(self) -> dict[str, list[float]]:
        """Task -> mean weight of each learnt prompt."""
        return {
            task: np.mean([one.numpy() for one in own], axis=0).tolist()
            for task, own in self.restored.prompts.items()
        }

    @property
    def prompts_alike(self) -> bool:
        """Whether the restored pictures of all tasks have the same mixture of prompts."""
        rows = [one.numpy() for own in self.restored.prompts.values() for one in own]
        return len(rows) > 1 and float(np.ptp(rows, axis=0).max()) < ALIKE

    @property
    def prompt_chart(self) -> Markup | None:
        """The prompt weights of the restored pictures in two dimensions."""
        groups = self.restored.prompts
        rows = [one.numpy() for own in groups.values() for one in own]
        if len(rows) < 3 or self.prompts_alike:
            return None
        points, shares = views.principal_axes(np.array(rows))
        places = iter(points.tolist())
        named = {task: [tuple(next(places)) for _ in own] for task, own in groups.items()}
        axes = [f"component {n} ({share:.0%} of the variance)" for n, share in enumerate(shares, 1)]
        return charts.scatter(named, title=f"Prompt weights, {self.name}", axes=(axes[0], axes[1]))

    @property
    def high_shares(self) -> dict[str, float]:
        """Task -> mean share of the high band's energy."""
        return {task: statistics.fmean(own) for task, own in self.restored.high.items()}

    @property
    def costs(self) -> dict[str, str]:
        """Name -> value, as text."""
        workers = sum(len(group["ranks"]) for group in self.hardware)
        devices = [
            f"{len(group['ranks'])} × {group.get('card') or group.get('processor', '')}"
            for group in self.hardware
        ]
        cards = workers if self.hardware and self.hardware[0]["device"] != "cpu" else 1
        rates = [value for _, value in self.curves.get("speed/samples_per_s", [])]
        facts = {
            "samples": f"{self.state.samples:,}",
            "updates": f"{self.state.updates:,}",
            "workers": ", ".join(devices),
            "samples per second": f"{statistics.median(rates):.1f}" if rates else "",
            "hours of training": f"{self.hours:.2f}" if self.hours else "",
        }
        if self.hours and cards > 1:
            facts["hours of all cards"] = f"{self.hours * cards:.2f}"
        if self.hours and self.price:
            facts["price"] = amount(self.hours * cards * self.price)
        return {name: value for name, value in facts.items() if value}

    @property
    def config_yaml(self) -> str:
        """The whole configuration."""
        return yaml.safe_dump(self.state.config, sort_keys=False, allow_unicode=True)


@cache
def _complexity(model: ModelConfig) -> Complexity:
    return count(MEASNet(model))


def read(folder: str, *, price: float = 0.0) -> RunPage:
    """Read a run's newest complete checkpoint, curves and hardware.

    Raises:
        ValueError, OSError: it has no complete checkpoint.
    """
    newest = newest_complete(folder)
    if newest is None:
        raise ValueError(
            f"{folder} holds no complete checkpoint; give the folder of a run, such as runs/demo"
        )
    state = newest.state()
    raw = curves(read_metrics(folder))
    return RunPage(
        name=str(state.config.get("name") or folder),
        folder=folder,
        checkpoint=newest,
        state=state,
        curves={name: thinned(points) for name, points in raw.items()},
        hardware=json.loads(_text(folder, "environment.json") or "{}").get("workers", []),
        hours=hours(raw.get("speed/samples_per_s", [])),
        price=price,
        tracked=_tracked(folder, state),
    )


def curves(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Metric -> (samples, value), from `read_metrics`, without the machine's load."""
    found: Curves = {}
    for record in records:
        for name, value in record["metrics"].items():
            if not name.startswith("system/") and value is not None and np.isfinite(value):
                found.setdefault(name, []).append((record["step"], value))
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means over equal numbers of neighbours, at the last one's samples."""
    step = -(-len(points) // most)
    if step <= 1:
        return list(points)
    groups = [points[at : at + step] for at in range(0, len(points), step)]
    return [(own[-1][0], statistics.fmean(value for _, value in own)) for own in groups]


def hours(rates: Sequence[tuple[float, float]]) -> float | None:
    """Hours of training, from (samples, samples per second since the point before)."""
    if not rates:
        return None
    starts = [0.0, *(samples for samples, _ in rates)]
    pairs = zip(starts, rates, strict=False)
    return sum((end - start) / rate for start, (end, rate) in pairs if rate > 0) / 3600


def show_pictures(
    runs: Sequence[RunPage],
    device: str,
    *,
    limit: int,
    data: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Restore held-out pictures with each run's averaged weights, into `restored` and `shown`.

    Args:
        runs: to complete.
        device: for restoring.
        limit: pictures per degradation; the first is shown.
        data: packed shards; empty: those of each run's validation.
        say: gets a line per run.

    Raises:
        ValueError, OSError: shards that cannot be read.
    """
    tilings: dict[ModelConfig, Tiling] = {}  # networks of equal size need equal memory
    for run in runs:
        uri = data or run.state.config["data"]["validation"]
        if not uri:
            raise ValueError(f"{run.name} has no validation pictures; name some with --data")
        model = MEASNet(run.model)
        model.load_state_dict(run.checkpoint.tensors("ema"))
        model.to(device).eval()
        say(f"{run.name}: restores pictures of {uri}")
        run.restored.data = uri
        if run.model not in tilings:
            tilings[run.model] = choose_tiling(model)
        with views.looking(model) as look:
            keep = _Keeper(run, look)
            for _ in score(model, pictures(uri, limit=limit), tilings[run.model], seen=keep):
                pass


class _Keeper:
    """Keeps what the page needs of each scored picture."""

    def __init__(self, run: RunPage, look: views.Look) -> None:
        self._run, self._look = run, look

    def __call__(self, score: Score, picture: Picture, restored: Tensor) -> None:
        found, look = self._run.restored, self._look
        key = (score.degradation, score.name)
        known = {one.degradation for one in found.scores.values()}
        tasks = {one.task for one in found.scores.values()}
        found.scores[key] = score
        whole = not score.tile  # else the last pass saw a tile only
        if whole and look.prompt is not None:
            found.prompts.setdefault(score.task, []).append(look.prompt)
        if whole and look.bands is not None:
            found.high.setdefault(score.task, []).append(views.high_share(look.bands))
        if score.degradation in known:
            return
        part = views.centre(score.height, score.width, WIDEST, HIGHEST)
        degraded, clean, after = (
            views.picture(part.cut(image)) for image in (picture.degraded, picture.clean, restored)
        )
        self._run.shown[key] = Shown(*key, score.height, score.width, part, degraded, clean)
        found.images[key] = after
        if whole and score.task not in tasks:
            found.maps[key] = views.expert_maps(look.choices, part)
            if look.bands is not None:
                found.bands[key] = views.band_pictures(look.bands, part)


def _text(folder: str, name: str) -> str:
    """A file of the run; empty if it is not there."""
    fs, root = open_folder(folder)
    path = f"{root}/{name}"
    return fs.cat_file(path).decode() if fs.exists(path) else ""


def _tracked(folder: str, state: RunState) -> Run | None:
    """The run in MLflow that the state names."""
    if not state.mlflow_run_id:
        return None
    outcome = json.loads(_text(folder, "outcome.json") or "{}")
    tracking: Mapping[str, Any] = state.config.get("tracking", {})
    return Run(
        uri=outcome.get("tracking_uri") or tracking_uri(TrackingConfig(**tracking)),
        experiment=tracking.get("experiment", ""),
        name=str(state.config.get("name", "")),
        key=_text(folder, KEY_FILE).strip(),
        id=state.mlflow_run_id,
    )
