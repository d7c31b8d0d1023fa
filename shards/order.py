"""Which sample stands at which position: pure functions, no processes, no state.

A run reads one endless sequence of samples, numbered by *positions* 0, 1, 2, … that go on across
epochs. `Plan.draws(positions)` says which sample each position is; `positions(...)` says which
positions a rank reads. World size, loader processes, micro-batch and accumulation only cut the
sequence up. So a run is continued from one number, the count of samples consumed, by any number of
workers.

Instead of stored permutations there is a keyed bijection on 0..n-1 (an alternating Feistel network;
values that fall outside are sent through again): any place of a permutation of 10^12 is found at
once and without memory.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from shards.manifest import Manifest, digest
from shards.tasks import DEGRADATIONS

VERSION = 1
"""Changes when the same plan would give another sequence."""
LANES = 16
"""`local` order: sequences that are read side by side."""
WINDOW = 4
"""`local` order: shards that are shuffled into each other within a lane."""

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 16


class Draws(NamedTuple):
    """What stands at some positions; all (n,) int64."""

    degradation: np.ndarray
    """Index into `DEGRADATIONS`."""
    sample: np.ndarray
    """Index of the sample within its task, as the shards number them."""
    epoch: np.ndarray
    """Epoch that the position belongs to."""
    use: np.ndarray
    """How often this degradation has used the sample before, over all epochs."""


def _mix(value: np.ndarray) -> np.ndarray:
    """Scatters 64 bits over 64 bits (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


def key(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit key from integers or arrays of them; (), or the arrays' common shape."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mix(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state.reshape(()) if state.size == 1 else state


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed bijection of 0..n-1 sends `index`.

    `index` (m,) int64 in [0, n); `keys` () or (m,) uint64, one permutation for each key. Returns
    (m,) int64.
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

    Every epoch uses each sample of a degradation `repeats` times, exactly. In the order `uniform`
    the places of an epoch are one permutation (the usual shuffle). `local` is for sets of which
    only few shards can be open: an epoch is cut into `lanes` runs of places that are read side by
    side, and inside of each run the shards come in a permuted order, `window` of them shuffled into
    each other. Each batch then meets all lanes equally often; at most `2 · lanes · window` shards
    are open at a time.
    """

    degradations: tuple[int, ...]
    """Indices into `DEGRADATIONS` of those that are used."""
    samples: tuple[int, ...]
    """For each of them the samples of its task."""
    repeats: tuple[int, ...]
    """For each of them the uses of each sample per epoch."""
    seed: int
    """Keys the permutations."""
    order: Literal["uniform", "local"] = "uniform"
    """The mode."""
    source: str = ""
    """Fingerprint of the manifest."""
    shard_sizes: tuple[np.ndarray, ...] = ()
    """`local` only: for each degradation the samples of each shard of its task."""
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
        """The plan over a folder of shards; ValueError where a degradation is wanted that it does
        not hold."""
        counts = manifest.counts
        used = [name for name in DEGRADATIONS if repeats.get(name, 0) > 0]
        for name in used:
            task = DEGRADATIONS[name].task
            if not counts.get(task):
                raise ValueError(
                    f"data.repeats.{name} is {repeats[name]}, but "
                    f"{manifest.uri or 'the manifest'} holds "
                    f"no samples of {task} (it holds {', '.join(counts) or 'nothing'}); "
                    f"set data.repeats.{name} to 0, or add the task by `python -m shards.pack`"
                )
        sizes = {
            task: np.array([shard.samples for shard in manifest.of(task)], np.int64)
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
        """Places per epoch of each degradation."""
        return tuple(n * uses for n, uses in zip(self.samples, self.repeats, strict=True))

    @property
    def epoch_samples(self) -> int:
        """Places of one epoch."""
        return sum(self.quotas)

    @property
    def description(self) -> dict[str, Any]:
        """What makes the sequence, as JSON; a checkpoint keeps it to say what has changed."""
        names = list(DEGRADATIONS)
        rows = zip(self.degradations, self.samples, self.repeats, strict=True)
        told: dict[str, Any] = {
            "version": VERSION,
            "order": self.order,
            "seed": self.seed,
            "shards": self.source,
            "degradations": {names[d]: {"samples": n, "repeats": r} for d, n, r in rows},
        }
        if self.order == "local":
            told["lanes"], told["window"] = self.lanes, self.window
        return told

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the description: equal fingerprints, equal sequences."""
        return digest(self.description)

    def refuse_changed(self, saved: dict[str, Any]) -> None:
        """ValueError that names each difference from a description saved earlier."""
        now = self.description
        changed = [
            f"{name}: {saved.get(name)} then, {now.get(name)} now"
            for name in sorted(set(saved) | set(now))
            if saved.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                "the order of samples is not the one this run began with ("
                + "; ".join(changed)
                + "); give the old values, or start a new run"
            )

    def draws(self, positions: np.ndarray) -> Draws:
        """What stands at the positions: (n,) int64, each 0 or more -> `Draws` of (n,)."""
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
                    at if self.order == "uniform" else self._near(index, use[chosen], at)
                )
        return Draws(degradation, sample, epoch, use)

    def _lane_place(self, within: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """`local`: the place that a position reads; lanes hold contiguous places, dealt out in
        turn."""
        lanes = min(self.lanes, self.epoch_samples)
        row, column = np.divmod(within, lanes)
        length, longer = divmod(self.epoch_samples, lanes)
        # The last row is not full: only the lanes that are longer by one stand in it, and they are
        # the first.
        full = row < length
        lane = column.copy()
        # Another permutation in each epoch, so that a rank's lanes and a batch's neighbours change.
        lane[full] = permute(column[full], lanes, _per_epoch(self.seed, 2, epoch[full]))
        return lane * length + np.minimum(lane, longer) + row

    def _near(self, index: int, use: np.ndarray, at: np.ndarray) -> np.ndarray:
        """`local`: the sample at place `at` of the `use`-th pass over a degradation."""
        sample = np.empty_like(at)
        for one in np.unique(use):
            chosen = np.flatnonzero(use == one)
            shuffle = _shard_order(self, index, int(one))
            sample[chosen] = shuffle.sample(at[chosen])
        return sample


class _ShardOrder(NamedTuple):
    """One pass over the shards of a task in permuted order."""

    shards: np.ndarray  # (s,) the shards in the order of this pass
    ends: np.ndarray  # (s,) how many samples they hold up to and with each
    starts: np.ndarray  # (s,) number of the first sample of each shard, not permuted
    window: int
    key: np.ndarray

    def sample(self, at: np.ndarray) -> np.ndarray:
        found = np.empty_like(at)
        which = np.searchsorted(self.ends, at, side="right") // self.window
        for window in np.unique(which):
            chosen = np.flatnonzero(which == window)
            first, last = window * self.window, min((window + 1) * self.window, len(self.ends)) - 1
            begin = self.ends[first - 1] if first else 0
            count = int(self.ends[last] - begin)
            inside = permute(at[chosen] - begin, count, key(self.key, window)) + begin
            slot = np.searchsorted(self.ends, inside, side="right")
            before = np.where(slot > 0, self.ends[slot - 1], 0)
            found[chosen] = self.starts[self.shards[slot]] + inside - before
        return found


_orders: dict[tuple[str, int, int], _ShardOrder] = {}
_ORDERS_KEPT = 1 << 25
"""Numbers in `_orders` at most: 256 MiB."""


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
    """Keys for positions; one for all where they lie in one epoch, which is the usual case and
    faster."""
    if epoch.size and (epoch == epoch[0]).all():
        return key(seed, purpose, int(epoch[0]))
    return np.broadcast_to(key(seed, purpose, epoch), epoch.shape)


def positions(
    start: int, steps: int, global_batch: int, micro_batch: int, world: int, rank: int
) -> np.ndarray:
    """The positions that a rank reads in some optimizer steps.

    `start`: samples consumed before, a multiple of the global batch. A global batch is an ordered
    list of micro-batches; rank r takes the r-th contiguous slice of them. Returns (steps,
    accumulation, micro_batch) int64.
    """
    micros, rest = divmod(global_batch, micro_batch)
    if rest or micros % world:
        raise ValueError(
            f"a global batch of {global_batch} cannot be dealt out to {world} workers in "
            "micro-batches of "
            f"{micro_batch}; it must be a multiple of {world * micro_batch}"
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


def worlds(global_batch: int, micro_batch: int) -> list[int]:
    """The worker counts that can deal out a global batch."""
    micros = global_batch // micro_batch
    return [
        n for n in itertools.takewhile(lambda n: n <= micros, itertools.count(1)) if micros % n == 0
    ]
