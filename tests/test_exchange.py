"""The exchange after each step, read at once and one step later."""

import torch

from distributed.exchange import Exchange, Step, StepSums, Upload, curve_point
from tests.ranks import run_ranks


def three_steps(late: bool) -> list[list[tuple[int, list[float], bool, list[int]]]]:
    """What a rank reads after each of three steps, and at the end."""
    import torch.distributed as dist

    rank = dist.get_rank()
    exchange = Exchange(torch.device("cpu"), late=late)
    read = []
    for number in range(1, 4):
        step = Step(8 * number, 1e-3, [f"key{number}"], False, 8 * number, 2.0)
        losses = torch.tensor([number, 1.0, 0.5, 1.0], dtype=torch.float64)
        exchange.start(
            step,
            losses,
            torch.tensor(float(number != 2)),
            wait_s=0.25,
            stops=number == 3 and rank == 1,
            noticed=number == 2 and rank == 0,
            damaged=rank,
            digests=[2**32 - number, 0] if rank == 0 else [0, number],
        )
        read.append([_row(*one) for one in exchange.finished(everything=False)])
    read.append([_row(*one) for one in exchange.finished(everything=True)])
    return read


def _row(step: Step, sums: object) -> tuple:
    return (step.samples, *sums)  # type: ignore[misc]


def test_sums_are_those_of_all_ranks_in_the_order_of_steps() -> None:
    rows = [
        (8 * n, [2.0 * n, 2.0, 1.0, 2.0], 0.5, n == 3, n == 2, 1, n != 2, [2**32 - n, n])
        for n in range(1, 4)
    ]
    for ranks in run_ranks(2, three_steps, False), run_ranks(2, three_steps, True):
        for read in ranks:
            assert [row for step in read for row in step] == rows
    at_once, late = run_ranks(1, three_steps, False)[0], run_ranks(1, three_steps, True)[0]
    assert [len(step) for step in at_once] == [1, 1, 1, 0]
    assert [len(step) for step in late] == [0, 1, 1, 1]


def test_a_point_where_all_updates_were_skipped_has_no_loss() -> None:
    step = Step(16, 1e-3, [], True, 16, 4.0)

    sums = StepSums([0.0] * 4, 1.0, False, False, 0, False, [])
    point = curve_point(step, sums, world=2, skipped=2)
    assert point["train/loss"] != point["train/loss"]
    assert point["speed/samples_per_s"] == 4.0
    assert point["speed/data_wait"] == 0.125


def test_a_cpu_computes_with_the_batch_itself() -> None:
    batch = torch.rand(2, 3)
    assert Upload(torch.device("cpu"))(batch) is batch
