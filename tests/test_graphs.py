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

from distributed import graphs
from distributed.config import EngineConfig, TrainConfig
from distributed.decisions import choose_graphs
from distributed.graphs import GraphError, MicroBatchGraph
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet

SETTINGS: dict[str, Any] = {
    "micro_batch": 2,
    "crop": 16,
    "bf16": False,
    "balance_weight": 1e-2,
    "loss_weight": 0.5,
}


def again(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What a graph does, without one: compute again, into the same results."""
    results = function()

    def replay() -> None:
        for kept, new in zip(tree_leaves(results), tree_leaves(function()), strict=True):
            kept.copy_(new)

    return replay, results


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(graphs, "capture", again)
    monkeypatch.setattr(graphs, "side_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    shallow = {
        "dim": 8,
        "num_blocks": (1, 1, 1, 1),
        "num_refinement_blocks": 1,
        "expert_path": "dense",
    }
    model = MEASNet(replace_dotted(configs.tiny(), shallow)).train()
    model.defer_statistics = True
    return SimpleNamespace(module=model)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.rand(2, 3, 16, 16, generator=generator) for _ in range(2)) for _ in range(2)
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
    for _ in range(2):  # steps
        losses, images = [], []
        for degraded, clean in batches():
            replayed, restoration = graph(degraded, clean)
            losses.append(replayed.total.item())
            images.append(restoration.image.clone())
        ours = [p.grad.clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = None  # as DeepSpeed does after an update
        for (degraded, clean), loss, image in zip(batches(), losses, images, strict=True):
            restoration = model(degraded)
            eager = restoration_loss(restoration, clean, 1e-2)
            (eager.total * 0.5).backward()
            assert eager.total.item() == pytest.approx(loss, rel=1e-6)
            torch.testing.assert_close(image, restoration.image.detach())
        for our, p in zip(ours, model.parameters(), strict=True):
            torch.testing.assert_close(our, p.grad, rtol=1e-4, atol=1e-7)
            p.grad = None


def test_a_parameter_without_a_gradient_is_named(engine: SimpleNamespace) -> None:
    engine.module.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    assert MicroBatchGraph(engine, **SETTINGS).unused == ["spare"]


def test_a_graph_that_computes_something_else_is_refused(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
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
    def fails(function: Callable[[], Any]) -> None:
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


@pytest.mark.parametrize(
    ("changes", "arguments", "reason"),
    [
        ({}, {}, ""),
        ({}, {"on_gpu": False}, "CPU"),
        ({"engine.cuda_graphs": "off"}, {}, "engine.cuda_graphs"),
        ({"engine.zero_stage": 1}, {}, "ZeRO stage 1"),
        ({}, {"compiled": True}, "torch.compile"),
        ({}, {"checkpointing": True}, "activation checkpointing"),
        ({"model.variant": "official"}, {}, "noise"),
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
