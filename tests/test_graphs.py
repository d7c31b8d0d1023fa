"""CUDA graphs of micro-batches: all but the capture, which needs a GPU (tests/gpu)."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distributed import engine as engines
from distributed import graphs, sharded_state
from distributed import optimizer as optimizers
from distributed.config import EngineConfig, Recipe, TrainConfig
from distributed.decisions import choose_graphs, decide
from distributed.graphs import GraphError, MicroBatchGraph
from distributed.session import Session
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.hardware import Decision
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.step_statistics import commit_statistics
from tests.ranks import run_ranks

SETTINGS: dict[str, Any] = {
    "micro_batch": 2,
    "crop": 16,
    "frequency_weight": 0.1,
    "bf16": False,
    "balance_weight": 1e-2,
    "loss_weight": 0.5,
}


def again(
    function: Callable[[], Any], noise: torch.Generator | None = None
) -> tuple[Callable[[], None], Any]:
    """What a graph does, without one: compute again, into the same results."""
    results = function()

    def replay() -> None:
        for kept, new in zip(tree_leaves(results), tree_leaves(function()), strict=True):
            kept.copy_(new)

    return replay, results


def small_network() -> MEASNet:
    torch.manual_seed(0)
    shallow = {
        "dim": 8,
        "num_blocks": (1, 1, 1, 1),
        "num_refinement_blocks": 1,
        "expert_path": "dense",
    }
    model = MEASNet(replace_dotted(configs.tiny(), shallow)).train()
    model.defer_statistics = True
    return model


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(graphs, "capture", again)
    monkeypatch.setattr(graphs, "side_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    return SimpleNamespace(module=small_network())


def batches(side: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.rand(2, 3, side, side, generator=generator) for _ in range(2)) for _ in range(2)
    ]


def test_a_graph_adds_up_the_gradients_that_eager_passes_give(engine: SimpleNamespace) -> None:
    model = engine.module
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [one.clone() for one in model.buffers()]
    graph = MicroBatchGraph(engine, **SETTINGS)
    assert graph.unused == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), moments, strict=True))
    assert all(p.grad is None for p in model.parameters())
    for side in (16, 16, 24):  # steps; the side of the crops may change between two
        losses, images = [], []
        for degraded, clean in batches(side):
            replayed, restoration = graph(degraded, clean)
            assert not any(one.requires_grad for one in tree_leaves((replayed, restoration)))
            losses.append(replayed.total.item())
            images.append(restoration.image.clone())
        ours = [p.grad.clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = None  # as DeepSpeed does after an update
        for (degraded, clean), loss, image in zip(batches(side), losses, images, strict=True):
            restoration = model(degraded)
            eager = restoration_loss(restoration, clean, 1e-2, 0.1)
            (eager.total * 0.5).backward()
            assert eager.total.item() == pytest.approx(loss, rel=1e-6)
            torch.testing.assert_close(image, restoration.image.detach())
        for our, p in zip(ours, model.parameters(), strict=True):
            torch.testing.assert_close(our, p.grad, rtol=1e-4, atol=1e-7)
            p.grad = None


def test_one_gradient_with_gaps_does_not_slow_down_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lists: list[int] = []
    add = graphs.foreach_add_

    def counted(kept: list[Tensor], ones: list[Tensor]) -> None:
        assert all(one.is_contiguous() for one in (*kept, *ones))
        lists.append(len(kept))
        add(kept, ones)

    monkeypatch.setattr(graphs, "foreach_add_", counted)
    padded, turned = torch.ones(4, 16)[:, :10], torch.ones(3, 5).t()
    ones = [torch.ones(3), padded, turned, torch.ones(2, 2), torch.ones(())]
    kept = [torch.full(one.shape, 2.0) for one in ones]
    graphs._add(list(zip(kept, ones, strict=True)))
    assert all((one == 3.0).all() for one in kept)
    assert lists == [3]
    graphs._add([(kept[1], padded)])
    assert lists == [3]  # an empty list is an error of torch's


def test_the_noise_of_the_official_gates_is_that_of_the_seed(engine: SimpleNamespace) -> None:
    torch.manual_seed(0)
    shallow = {"dim": 8, "num_blocks": (1, 1, 1, 1), "variant": "official"}
    model = engine.module = MEASNet(replace_dotted(configs.tiny(), shallow)).train()
    model.defer_statistics = True
    graph = MicroBatchGraph(engine, **SETTINGS)
    degraded, clean = batches()[0]

    def replayed(seed: int) -> Tensor:
        return graph(degraded, clean, seed)[1].image.clone()

    eager = model(degraded, generator=torch.Generator().manual_seed(5)).image.detach()
    torch.testing.assert_close(replayed(5), eager)
    assert torch.equal(replayed(5), replayed(5)) and not torch.equal(replayed(5), replayed(6))


def trained(graphed_ranks: int) -> dict[str, Any]:
    """Weights, moments and losses after three steps of two micro-batches in DeepSpeed's engine.

    The first `graphed_ranks` ranks have a graph. The second step is skipped: one rank has a NaN in
    its pictures.
    """
    graphs.capture, graphs.side_stream = again, lambda device: contextlib.nullcontext()
    rank, world = dist.get_rank(), dist.get_world_size()
    recipe = Recipe(samples=48, global_batch=4 * world, micro_batch=2, lr=1e-3, clip=0.05)
    config = TrainConfig(recipe=recipe, engine=EngineConfig(zero_stage=0))
    config = replace_dotted(config, {"data.crop": 16})
    decisions = decide(config, world, None)
    assert decisions.accumulation.choice == "2"
    model = small_network()
    engine = engines.initialize(config, decisions, model)
    graph = None
    if rank < graphed_ranks:
        wanted = decisions._replace(graphs=Decision("on", "the test asks for it"))
        graph, decision = graphs.graph_micro_batches(engine, config, wanted, 1 / 2)
        assert decision.choice == "on", decision.reason
    losses = []
    for step in range(3):
        for place in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * rank + place)
            degraded, clean = (torch.rand(2, 3, 16, 16, generator=generator) for _ in range(2))
            if (step, rank, place) == (1, world - 1, 0):
                degraded[0, 0, 0, 0] = float("nan")
            if graph is not None:
                result, _ = graph(degraded, clean)
            else:
                result = restoration_loss(engine(degraded), clean, recipe.balance_weight)
                engine.backward(result.total)
            engine.step()
            losses.append(result.total.item())
        commit_statistics(model, reduce=dist.all_reduce)
    adam = optimizers.guarded_optimizer(engine)
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    return {
        "weights": weights,
        "moments": sharded_state.optimizer_state(engine),
        "statistics": {n: one.clone() for n, one in model.named_buffers() if "running" in n},
        "losses": losses,
        "updates": adam.updates,
    }


@pytest.mark.parametrize(("world", "graphed_ranks"), [(1, 1), (2, 2), (2, 1)])
def test_deepspeed_trains_with_a_graph_as_without(world: int, graphed_ranks: int) -> None:
    """Gradients are added up, reduced, clipped and dropped as after eager passes.

    Also where the capture failed on one rank alone: both kinds of ranks make the same calls.
    """
    eager = run_ranks(world, trained, 0)[0]
    ours, *ours_others = run_ranks(world, trained, graphed_ranks)
    assert ours["updates"] == eager["updates"] == 2
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-4, nan_ok=True)
    before = dict(small_network().named_parameters())
    for kind in ("weights", "moments", "statistics"):
        assert ours[kind].keys() == eager[kind].keys()
        for name, value in eager[kind].items():
            torch.testing.assert_close(ours[kind][name], value, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in ours["weights"].items())
    for other in ours_others:  # all ranks hold the same
        for name, value in other["weights"].items():
            assert torch.equal(value, ours["weights"][name])


def test_a_parameter_without_a_gradient_is_named(engine: SimpleNamespace) -> None:
    engine.module.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    assert MicroBatchGraph(engine, **SETTINGS).unused == ["spare"]


def test_a_graph_that_computes_something_else_is_refused(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(
        function: Callable[[], Any], noise: torch.Generator | None
    ) -> tuple[Callable[[], None], Any]:
        replay, results = again(function)

        def both() -> None:
            replay()
            replay()

        return both, results

    monkeypatch.setattr(graphs, "capture", twice)
    moments = [one.clone() for one in engine.module.buffers()]
    with pytest.raises(GraphError, match="its gradients have the norm"):
        MicroBatchGraph(engine, **SETTINGS)
    assert all(p.grad is None for p in engine.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(engine.module.buffers(), moments, strict=True))


def test_a_failed_capture_gives_a_reason(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(function: Callable[[], Any], noise: torch.Generator | None) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", fails)
    config = TrainConfig()
    decisions = SimpleNamespace(
        graphs=SimpleNamespace(choice="on"),
        precision=SimpleNamespace(choice="fp32"),
        accumulation=SimpleNamespace(choice="1"),
    )
    small = replace_dotted(config, {"recipe.micro_batch": 1, "data.crop": 16})
    graph, decision = graphs.graph_micro_batches(engine, small, decisions, 1.0)
    assert graph is None and decision.choice == "off"
    assert "not permitted when stream is capturing)" in decision.reason


def test_a_run_goes_on_without_graphs_where_later_crops_cannot_be_captured(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = MicroBatchGraph(engine, **SETTINGS)
    said: list[str] = []
    session = SimpleNamespace(
        graph=graph,
        samples=800,
        note=lambda line, **_: said.append(line),
        _shape=torch.Size(),
        _reporter=SimpleNamespace(expect_compilation=lambda: said.append("may compile")),
    )
    same = torch.zeros(graph._degraded.shape)
    assert Session.graph_for(session, same) is graph  # type: ignore[arg-type]

    def fails(function: Callable[[], Any], noise: torch.Generator | None) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "capture", fails)
    larger = torch.zeros(*same.shape[:2], 32, 32)
    assert Session.graph_for(session, larger) is None  # type: ignore[arg-type]
    assert session.graph is None
    *compiles, line = said
    assert compiles == ["may compile"] * 2  # at the start, and at the change
    assert line.startswith("graphs: off from 800 samples on, crops of 32 (RuntimeError: out of")


@pytest.mark.parametrize(
    ("changes", "arguments", "reason"),
    [
        ({}, {}, ""),
        ({}, {"on_gpu": False}, "CPU"),
        ({"engine.cuda_graphs": "off"}, {}, "engine.cuda_graphs"),
        ({"engine.zero_stage": 1}, {}, "ZeRO stage 1"),
        ({}, {"compiled": True}, "torch.compile"),
        ({}, {"checkpointing": True}, "activation checkpointing"),
        ({"model.variant": "official"}, {}, ""),
        ({"model.routing.noise": 0.1}, {}, "noise"),
        ({"model.pixel_experts": 16, "model.pixel_top_k": 2}, {"kernels": "torch"}, "sorted"),
        ({"model.pixel_experts": 16, "model.pixel_top_k": 2}, {}, ""),
    ],
)
def test_when_a_graph_is_captured(
    changes: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    config = replace_dotted(TrainConfig(engine=EngineConfig()), changes)
    usual = {"on_gpu": True, "compiled": False, "checkpointing": False, "kernels": "triton"}
    decision = choose_graphs(config, **(usual | arguments))
    assert decision.choice == ("off" if reason else "on")
    assert reason in decision.reason
