"""Which sample is at which position of a run: pure functions, without processes and without state.

A run reads one endless sequence of samples, numbered by *positions* 0, 1, 2, … that continue across
epochs. `Plan.draws(positions)` says which sample is at each position; `positions(...)` says which
positions a rank reads. World size, loader processes, micro-batch and accumulation only divide this
sequence. So one number, the count of samples consumed, is enough to resume a run with any number of
workers.

No permutation is stored. A keyed bijection on 0..n-1 (an alternating Feistel network; values that
fall outside the range are mapped again) gives any element of a permutation of 10^12 at once.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from shards.manifest import Manifest, digest
from shards.tasks import DEGRADATIONS

VERSION = 1
"""Must change when the same plan would give another sequence."""
LANES = 16
"""`local` order: sequences that are read in turn."""
WINDOW = 4
"""`local` order: shards of a lane that are shuffled together."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 16


class Draws(NamedTuple):
    """The samples at n positions; all fields (n,) int64."""

    degradation: np.ndarray
    """Index into `DEGRADATIONS`."""
    sample: np.ndarray
    """Number of the sample within its task, in the order of the shards."""
    epoch: np.ndarray
    """Epoch of the position."""
    use: np.ndarray
    """How often this degradation has used the sample before, in all epochs."""


def _mix(value: np.ndarray) -> np.ndarray:
    """Mixes the 64 bits of a value (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


def key(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit key made from integers or arrays; its shape is (), or the arrays' common shape."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state.reshape(()) if state.size == 1 else state


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of `index` under a keyed bijection of 0..n-1.

    Args:
        index: (m,) int64 in [0, n).
        n: size of the range.
        keys: () or (m,) uint64; each key is one permutation.

    Returns:
        (m,) int64 in [0, n).
    """
    if n <= 1:
        return np.zeros_like(index)
    bits = int(n - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    result = _feistel(index.astype(np.uint64), keys, low_bits, low_mask, high_mask)
    outside = np.flatnonzero(result >= n)
    while outside.size:
        some_keys = keys if keys.ndim == 0 else keys[outside]
        walked = _feistel(result[outside], some_keys, low_bits, low_mask, high_mask)
        result[outside] = walked
        outside = outside[walked >= n]
    return result.astype(np.int64)


def _feistel(
    value: np.ndarray,
    keys: np.ndarray,
    low_bits: np.uint64,
    low_mask: np.uint64,
    high_mask: np.uint64,
) -> np.ndarray:
    low, high = value & low_mask, value >> low_bits
    for step in range(_ROUNDS):
        round_keys = keys + np.uint64((step * int(_GOLDEN)) & 0xFFFFFFFFFFFFFFFF)
        if step % 2 == 0:
            high = high ^ (_scatter(low, round_keys) & high_mask)
        else:
            low = low ^ (_scatter(high, round_keys) & low_mask)
    return (high << low_bits) | low


def _scatter(value: np.ndarray, keys: np.ndarray) -> np.ndarray:
    value = (value + keys) * _MIX_A
    value = (value ^ (value >> np.uint64(29))) * _MIX_B
    return value >> np.uint64(32)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole sequence of samples of a run.

    Every epoch uses each sample of a degradation exactly `repeats` times. The order `uniform` is
    one permutation of the epoch's places (the usual shuffle). The order `local` is for datasets of
    which only few shards can be open at a time. An epoch is cut into `lanes` sequences that are
    read in turn. Inside a lane the shards come in a permuted order, and each `window` of them is
    shuffled together. Every batch then takes samples from all lanes equally often, and at most `2 ·
    lanes · window` shards are open at a time.
    """

    degradations: tuple[int, ...]
    """The degradations that are used, as indices into `DEGRADATIONS`."""
    samples: tuple[int, ...]
    """For each of them, the number of samples of its task."""
    repeats: tuple[int, ...]
    """For each of them, the uses of each sample per epoch."""
    seed: int
    """Key of the permutations."""
    order: Literal["uniform", "local"] = "uniform"
    """How an epoch is shuffled; see above."""
    source: str = ""
    """Fingerprint of the manifest."""
    shard_sizes: tuple[np.ndarray, ...] = ()
    """`local` only: for each degradation, the samples of each shard of its task."""
    lanes: int = LANES
    """`local` only."""
    window: int = WINDOW
    """`local` only."""

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        repeats: dict[str, int],
        seed: int,
        order: Literal["uniform", "local"] = "uniform",
    ) -> "Plan":
        """The plan for a folder of shards; ValueError where it lacks a degradation of `repeats`."""
        counts = manifest.counts
        used = [name for name in DEGRADATIONS if repeats.get(name, 0) > 0]
        for name in used:
            task = DEGRADATIONS[name].task
            if not counts.get(task):
                raise ValueError(
                    f"data.repeats.{name} is {repeats[name]}, but "
                    f"{manifest.uri or 'the manifest'} has "
                    f"no samples of {task} (it has {', '.join(counts) or 'none'}); "
                    f"set data.repeats.{name} to 0, or add the task by `python -m shards.pack` "
                    "or `python -m shards.index`"
                )
        sizes = {
            task: manifest.shards_of(task).column("samples").astype(np.int64)
            for task in {DEGRADATIONS[name].task for name in used}
        }
        return cls(
            degradations=tuple(list(DEGRADATIONS).index(name) for name in used),
            samples=tuple(counts[DEGRADATIONS[name].task] for name in used),
            repeats=tuple(repeats[name] for name in used),
            seed=seed,
            order=order,
            source=manifest.fingerprint,
            shard_sizes=tuple(sizes[DEGRADATIONS[name].task] for name in used)
            if order == "local"
            else (),
        )

    @functools.cached_property
    def quotas(self) -> tuple[int, ...]:
        """Samples of each degradation in an epoch."""
        return tuple(n * uses for n, uses in zip(self.samples, self.repeats, strict=True))

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.quotas)

    @property
    def description(self) -> dict[str, Any]:
        """All that determines the sequence, as JSON. A checkpoint stores it, to name what has
        changed."""
        names = list(DEGRADATIONS)
        rows = zip(self.degradations, self.samples, self.repeats, strict=True)
        description: dict[str, Any] = {
            "version": VERSION,
            "order": self.order,
            "seed": self.seed,
            "shards": self.source,
            "degradations": {names[d]: {"samples": n, "repeats": r} for d, n, r in rows},
        }
        if self.order == "local":
            description["lanes"], description["window"] = self.lanes, self.window
        return description

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the description; plans with equal fingerprints give equal sequences."""
        return digest(self.description)

    def refuse_changed(self, saved: dict[str, Any]) -> None:
        """ValueError that names each difference to a description saved earlier."""
        now = self.description
        changed = [
            f"{name}: {saved.get(name)} then, {now.get(name)} now"
            for name in sorted(set(saved) | set(now))
            if saved.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                "the order of samples is not the one this run started with ("
                + "; ".join(changed)
                + "); set the old values again, or start a new run"
            )

    def draws(self, positions: np.ndarray) -> Draws:
        """The samples at positions: (n,) int64, each 0 or more -> `Draws` of (n,)."""
        flat = np.asarray(positions, np.int64).ravel()
        blocks = [self._draws(flat[at : at + _BLOCK]) for at in range(0, len(flat), _BLOCK)]
        if not blocks:
            blocks = [self._draws(flat)]
        return Draws(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))

    def _draws(self, positions: np.ndarray) -> Draws:
        epoch, within = np.divmod(positions, self.epoch_samples)
        if self.order == "uniform":
            place = permute(within, self.epoch_samples, _per_epoch(self.seed, 1, epoch))
        else:
            place = self._lane_place(within, epoch)
        ends = np.cumsum(self.quotas)
        row = np.searchsorted(ends, place, side="right")
        degradation = np.asarray(self.degradations, np.int64)[row]
        sample, use = np.empty_like(place), np.empty_like(place)
        for index, n in enumerate(self.samples):
            chosen = np.flatnonzero(row == index)
            if chosen.size:
                offset = place[chosen] - (ends[index] - self.quotas[index])
                turn, at = np.divmod(offset, n)
                use[chosen] = epoch[chosen] * self.repeats[index] + turn
                sample[chosen] = (
                    at if self.order == "uniform" else self._local_sample(index, use[chosen], at)
                )
        return Draws(degradation, sample, epoch, use)

    def _lane_place(self, within: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """`local`: the place in the epoch that a position reads.

        Each lane is a contiguous range of places; successive positions take the next place of one
        lane after the other.
        """
        lanes = min(self.lanes, self.epoch_samples)
        row, column = np.divmod(within, lanes)
        length, longer = divmod(self.epoch_samples, lanes)
        # Only the first lanes are longer by one; the last row consists of these alone.
        full = row < length
        lane = column.copy()
        # The order of the lanes differs between epochs, so that batches do not mix the same ones.
        lane[full] = permute(column[full], lanes, _per_epoch(self.seed, 2, epoch[full]))
        return lane * length + np.minimum(lane, longer) + row

    def _local_sample(self, index: int, use: np.ndarray, at: np.ndarray) -> np.ndarray:
        """`local`: the sample at place `at` of pass number `use` over a degradation."""
        sample = np.empty_like(at)
        for one in np.unique(use):
            chosen = np.flatnonzero(use == one)
            shuffle = _shard_order(self, index, int(one))
            sample[chosen] = shuffle.sample(at[chosen])
        return sample


class _ShardOrder(NamedTuple):
    """`local`: one pass over the shards of a task in permuted order."""

    shards: np.ndarray  # (s,) the shards in the order of this pass
    ends: np.ndarray  # (s,) cumulative count of their samples
    starts: np.ndarray  # (s,) number of each shard's first sample, not permuted
    window: int
    key: np.ndarray

    def sample(self, at: np.ndarray) -> np.ndarray:
        numbers = np.empty_like(at)
        which = np.searchsorted(self.ends, at, side="right") // self.window
        for window in np.unique(which):
            chosen = np.flatnonzero(which == window)
            first, last = window * self.window, min((window + 1) * self.window, len(self.ends)) - 1
            begin = self.ends[first - 1] if first else 0
            count = int(self.ends[last] - begin)
            inside = permute(at[chosen] - begin, count, key(self.key, window)) + begin
            slot = np.searchsorted(self.ends, inside, side="right")
            before = np.where(slot > 0, self.ends[slot - 1], 0)
            numbers[chosen] = self.starts[self.shards[slot]] + inside - before
        return numbers


_orders: dict[tuple[str, int, int], _ShardOrder] = {}
_ORDERS_KEPT = 1 << 25
"""Most numbers to keep in `_orders`: 256 MiB."""


def _shard_order(plan: Plan, index: int, use: int) -> _ShardOrder:
    name = (plan.fingerprint, index, use)
    if name not in _orders:
        sizes = plan.shard_sizes[index]
        while _orders and sum(3 * len(kept.ends) for kept in _orders.values()) > _ORDERS_KEPT:
            del _orders[next(iter(_orders))]
        pass_key = key(plan.seed, 3, plan.degradations[index], use)
        shards = permute(np.arange(len(sizes)), len(sizes), pass_key)
        starts = np.cumsum(sizes) - sizes
        _orders[name] = _ShardOrder(
            shards, np.cumsum(sizes[shards]), starts, plan.window, key(pass_key, 4)
        )
    return _orders[name]


def _per_epoch(seed: int, purpose: int, epoch: np.ndarray) -> np.ndarray:
    """Keys for positions; one key for all where they are in one epoch, which is faster."""
    if epoch.size and (epoch == epoch[0]).all():
        return key(seed, purpose, int(epoch[0]))
    return np.broadcast_to(key(seed, purpose, epoch), epoch.shape)


def positions(
    start: int, steps: int, global_batch: int, micro_batch: int, world: int, rank: int
) -> np.ndarray:
    """The positions that a rank reads in some optimizer steps.

    A global batch is an ordered list of micro-batches; rank r takes the r-th contiguous slice of
    it.

    Args:
        start: samples consumed before, a multiple of the global batch.
        steps: optimizer steps.
        global_batch: samples of one optimizer step, over all ranks.
        micro_batch: samples of one forward pass.
        world: number of ranks.
        rank: this rank.

    Returns:
        (steps, accumulation, micro_batch) int64.

    Raises:
        ValueError: the sizes do not divide.
    """
    micros, rest = divmod(global_batch, micro_batch)
    if rest or micros % world:
        raise ValueError(
            f"a global batch of {global_batch} cannot be divided among {world} workers in "
            f"micro-batches of {micro_batch}; it must be a multiple of {world * micro_batch}"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} workers")
    if start % global_batch:
        raise ValueError(
            f"start is {start}, but must be a multiple of the global batch {global_batch}"
        )
    share = micros // world
    step = np.arange(steps, dtype=np.int64)[:, None, None] * global_batch
    micro = (rank * share + np.arange(share, dtype=np.int64))[None, :, None] * micro_batch
    return start + step + micro + np.arange(micro_batch, dtype=np.int64)
