"""What the libraries of experts choose: recorded, measured, or replaced by another choice.

A library is named as in `Restoration.routing`: `encoder1` to `encoder3` choose for each pixel,
`decoder3.low` and the like for each picture and frequency band.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from measnet.network import PIXEL_LIBRARIES, MEASNet
from measnet.selection import Choice, Hook, Intercept

Shares = Mapping[str, Mapping[str, Sequence[float]]]
"""Task -> library -> mean share of the pixels or pictures that chose expert n; they sum to K."""


class Measures(NamedTuple):
    """How a library is used by several tasks, which count alike."""

    shares: list[float]
    """Mean share of the choices that fall on expert n; they sum to 1."""
    entropy: float
    """Of the shares, in nat."""
    effective_experts: float
    """exp(entropy): between 1 and N. A library that always chooses the same K has K."""
    mutual_information: float
    """Of task and expert, in nat: 0 if all tasks use the experts alike."""
    similarity: dict[str, float]
    """`task/task` -> Jensen-Shannon distance of their shares, 0 (alike) to 1 (none in common)."""


def measures(shares: Shares) -> dict[str, Measures]:
    """Library -> its measures, from the shares of each task."""
    libraries = list(next(iter(shares.values()), {}))
    return {name: _measures({t: own[name] for t, own in shares.items()}) for name in libraries}


def _measures(shares: Mapping[str, Sequence[float]]) -> Measures:
    of_task = {task: np.asarray(own, float) / np.sum(own) for task, own in shares.items()}
    mean = np.mean(list(of_task.values()), axis=0)
    entropy = _entropy(mean)
    within = float(np.mean([_entropy(own) for own in of_task.values()]))
    tasks = list(of_task)
    similarity = {
        f"{one}/{other}": jensen_shannon(of_task[one], of_task[other])
        for at, one in enumerate(tasks)
        for other in tasks[at + 1 :]
    }
    information = max(0.0, entropy - within)
    return Measures(mean.tolist(), entropy, float(np.exp(entropy)), information, similarity)


def _entropy(shares: np.ndarray) -> float:
    used = shares[shares > 0]
    return float(-(used * np.log(used)).sum())


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon distance of two distributions, with logarithms to base 2: 0 to 1."""
    divergence = _entropy((first + second) / 2) - (_entropy(first) + _entropy(second)) / 2
    return float(np.sqrt(max(0.0, divergence) / np.log(2)))


def drift(before: Shares, now: Shares) -> dict[str, float]:
    """Library -> how far its use has moved: the mean over the tasks of the Jensen-Shannon distance.

    0: each task uses the experts as before; 1: it uses none of those of before. Only tasks and
    libraries in both count.
    """
    distances: dict[str, list[float]] = {}
    for task in before.keys() & now.keys():
        for library in before[task].keys() & now[task].keys():
            first, second = (
                np.asarray(shares[task][library], float) / np.sum(shares[task][library])
                for shares in (before, now)
            )
            distances.setdefault(library, []).append(jensen_shannon(first, second))
    return {library: float(np.mean(own)) for library, own in sorted(distances.items())}


def has_collapsed(effective_experts: float, *, experts: int, top_k: int) -> bool:
    """Whether a library uses hardly more than the same K experts, though it has more."""
    return experts > top_k and effective_experts < 1.1 * top_k


def hooks(model: MEASNet) -> dict[str, Hook]:
    """Library -> where its choice can be seen and replaced."""
    found: dict[str, Hook] = {}
    for level, name in enumerate(PIXEL_LIBRARIES, start=1):
        module = getattr(model, f"experts{level}")
        hook = _hook(module)
        if hook is not None:
            found[name] = hook
    for level in (3, 2, 1):
        module = getattr(model, f"frequency{level}")
        bands = getattr(module, "experts", {}) if module is not None else {}
        named = dict(bands.items()) if bands else {b: getattr(module, b, None) for b in _BANDS}
        for band, library in named.items():
            hook = _hook(library)
            if hook is not None:
                found[f"decoder{level}.{band}"] = hook
    return found


_BANDS = ("high", "low")


def _hook(module: object) -> Hook | None:
    """Of a library: in its selector (variant paper) or its own (official)."""
    hook = getattr(getattr(module, "select", module), "hook", None)
    return hook if isinstance(hook, Hook) else None


@contextmanager
def intercepting(model: MEASNet, intercepts: Mapping[str, Intercept]) -> Iterator[None]:
    """Within it each named library's choice passes through a function.

    Raises:
        ValueError: the network has no such library.
    """
    own = hooks(model)
    for name in intercepts:
        if name not in own:
            raise ValueError(f"the network has no library {name!r}; it has: {', '.join(own)}")
    before = {name: own[name].intercept for name in intercepts}
    for name, intercept in intercepts.items():
        own[name].intercept = intercept
    try:
        yield
    finally:
        for name, kept in before.items():
            own[name].intercept = kept


@contextmanager
def record(model: MEASNet) -> Iterator[dict[str, Choice]]:
    """Within it the last forward pass's choices: library -> `Choice`.

    Per-pixel libraries have (B, h, w, ...): the pixels of the padded input at their level, of which
    level 2 has half and level 3 a quarter per side. Per-picture ones have (B, ...).
    """
    choices: dict[str, Choice] = {}

    def keep(name: str) -> Intercept:
        def intercept(choice: Choice) -> Choice:
            choices[name] = Choice(*(one.detach() for one in choice))
            return choice

        return intercept

    with intercepting(model, {name: keep(name) for name in hooks(model)}):
        yield choices


