"""What the learned choice of experts is worth: PSNR with it less PSNR with another choice.

The weights stay the same. If another choice costs nothing, the experts are not selected adaptively,
whatever their shares are.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table

from distributed.scores import EvaluationReport
from measnet import routing
from measnet.config import ModelConfig
from measnet.network import PIXEL_LIBRARIES, MEASNet
from measnet.selection import Intercept

Routing = Literal["learned", "fixed", "random", "best-single"]
"""`learned`: the network's choice. `fixed`: the same K experts for all pixels and pictures, those
with the largest mean gates. `random`: K experts drawn for each pixel or picture. `best-single`: one
expert for all, in each library the one with the best PSNR."""
RoutingOf = Literal["pixel", "picture", "all"]
"""Whose choice is replaced: per-pixel libraries, per-picture libraries, or both."""
Evaluate = Callable[[], EvaluationReport]


class Worth(NamedTuple):
    """PSNR in dB of the learned choice and of another one."""

    routing: Routing
    of: RoutingOf
    libraries: list[str]
    learned: dict[str, float]
    """Task -> PSNR; also `mean`."""
    replaced: dict[str, float]
    experts: dict[str, int]
    """Library -> its best single expert, for `best-single`; else empty."""

    @property
    def worth(self) -> dict[str, float]:
        """Task -> what the learned choice is worth, in dB; also `mean`."""
        return {task: psnr - self.replaced[task] for task, psnr in self.learned.items()}


def worth(
    model: MEASNet,
    evaluate: Evaluate,
    learned: EvaluationReport,
    means: routing.MeanGates,
    *,
    by: Routing,
    of: RoutingOf = "pixel",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Worth:
    """Replace the choice, and evaluate again.

    Args:
        model: the network; its choices are the learned ones again afterwards.
        evaluate: restores the pictures with the network, as it is then.
        learned: what `evaluate` gave with the learned choice.
        means: of the same pictures, from `measnet.routing.mean_gates`.
        by: the other choice.
        of: the libraries whose choice is replaced.
        seed: of `random`.
        say: shows progress: `best-single` evaluates once for each expert.

    Raises:
        ValueError: the network has no such libraries.
    """
    libraries = _libraries(model, of)
    if not libraries:
        raise ValueError(f"the network has no libraries of experts of the kind --routing-of {of}")
    best: dict[str, int] = {}
    others: Mapping[str, Intercept]
    if by == "fixed":
        others = {
            name: routing.fixed(means.gates(name), _top_k(model.config, name)) for name in libraries
        }
    elif by == "random":
        others = {name: routing.at_random(seed + at) for at, name in enumerate(libraries)}
    elif by == "best-single":
        for name in libraries:
            best[name] = _best_single(model, evaluate, name, len(means.gates(name)), say)
        others = {name: routing.single(expert) for name, expert in best.items()}
    else:
        others = {}
    with routing.intercepting(model, others):
        replaced = evaluate()
    return Worth(by, of, libraries, _psnr(learned), _psnr(replaced), best)


def _libraries(model: MEASNet, of: RoutingOf) -> list[str]:
    kinds = {"pixel": [True], "picture": [False], "all": [True, False]}[of]
    return [name for name in routing.hooks(model) if (name in PIXEL_LIBRARIES) in kinds]


def _top_k(config: ModelConfig, library: str) -> int:
    return config.pixel_top_k if library in PIXEL_LIBRARIES else config.image_top_k


def _best_single(
    model: MEASNet, evaluate: Evaluate, name: str, experts: int, say: Callable[[str], None]
) -> int:
    scores = []
    for expert in range(experts):
        with routing.intercepting(model, {name: routing.single(expert)}):
            scores.append(evaluate().mean.restored_psnr)
        say(f"{name}: expert {expert} alone gives {scores[-1]:.2f} dB")
    return max(range(experts), key=lambda expert: scores[expert])


def _psnr(report: EvaluationReport) -> dict[str, float]:
    rows = {**report.tasks, "mean": report.mean}
    return {name: row.restored_psnr for name, row in rows.items()}


def write(found: Worth, path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found._asdict(), "worth": found.worth}, indent=2, allow_nan=False)
    path.write_text(text + "\n")


def table(found: Worth) -> Table:
    """A row per task."""
    view = Table(
        title=f"worth of the learned choice of the {found.of} experts",
        caption=f"in {', '.join(found.libraries)}; PSNR in dB with the same weights",
    )
    view.add_column("task", no_wrap=True)
    for name in ("learned", found.routing, "worth"):
        view.add_column(name, justify="right")
    for task, psnr in found.learned.items():
        cells = f"{psnr:.2f}", f"{found.replaced[task]:.2f}", f"{found.worth[task]:+.2f}"
        view.add_row(task, *cells, style="bold" if task == "mean" else "")
    return view
