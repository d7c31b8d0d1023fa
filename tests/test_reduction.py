"""Gradients of several ranks are added up during the backward pass, as DeepSpeed does after it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import engine as engines
from distributed import reduction, sharded_state
from distributed.config import Recipe, TrainConfig
from distributed.decisions import choose_reduction, decide
from distributed.optimizer import guarded_optimizer
from distributed.reduction import divide
from measnet.hardware import Decision
from tests.ranks import run_ranks

WIDTH = 13


@pytest.mark.parametrize(
    ("sizes", "buckets", "least", "expected"),
    [
        ([4, 4, 4, 4], 2, 1, [range(0, 2), range(2, 4)]),
        ([4, 4, 4, 4], 2, 12, [range(0, 3), range(3, 4)]),
        ([4, 4, 4, 4], 8, 1, [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),
        ([1, 100, 1, 1], 4, 1, [range(0, 2), range(2, 4)]),
        ([3], 8, 1, [range(0, 1)]),
        ([5, 5], 8, 100, [range(0, 2)]),
    ],
)
def test_how_parameters_share_buckets(
    sizes: list[int], buckets: int, least: int, expected: list[range]
) -> None:
    assert divide(sizes, buckets, least) == expected


class _Network(nn.Module):
    """Layers of odd sizes; `some` is used on rank 0 alone, `last.never` on none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.some = nn.Parameter(torch.randn(5, 1))
        self.last = nn.Linear(WIDTH, 3)
        self.last.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = torch.tanh(layer(x)) + x
        x = self.last(x)
        return x + self.some.square().mean() if dist.get_rank() == 0 else x


def _config(world: int, accumulation: int = 2) -> TrainConfig:
    batch = 2 * accumulation * world
    recipe = Recipe(samples=20 * batch, global_batch=batch, micro_batch=2, lr=1e-2, clip=0.5)
    return TrainConfig(recipe=recipe)


def _engine(config: TrainConfig, network: nn.Module, *, overlap: bool = True) -> Any:
    decisions = decide(config, dist.get_world_size(), None)
    return engines.initialize(config, decisions, network, overlap=overlap)


def _step(engine: Any, step: int, accumulation: int = 2) -> list[Tensor]:
    """The gradients before the update."""
    for place in range(accumulation):
        seed = 100 * step + 10 * dist.get_rank() + place
        x = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).to(engine.device)
        if (step, dist.get_rank(), place) == (1, 0, 0):
            x[0, 0] = float("nan")
        engine.backward((engine(x) - x[:, :3] ** 2).square().mean())
        held = [p.grad for p in engine.module.parameters() if p.grad is not None]
        gradients = [one.to("cpu", copy=True) for one in held]
        engine.step()
    return gradients


def compare(device_type: str = "cpu") -> dict[str, Any]:
    """Four steps with and without overlap, of which the second is skipped; two more resumed."""
    reduction.LEAST_BUCKET = 64
    device = torch.device(device_type, dist.get_rank() if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    config = _config(dist.get_world_size())
    ours, theirs = (
        _engine(config, _Network().to(device), overlap=overlap) for overlap in (True, False)
    )
    gradients = [(_step(ours, step), _step(theirs, step)) for step in range(2)]
    state = [sharded_state.weights(ours), sharded_state.optimizer_state(ours)]
    updates = guarded_optimizer(ours).updates
    dist.broadcast_object_list(state, src=0)
    gradients += [(_step(ours, step), _step(theirs, step)) for step in range(2, 4)]
    network = _Network().to(device)
    network.load_state_dict(state[0])
    resumed = _engine(config, network)
    sharded_state.load_optimizer_state(resumed, state[1], updates)
    for step in range(2, 4):
        _step(resumed, step)
    return {
        "gradients": gradients,
        "updates": [guarded_optimizer(one).updates for one in (ours, theirs)],
        "weights": [sharded_state.weights(one) for one in (ours, theirs, resumed)],
    }


@pytest.mark.parametrize("world", [2, 3])
def test_the_gradients_are_those_of_deepspeed(world: int) -> None:
    """To the bit for two ranks; of more, an all-reduce adds up in an order of its own.

    With accumulation, clipping, a skipped update, and weights that only some ranks use.
    """
    assert_the_same(run_ranks(world, compare), exactly=world == 2)


def assert_the_same(ranks: list[dict[str, Any]], *, exactly: bool) -> None:
    """What `compare` gave on each rank."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-7}
    for rank in ranks:
        assert rank["updates"] == [3, 3]
        for ours, theirs in rank["gradients"]:
            torch.testing.assert_close(ours, theirs, **tolerance, equal_nan=True)
        ours, theirs, resumed = rank["weights"]
        torch.testing.assert_close(ours, theirs, **tolerance)
        assert all(torch.equal(resumed[name], ours[name]) for name in ours)
        assert all(torch.equal(ours[name], ranks[0]["weights"][0][name]) for name in ours)


def _events() -> tuple[list[list[str]], int]:
    """What happens in three steps: all-reduces that start, and the gradient of the first layer."""
    reduction.LEAST_BUCKET = 64
    engine = _engine(_config(dist.get_world_size()), _Network())
    events: list[str] = []
    start = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("async_op"):
            events.append("reduce")
        return start(tensor, *args, **options)

    dist.all_reduce = all_reduce
    engine.module.first.weight.register_hook(lambda _: events.append("first layer"))
    steps = []
    for step in (0, 2, 3):
        events.clear()
        _step(engine, step)
        steps.append(list(events))
    sizes = [p.numel() for p in reversed(list(engine.module.parameters()))]
    return steps, len(divide(sizes, reduction.BUCKETS, reduction.LEAST_BUCKET))


def test_all_reduces_start_before_the_backward_pass_ends() -> None:
    """Only in the last micro-batch of a step.

    In the first step the unused parameter, which is in the first bucket, makes all others wait.
    Then its bucket goes last.
    """
    for steps, buckets in run_ranks(2, _events):
        assert buckets >= 4
        assert steps[0] == ["first layer", "first layer", *["reduce"] * buckets]
        for events in steps[1:]:
            assert events[0] == "first layer"
            assert events.count("reduce") == buckets
            assert events.index("first layer", 1) >= 1 + buckets - 3  # the first and last are late


def _alone() -> tuple[list[bool], list[bool]]:
    engine = _engine(_config(1), _Network())
    dropped = []
    for step in (0, 2):
        _step(engine, step)
        dropped.append(all(p.grad is None for p in engine.module.parameters()))
    hooks = [bool(p._post_accumulate_grad_hooks) for p in engine.module.parameters()]
    return dropped, hooks


def test_a_single_rank_has_no_buckets() -> None:
    ((dropped, hooks),) = run_ranks(1, _alone)
    assert all(dropped) and not any(hooks)


ON, OFF = Decision("on", ""), Decision("off", "")


@pytest.mark.parametrize(
    ("stage", "world", "graphs", "choice"),
    [
        (0, 1, OFF, "none"),
        (0, 2, OFF, "during the backward pass"),
        (0, 2, ON, "after the backward pass"),
        (2, 2, OFF, "by DeepSpeed"),
    ],
)
def test_what_the_log_says(stage: int, world: int, graphs: Decision, choice: str) -> None:
    assert choose_reduction(stage, world, graphs).choice == choice