@contextmanager
def record_maps(model: MEASNet, height: int, width: int) -> Iterator[dict[str, Tensor]]:
    """Records the most probable expert of each pixel, also of a picture in exact tiles.

    Within it, one picture of this size is restored, whole or in tiles. After it, the dictionary
    holds per-pixel library -> (H/s, W/s) uint8 on the CPU, where s is 1, 2 and 4 by level, rounded
    up.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in PIXEL_LIBRARIES if name in hooks(model)}
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Intercept:
        def intercept(choice: Choice) -> Choice:
            parts[name].append(choice.chosen[0, ..., 0].to(torch.uint8).cpu())
            return choice

        return intercept

    with intercepting(model, {name: keep(name) for name in parts}):
        yield maps
    padded = model.pad(torch.empty(1, 3, height, width, device="meta")).shape[-2:]
    for level, name in enumerate(PIXEL_LIBRARIES):
        if name in parts:
            joined = join_tiles(parts[name], *(side // 2**level for side in padded))
            maps[name] = joined[: -(-height // 2**level), : -(-width // 2**level)]


def join_tiles(parts: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Tiles (h, w), row by row, as one map (height, width).

    If a try ran out of memory, its tiles come first; they are dropped.
    """
    start, area = len(parts), 0
    while area < height * width:
        start -= 1
        area += parts[start].numel()
    rows: list[Tensor] = []
    row: list[Tensor] = []
    for part in parts[start:]:
        row.append(part)
        if sum(one.shape[1] for one in row) == width:
            rows.append(torch.cat(row, dim=1))
            row = []
    return torch.cat(rows)


def margin(choice: Choice) -> Tensor:
    """How clear a choice is, (...): the K-th less the (K+1)-th largest probability; 1 if K = N."""
    top_k = choice.chosen.shape[-1]
    if choice.probability.shape[-1] == top_k:
        return torch.ones_like(choice.probability[..., 0])
    top = choice.probability.topk(top_k + 1, dim=-1).values
    return top[..., -2] - top[..., -1]


# --- Other choices, to measure what the learned one is worth ---


def fixed(gate_n: Tensor, top_k: int) -> Intercept:
    """The same K experts with the same gates for all pixels and pictures.

    Args:
        gate_n: (N,) mean gates, from `MeanGates.gates`.
        top_k: K; the experts with the largest mean gate are taken. Their gates are scaled, so that
            their sum stays that of all.
    """
    gate_k, chosen_k = gate_n.topk(top_k)
    gate_k = gate_k * (gate_n.sum() / gate_k.sum())

    def intercept(choice: Choice) -> Choice:
        shape = choice.gate.shape
        gate, chosen = gate_k.to(choice.gate), chosen_k.to(choice.chosen)
        return Choice(
            gate.expand(shape).contiguous(), chosen.expand(shape).contiguous(), choice.probability
        )

    return intercept


def at_random(seed: int) -> Intercept:
    """K other experts for each pixel or picture, drawn without preference; the gates stay."""
    generator = torch.Generator().manual_seed(seed)

    def intercept(choice: Choice) -> Choice:
        drawn = torch.rand(choice.probability.shape, generator=generator)
        chosen = drawn.topk(choice.chosen.shape[-1], dim=-1).indices
        return choice._replace(chosen=chosen.to(choice.chosen.device))

    return intercept


def single(expert: int) -> Intercept:
    """One expert for all pixels and pictures, with the sum of the chosen gates."""

    def intercept(choice: Choice) -> Choice:
        gate = torch.zeros_like(choice.gate)
        gate[..., 0] = choice.gate.sum(-1)
        others = [n for n in range(choice.probability.shape[-1]) if n != expert]
        row = torch.tensor([expert, *others][: choice.chosen.shape[-1]])
        chosen = row.to(choice.chosen).expand(choice.chosen.shape).contiguous()
        return Choice(gate, chosen, choice.probability)

    return intercept


class MeanGates:
    """Means over all pixels, or pictures, that pass through the libraries."""

    def __init__(self) -> None:
        """Nothing has passed."""
        self._gates: dict[str, Tensor] = {}
        self._margins: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def gates(self, name: str) -> Tensor:
        """Mean gate of each expert, 0 where it was not chosen: (N,), see `fixed`."""
        return self._gates[name] / self._count[name]

    def margin(self, name: str) -> float:
        """Mean of `margin`."""
        return self._margins[name] / self._count[name]

    def intercept(self, name: str) -> Intercept:
        """What looks at the choices of a library."""

        def look(choice: Choice) -> Choice:
            experts = choice.probability.shape[-1]
            gate_pk, chosen_pk = choice.gate.flatten(0, -2), choice.chosen.flatten(0, -2)
            gate_pn = gate_pk.new_zeros(len(gate_pk), experts).scatter(1, chosen_pk, gate_pk)
            total = gate_pn.double().sum(0).cpu()
            self._gates[name] = self._gates[name] + total if name in self._gates else total
            self._margins[name] = self._margins.get(name, 0.0) + float(margin(choice).sum())
            self._count[name] = self._count.get(name, 0) + len(gate_pk)
            return choice

        return look


@contextmanager
def mean_gates(model: MEASNet) -> Iterator[MeanGates]:
    """Within it, what the libraries do in all forward passes is averaged."""
    means = MeanGates()
    with intercepting(model, {name: means.intercept(name) for name in hooks(model)}):
        yield means
