import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import engine as engines
from distributed import optimizer as optimizers
from distributed import sharded_state
from distributed.config import EngineConfig, Recipe, TrainConfig
from distributed.decisions import decide
from distributed.schedule import learning_rate
from distributed.sharded_state import WeightAverage
from tests.ranks import run_ranks

RECIPE = Recipe(
    samples=800, global_batch=8, micro_batch=2, lr=1e-2, warmup_samples=80, ema_decay=0.9, clip=1.0
)


def test_learning_rate_warms_up_from_above_zero_and_falls_to_zero() -> None:
    rates = [learning_rate(RECIPE, s) for s in range(0, 801, 8)]
    assert rates[0] == pytest.approx(RECIPE.lr * 8 / 80)
    assert max(rates) == pytest.approx(RECIPE.lr)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    half = learning_rate(RECIPE, 80 + 720 // 2)
    assert half == pytest.approx(RECIPE.lr * 0.5 * (1 + math.cos(math.pi / 2)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_nothing_is_left_to_deepspeeds_defaults() -> None:
    config = TrainConfig(recipe=RECIPE, engine=EngineConfig(precision="bf16"))
    settings = engines.deepspeed_config(config, decide(config, 2, None), 2)
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == RECIPE.clip
    # Named as safe for bf16, a module's gradients would be reduced in bf16, with a second bucket.
    assert settings["torch_autocast"]["lower_precision_safe_modules"] == []
    assert settings["zero_optimization"]["reduce_bucket_size"] * 4 <= 64 * 2**20


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 5, bias=False), nn.Linear(5, 3)
    )


def _steps(engine: Any, average: WeightAverage, steps: range, poison: int) -> list[float]:
    """Mean loss of each step; step `poison` has a NaN on the last rank only."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = RECIPE.micro_batches // world
    means = []
    for step in steps:
        optimizers.set_learning_rate(engine, learning_rate(RECIPE, step * RECIPE.global_batch))
        updates = optimizers.guarded_optimizer(engine).updates
        total = torch.zeros(1, dtype=torch.float64)
        for place in range(rank * share, (rank + 1) * share):
            noise = torch.Generator().manual_seed(1000 * step + place)
            x = torch.randn(RECIPE.micro_batch, 7, generator=noise)
            y = x[:, :3] ** 2
            if step == poison and rank == world - 1:
                x = x * float("nan")
            loss = (engine(x) - y).abs().mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / RECIPE.micro_batches
        if optimizers.guarded_optimizer(engine).updates > updates:
            average.update(updates + 1)
        dist.all_reduce(total)
        means.append(total.item())
    return means


def _state(engine: Any, average: WeightAverage) -> dict[str, dict[str, torch.Tensor]]:
    with average.in_place():
        averaged = sharded_state.weights(engine)
    return {
        "weights": sharded_state.weights(engine),
        "ema": averaged,
        "optimizer": sharded_state.optimizer_state(engine),
    }


def train_and_resume(stages: list[int], precision: str) -> list[dict[str, Any]]:
    """Six steps in one go, and again with a new engine from the state after three, per ZeRO
    stage."""
    results = []
    for stage in stages:
        config = TrainConfig(
            recipe=RECIPE, engine=EngineConfig(zero_stage=stage, precision=precision)
        )
        decisions = decide(config, dist.get_world_size(), None)
        engine = engines.initialize(config, decisions, _network())
        average = sharded_state.WeightAverage(engine, RECIPE.ema_decay)
        losses = _steps(engine, average, range(3), poison=2)
        middle = _state(engine, average)
        updates = optimizers.guarded_optimizer(engine).updates
        later = _steps(engine, average, range(3, 6), poison=-1)

        shared = [middle]
        dist.broadcast_object_list(shared, src=0)
        network = _network()
        network.load_state_dict(shared[0]["weights"])
        again = engines.initialize(config, decisions, network)
        average_again = sharded_state.WeightAverage(again, RECIPE.ema_decay)
        sharded_state.load_optimizer_state(again, shared[0]["optimizer"], updates)
        average_again.load(shared[0]["ema"])
        resumed = _steps(again, average_again, range(3, 6), poison=-1)
        results.append(
            {
                "losses": losses + later,
                "resumed": resumed,
                "updates": optimizers.guarded_optimizer(engine).updates,
                "end": _state(engine, average),
                "end_resumed": _state(again, average_again),
            }
        )
    return results


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[kind].keys() == b[kind].keys()
        and all(torch.equal(a[kind][n], b[kind][n]) for n in a[kind])
        for kind in a
    )


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    """World size -> results of ZeRO 0, 1, 2, 3 on rank 0."""
    return {w: run_ranks(w, train_and_resume, [0, 1, 2, 3], "fp32")[0] for w in (1, 2)}


def test_resume_is_bit_identical_in_every_stage(runs: dict[int, list[dict[str, Any]]]) -> None:
    for results in runs.values():
        for stage, result in enumerate(results):
            assert result["resumed"] == result["losses"][3:], f"stage {stage}"
            assert _same(result["end"], result["end_resumed"]), f"stage {stage}"
            assert len(result["end"]["optimizer"]) == 2 * 8 - 2  # two moments of seven parameters


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(
    runs: dict[int, list[dict[str, Any]]],
) -> None:
    for results in runs.values():
        for result in results:
            assert math.isnan(result["losses"][2])
            assert all(map(math.isfinite, result["losses"][3:]))
            assert result["updates"] == 5


def test_stages_and_worlds_agree(runs: dict[int, list[dict[str, Any]]]) -> None:
    reference = runs[1][0]
    for results in runs.values():
        for result in results:
            assert result["losses"][3:] == pytest.approx(reference["losses"][3:], rel=1e-5)
            for kind, tensors in reference["end"].items():
                for name, tensor in tensors.items():
                    torch.testing.assert_close(
                        result["end"][kind][name], tensor, rtol=1e-4, atol=1e-6
                    )


def test_state_of_another_network_is_refused_by_name() -> None:
    with pytest.raises(Exception, match=r"no exp_avg\.0\.weight"):
        run_ranks(1, _load_foreign_state)


def _load_foreign_state() -> None:
    config = TrainConfig(recipe=RECIPE, engine=EngineConfig(zero_stage=0))
    decisions = decide(config, 1, None)
    engine = engines.initialize(config, decisions, _network())
    sharded_state.load_optimizer_state(engine, {"exp_avg.other": torch.zeros(1)}, 1)


def test_no_start_waits_for_torchs_compiler() -> None:
    """Engine, step and update do not import it, because that takes two seconds."""
    (steps,) = run_ranks(1, _compilers_after_steps)
    assert steps == {0: [], 1: [], 2: []}


def _compilers_after_steps() -> dict[int, list[str]]:
    found = {}
    for stage in (0, 1, 2):
        config = TrainConfig(recipe=RECIPE, engine=EngineConfig(zero_stage=stage))
        engine = engines.initialize(config, decide(config, 1, None), _network())
        _steps(engine, sharded_state.WeightAverage(engine, RECIPE.ema_decay), range(2), poison=-1)
        found[stage] = sorted({"torch._dynamo", "torch._inductor", "mlflow"} & set(sys.modules))
    return found


def test_a_gpu_clips_skips_and_averages_as_a_cpu_does() -> None:
    """What is decided on the device, here by torch's fused Adam for CPUs."""
    clip, decay = 0.05, 0.9
    results = []
    for fused in (False, True):
        network = _network()
        adam = optimizers.GuardedAdam(
            network.parameters(), lr=1e-2, fused=fused, clip=clip if fused else 0.0, equal=True
        )
        average = WeightAverage(SimpleNamespace(module=network), decay)
        for step in range(5):
            x = torch.randn(2, 7, generator=torch.Generator().manual_seed(step))
            if step == 2:
                x[0, 0] = float("nan")
            adam.zero_grad()
            (network(x) ** 2).mean().backward()
            if not fused:  # as DeepSpeed does it before the step
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            before = adam.updates
            adam.step()
            assert adam.updates == before + (step != 2)
            assert adam.applied.item() == (step != 2)
            if fused:
                average.update_on_device(adam)
            elif step != 2:
                average.update(adam.updates)
        results.append([*network.parameters(), *average._average])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class _Reads(TorchDispatchMode):
    """Counts numbers that the host reads from tensors; on a GPU it waits for each of them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fused", "expected"), [(True, 0), (False, 1)])
def test_the_host_reads_nothing_to_clip_and_skip_on_the_device(fused: bool, expected: int) -> None:
    """`meta` has no fused Adam, so the reads are counted on a CPU."""
    network = _network()
    adam = optimizers.GuardedAdam(
        network.parameters(), lr=1e-2, fused=fused, clip=0.05 * fused, equal=True
    )
    average = WeightAverage(SimpleNamespace(module=network), 0.9)
    for scale in (1.0, float("nan")):  # an update, and one that is skipped
        adam.zero_grad()
        (network(scale * torch.ones(2, 7)) ** 2).mean().backward()
        with _Reads() as reads:
            adam.step()
            if fused:
                average.update_on_device(adam)
        # Adam for CPUs also reads the step of each updated weight; they are numbers of the host.
        own = reads.count if fused or scale != scale else reads.count - len(list(adam.state))
        assert own == expected


def test_clipping_is_left_to_the_fused_optimizer_on_a_gpu_alone() -> None:
    for stage, device, ours in ((0, "cuda", True), (0, "cpu", False), (1, "cuda", False)):
        config = TrainConfig(recipe=RECIPE, engine=EngineConfig(zero_stage=stage))
        settings = engines.deepspeed_config(config, decide(config, 1, None), 1, device)
        assert settings["gradient_clipping"] == (0.0 if ours else RECIPE.clip)
        assert settings["timers"]["throughput"]["enabled"] is False
