"""The order of samples, tested for many world sizes without starting a process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import order
from shards.order import Plan
from shards.tasks import DEGRADATIONS


def plan(seed: int = 0, mode: str = "uniform", scale: int = 1, lanes: int = 16) -> Plan:
    """Three degradations in uneven shards; 30 x 3, 23 x 2 and 77 x 1 samples times `scale`."""
    sizes = [[7, 9, 9, 5], [5, 5, 5, 5, 3], [20, 20, 37]]
    arrays = tuple(np.tile(np.array(row), scale) for row in sizes)
    return Plan(
        degradations=(0, 3, 4),
        samples=tuple(int(row.sum()) for row in arrays),
        repeats=(3, 2, 1),
        seed=seed,
        order=mode,  # type: ignore[arg-type]
        shard_sizes=arrays,
        lanes=lanes,
    )


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_has_every_position_once(n: int, seed: int) -> None:
    reached = order.permute(np.arange(n), n, order.key(seed))
    assert np.array_equal(np.sort(reached), np.arange(n))


def test_permutations_look_like_random_ones() -> None:
    # Fixed points of a random permutation: 1 on average, whatever n. And no place may prefer
    # another: chi square of where 0..11 go under 24,000 keys.
    keys = order.key(7, np.arange(24_000))
    table = np.zeros((12, 12))
    for value in range(12):
        went = order.permute(np.full(len(keys), value), 12, keys)
        table[value] = np.bincount(went, minlength=12)
    expected = len(keys) / 12
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert np.trace(table) / len(keys) == pytest.approx(1, abs=0.05)
    assert 60 < chi2 < 190  # 121 degrees of freedom: 121 ± 4.4 standard deviations


@pytest.mark.parametrize("mode", ["uniform", "local"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_epoch_uses_each_sample_exactly_as_often_as_said(mode: str, epoch: int) -> None:
    made = plan(seed=3, mode=mode)
    at = np.arange(made.epoch_samples) + epoch * made.epoch_samples
    draws = made.draws(at)
    assert set(draws.epoch) == {epoch}
    for d, n, repeats in zip(made.degradations, made.samples, made.repeats, strict=True):
        chosen = draws.degradation == d
        assert np.array_equal(np.bincount(draws.sample[chosen], minlength=n), np.full(n, repeats))
        # `use` numbers the uses of each sample without a gap, over all epochs.
        pairs = set(zip(draws.sample[chosen], draws.use[chosen], strict=True))
        assert pairs == {(s, epoch * repeats + u) for s in range(n) for u in range(repeats)}


def test_the_papers_epoch() -> None:
    counts = {"denoise": 5144, "derain": 200, "dehaze": 72_135, "deblur": 2103, "lowlight": 485}
    repeats = (3, 3, 3, 120, 1, 5, 20)
    paper = Plan(
        degradations=tuple(range(7)),
        samples=tuple(counts[row.task] for row in DEGRADATIONS.values() if row.task in counts),
        repeats=repeats,
        seed=0,
    )
    assert paper.epoch_samples == 162_646
    draws = paper.draws(np.arange(162_646))
    drawn = np.bincount(draws.degradation)
    assert drawn[:3].sum() == 46_296
    assert drawn[3:].tolist() == [24_000, 72_135, 10_515, 9_700]
    for d, n in enumerate(paper.samples):
        assert (np.bincount(draws.sample[draws.degradation == d], minlength=n) == repeats[d]).all()


@pytest.mark.parametrize("mode", ["uniform", "local"])
def test_any_cut_of_the_positions_gives_the_same_sequence(mode: str) -> None:
    made = plan(seed=9, mode=mode)
    at = np.arange(3 * made.epoch_samples)
    whole = made.draws(at)
    for size in (1, 7, 64):
        pieces = [made.draws(at[i : i + size]) for i in range(0, 300, size)]
        for column, name in enumerate(whole._fields):
            glued = np.concatenate([piece[column] for piece in pieces])
            assert np.array_equal(glued, whole[column][: len(glued)]), name


@pytest.mark.parametrize("mode", ["uniform", "local"])
def test_epochs_and_seeds_differ(mode: str) -> None:
    made, other = plan(seed=1, mode=mode), plan(seed=2, mode=mode)
    n = made.epoch_samples
    first, second = made.draws(np.arange(n)), made.draws(np.arange(n) + n)
    foreign = other.draws(np.arange(n))
    for another in (second, foreign):
        assert (first.sample != another.sample).mean() > 0.5
    assert made.fingerprint != other.fingerprint


worlds = st.sampled_from([(48, 1), (48, 2), (48, 4), (48, 8), (64, 1), (64, 2), (96, 1), (24, 3)])


@settings(max_examples=100, deadline=None)
@given(
    sizes=worlds,
    mode=st.sampled_from(["uniform", "local"]),
    cursor=st.integers(0, 50),
    changes=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 5)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_world_changes_neither_lose_nor_repeat_nor_reorder(
    sizes: tuple[int, int],
    mode: str,
    cursor: int,
    changes: list[tuple[int, int]],
    seed: int,
) -> None:
    """A run resumed with other world sizes reads the samples of an uninterrupted run."""
    global_batch, micro = sizes
    micros = global_batch // micro
    possible = [world for world in range(1, micros + 1) if micros % world == 0]
    made = plan(seed=seed, mode=mode)
    at = start = cursor * global_batch
    read = []
    for wish, steps in changes:
        world = max(n for n in possible if n <= wish)
        ranks = [
            order.positions(at, steps, global_batch, micro, world, rank) for rank in range(world)
        ]
        assert len({block.shape for block in ranks}) == 1  # equal steps and counts
        # Put together as the optimizer does: step by step, the ranks in their order.
        read.append(np.concatenate(ranks, axis=1).reshape(-1))
        at += steps * global_batch
    positions = np.concatenate(read)
    assert np.array_equal(positions, np.arange(start, at))
    apart = [made.draws(block) for block in read]
    whole = made.draws(np.arange(start, at))
    for column in range(len(whole)):
        assert np.array_equal(np.concatenate([draws[column] for draws in apart]), whole[column])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 12"):
        order.positions(0, 1, 32, 4, 3, 0)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        order.positions(0, 1, 32, 4, 2, 2)
    with pytest.raises(ValueError, match="start is 5"):
        order.positions(5, 1, 32, 4, 2, 0)


def test_a_changed_plan_is_refused_with_what_changed() -> None:
    made = plan(seed=1)
    made.refuse_changed(made.description)
    with pytest.raises(ValueError, match=r"seed: 1 then, 2 now"):
        plan(seed=2).refuse_changed(made.description)
    with pytest.raises(ValueError, match=r"order: uniform then, local now"):
        plan(seed=1, mode="local").refuse_changed(made.description)


def test_local_order_opens_few_shards_and_mixes_each_batch() -> None:
    made = plan(seed=5, mode="local", scale=200, lanes=8)
    n = made.epoch_samples
    draws = made.draws(np.arange(n))
    starts = [np.cumsum(sizes) - sizes for sizes in made.shard_sizes]
    shard = np.empty(n, np.int64)
    for index, d in enumerate(made.degradations):
        chosen = draws.degradation == d
        found = np.searchsorted(starts[index], draws.sample[chosen], side="right")
        shard[chosen] = d * 10_000 + found
    open_at_once = [len(set(shard[i : i + 160])) for i in range(0, n, 160)]
    assert max(open_at_once) <= 2 * made.lanes * made.window
    total = len(set(shard))
    assert total > 8 * max(open_at_once)
    # Every batch meets the degradations in nearly the shares of the epoch.
    shares = np.array([q / n for q in made.quotas])
    for i in range(0, n - 64, 640):
        batch = np.array([(draws.degradation[i : i + 64] == d).mean() for d in made.degradations])
        assert np.abs(batch - shares).max() <= 0.26
