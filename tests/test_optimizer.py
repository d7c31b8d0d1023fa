from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import engine as engines
from distributed import optimizer as optimizers
from distributed import sharded_state
from distributed.config import EngineConfig, Recipe, TrainConfig
from distributed.decisions import decide
from measnet.config import tiny
from measnet.network import MEASNet
from tests.ranks import run_ranks

RECIPE = Recipe(samples=64, global_batch=4, micro_batch=2, optimizer="muon", lr=1e-2, clip=1.0)


class _Network(nn.Module):
    """A weight of each kind: linear, stack, convolution, depthwise, bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.stack = nn.Parameter(torch.randn(3, 8, 12) / 4)
        self.stack_like = nn.Parameter(torch.randn(8, 12) / 4)
        self.output = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.depthwise(self.embed(x)))).mean((2, 3))
        stacked = torch.tanh(torch.einsum("bc,noc->bo", x, self.stack))
        y: Tensor = self.output(stacked + x @ self.stack_like.T)
        return y


def _input(step: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def _loss(network: nn.Module, x: Tensor) -> Tensor:
    return ((network(x) - x.mean((2, 3)).square()) ** 2).mean()


@pytest.mark.parametrize("shape", [(2, 16, 40), (1, 40, 16), (3, 24, 24)])
def test_singular_values_come_close_to_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    matrices[0] *= 1e4  # each matrix by its own size
    result = optimizers.orthogonalise(matrices)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.einsum("nij,nij->n", left @ right, result) / min(shape[1:])
    assert (along > 0.8).all()  # the same directions


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not optimizers.orthogonalise(torch.zeros(1, 8, 8)).any()


def test_muon_updates_the_matrices_of_the_network() -> None:
    matrices = {
        name
        for name, p in MEASNet(tiny()).named_parameters()
        if p.ndim > 1 and optimizers.is_matrix(name, p)
    }
    assert {"experts1.bank.weight_in", "encoder1.0.attention.qkv", "down1.conv.weight"} <= matrices
    assert not matrices & {"patch_embed.weight", "output.weight", "experts1.gate.weight"}
    assert not any("depthwise" in name or "prompt" in name or "bias" in name for name in matrices)


def test_stacked_weights_and_convolutions_are_updated_as_single_matrices() -> None:
    network = _Network()
    muon = optimizers.build_optimizer(network, RECIPE)
    optimizers.set_learning_rate(_Engine(muon), RECIPE.lr)
    _loss(network, _input(0)).backward()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    muon.step()
    for name, p in network.named_parameters():
        moved = (before[name] - p.detach()) / RECIPE.muon_lr
        for matrix in optimizers.as_matrices(moved) if optimizers.is_matrix(name, p) else ():
            rows, columns = matrix.shape
            values = torch.linalg.svdvals(matrix) / max(1, rows / columns) ** 0.5
            assert values.max() < 1.3, name
            assert (values > 0.3).sum() >= 3, name  # four pictures: a gradient of rank 4
        if name == "output.weight":  # Adam's first step is the sign of the gradient
            assert torch.allclose((before[name] - p).abs(), torch.tensor(RECIPE.lr), rtol=1e-2)


class _Engine:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_a_step_on_the_device_is_the_same() -> None:
    """Clipping and skipping decided without the host, here by torch's fused Adam for CPUs."""
    ends = []
    for fused in (False, True):
        network = _Network()
        named = [(n, p) for n, p in network.named_parameters()]
        muon = optimizers.GuardedMuon(
            [p for n, p in named if optimizers.is_matrix(n, p)],
            [p for n, p in named if not optimizers.is_matrix(n, p)],
            scale=2.0,
            lr=1e-2,
            weight_decay=0.1,
            decoupled_weight_decay=True,
            fused=fused,
            clip=0.05 if fused else 0.0,
            equal=True,
        )
        for step in range(4):
            x = _input(step)
            if step == 2:
                x[0, 0, 0, 0] = float("nan")
            muon.zero_grad()
            _loss(network, x).backward()
            if not fused:
                nn.utils.clip_grad_norm_(network.parameters(), 0.05)
            before = [p.detach().clone() for p in network.parameters()]
            muon.step()
            same = all(map(torch.equal, before, network.parameters()))
            assert same == (step == 2)
        assert muon.updates == 3
        ends.append([p.detach() for p in network.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class _Operations(TorchDispatchMode):
    """Counts what a GPU would start, and what the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        self.reads += func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


def test_a_step_on_the_device_starts_few_operations_and_waits_for_none() -> None:
    """Matrices of one shape are one batch, and all else is done for all matrices at once."""
    torch.manual_seed(0)
    named = list(MEASNet(tiny()).named_parameters())
    matrices = [p for n, p in named if optimizers.is_matrix(n, p)]
    others = [p for n, p in named if not optimizers.is_matrix(n, p)]
    shapes = {tuple(sorted(optimizers.as_matrices(p).shape[1:])) for p in matrices}
    muon = optimizers.GuardedMuon(
        matrices, others, scale=2.0, lr=1e-2, fused=True, clip=1.0, equal=True
    )
    for _ in range(2):
        for _, p in named:
            p.grad = torch.randn_like(p)
        with _Operations() as operations:
            muon.step()
        assert operations.reads == 0
    # The last step; in the first, the state is set up. A batch has 15 products and its norm.
    assert operations.count < 25 * len(shapes) + len(matrices)


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([5.0, 3.0, 2.0], 1, [0, 0, 0]),
        ([2.0, 5.0, 3.0], 2, [1, 0, 1]),
        ([4.0, 4.0, 4.0, 4.0], 2, [0, 1, 0, 1]),
        ([1.0], 3, [0]),
        ([], 2, []),
    ],
)
def test_the_work_is_shared_evenly(costs: list[float], ranks: int, expected: list[int]) -> None:
    assert optimizers.share(costs, ranks) == expected


def _shared_and_alone() -> list[list[Tensor]]:
    """The weights after three steps, where each rank does its part or all."""
    ends = []
    for shared in (True, False):
        network = _Network()
        muon = optimizers.build_optimizer(network, RECIPE)
        assert isinstance(muon, optimizers.GuardedMuon) and muon._shared
        muon._shared = shared
        for step in range(3):
            muon.zero_grad()
            _loss(network, _input(step)).backward()
            muon.step()
        ends.append([p.detach() for p in network.parameters()])
    return ends


def test_ranks_that_share_the_work_get_the_same_bits() -> None:
    everything = run_ranks(2, _shared_and_alone)
    (first, *_) = everything[0]
    for ends in everything:
        for weights in ends:
            assert all(map(torch.equal, weights, first))


def train_and_resume() -> dict[str, Any]:
    """Four steps, and the last two again from the state after two."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = TrainConfig(recipe=RECIPE)

    def steps(engine: Any, which: range) -> dict[str, Tensor]:
        for step in which:
            optimizers.set_learning_rate(engine, RECIPE.lr)
            for part in range(rank * 2 // world, (rank + 1) * 2 // world):
                engine.backward(_loss(engine, _input(step)[2 * part : 2 * part + 2]))
                engine.step()
        return sharded_state.weights(engine) | sharded_state.optimizer_state(engine)

    engine = engines.initialize(config, decide(config, world, None), _Network())
    middle = [steps(engine, range(2))]
    end = steps(engine, range(2, 4))
    dist.broadcast_object_list(middle, src=0)
    network = _Network()
    weights = {k: v for k, v in middle[0].items() if not k.startswith("exp_avg")}
    network.load_state_dict(weights)
    again = engines.initialize(config, decide(config, world, None), network)
    sharded_state.load_optimizer_state(again, middle[0], updates=2)
    return {"end": end, "resumed": steps(again, range(2, 4))}


def test_muon_resumes_to_the_bit_and_does_not_depend_on_the_number_of_workers() -> None:
    one, two = (run_ranks(world, train_and_resume)[0] for world in (1, 2))
    for result in (one, two):
        assert all(torch.equal(result["resumed"][name], v) for name, v in result["end"].items())
    for name, value in one["end"].items():
        torch.testing.assert_close(two["end"][name], value, rtol=1e-3, atol=1e-5)


def test_muon_with_sharded_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"muon needs whole matrices .* engine.zero_stage is 2"):
        TrainConfig(recipe=RECIPE, engine=EngineConfig(zero_stage=2))
