"""Triton's kernels and CUDA graphs on a card, against torch's own operations there."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import graphs
from distributed.exchange import Upload
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import gpu_library
from measnet.ops.choice import torch_only
from tests import chaos
from tests.gpu.test_network import BF16, GRADIENT, VALUE, build, differences, size, train
from tests.gpu.test_training import OPTIONS, distance, log

pytestmark = pytest.mark.gpu

Figure = Callable[[str, float], None]


def test_the_kernels_run_on_this_card(gpu: torch.device) -> None:
    if gpu.type != "cuda":
        pytest.skip("needs a card")
    chosen = gpu_library.choice(gpu)
    assert chosen.choice == "triton", chosen.reason
    model = build(configs.paper()).to(gpu)
    with gpu_library.counting() as launches:
        model(torch.rand(1, 3, 64, 64, device=gpu))
    assert len(launches) > 300


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_kernels_compute_what_torch_computes(
    gpu: torch.device, figure: Figure, variant: str
) -> None:
    model = build(size(getattr(configs, variant)(), gpu))
    with torch_only():
        theirs = train(model, gpu)
        rounded = train(model, gpu, bf16=True)
    image, gradient = differences(train(model, gpu), theirs)
    figure(f"{variant}_image_kernels_from_torch", image)
    figure(f"{variant}_gradient_kernels_from_torch", gradient)
    assert image < VALUE and gradient < GRADIENT
    ours = train(model, gpu, bf16=True)
    figure(f"{variant}_bf16_loss_kernels_from_torch", abs(ours.loss / rounded.loss - 1))
    assert abs(ours.loss / theirs.loss - 1) < BF16


def curve(
    gpu: torch.device, variant: str, seed: int, *, kernels: bool, bf16: bool, steps: int
) -> torch.Tensor:
    """Losses of a short training on pictures that are the same for all."""
    torch.manual_seed(seed)
    shallow = {"num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "expert_path": "dense"}
    config = size(getattr(configs, variant)(), gpu)
    model = MEASNet(replace_dotted(config, shallow)).to(gpu).train()
    noise = torch.Generator(gpu).manual_seed(seed)  # of the gates of official
    adam = torch.optim.AdamW(model.parameters(), lr=2e-4)
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.rand(8, 3, 8, 8, generator=generator), size=(64, 64), mode="bicubic"
    ).clamp(0, 1)
    losses = []
    with nullcontext() if kernels else torch_only():
        for _ in range(steps):
            chosen = smooth[torch.randint(8, (4,), generator=generator)]
            noisy = chosen + 0.1 * torch.randn(chosen.shape, generator=generator)
            with torch.autocast(gpu.type, torch.bfloat16, enabled=bf16):
                restoration = model(noisy.to(gpu), generator=noise)
            loss = restoration_loss(restoration, chosen.to(gpu), 1e-4).total
            loss.backward()
            adam.step()
            adam.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_with_the_kernels_is_the_same_training(
    gpu: torch.device, figure: Figure, variant: str, seed: int
) -> None:
    """The mean loss of the last fifth, with and without them, in bf16 and in fp32."""
    steps = 300 if gpu.type == "cuda" else 5
    ends = {
        (kernels, bf16): curve(gpu, variant, seed, kernels=kernels, bf16=bf16, steps=steps)[
            -steps // 5 :
        ]
        for kernels in (False, True)
        for bf16 in (False, True)
    }
    exact = ends[False, False].mean().item()
    for (kernels, bf16), losses in ends.items():
        apart = losses.mean().item() / exact - 1
        name = f"{'kernels' if kernels else 'torch'}_{'bf16' if bf16 else 'fp32'}"
        figure(f"{variant}_loss_after_{steps}_steps_seed_{seed}_{name}_from_exact", apart)
        assert abs(apart) < 0.05


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_graph_computes_what_eager_passes_compute(
    variant: str, gpu: torch.device, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.type != "cuda":
        pytest.skip("needs a card; tests/test_graphs.py has what a CPU can show")
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    model = build(getattr(configs, variant)()).to(gpu).train()
    model.defer_statistics = True
    engine: Any = SimpleNamespace(module=model)
    graph = graphs.MicroBatchGraph(
        engine, micro_batch=2, crop=64, bf16=True, balance_weight=1e-4, loss_weight=0.5
    )
    assert graph.forward_share is not None and 0.1 < graph.forward_share < 0.9
    pictures = [torch.rand(2, 3, 64, 64, device=gpu) for _ in range(2)]
    losses = [graph(one, one.flip(-1), seed)[0].total.item() for seed, one in enumerate(pictures)]
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    for seed, (one, loss) in enumerate(zip(pictures, losses, strict=True)):
        noise = torch.Generator(gpu).manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            restoration = model(one, generator=noise)
        eager = restoration_loss(restoration, one.flip(-1), 1e-4).total
        (0.5 * eager).backward()
        assert eager.item() == pytest.approx(loss, rel=1e-3)
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    between = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
    apart = (between / torch.stack([b.norm() for b in theirs]).norm()).item()
    figure(f"gradient_graph_from_eager_{variant}", apart)
    assert apart < 1e-2


def test_a_run_with_graphs_trains_as_one_without(
    gpu: torch.device, figure: Figure, tmp_path: Path, packed: Path
) -> None:
    """Through Ray and DeepSpeed; the log says which of the two it is."""
    ends = {}
    for graphs_ in ("auto", "off"):
        (tmp_path / graphs_).mkdir()
        more = ("--engine.cuda-graphs", graphs_)
        environment = {"RAY_AUTH_MODE": "disabled"}
        run = chaos.Run(tmp_path / graphs_, packed, environment, *OPTIONS, *more)
        assert run.end() == 0, log(run)
        on = gpu.type == "cuda" and graphs_ == "auto"
        assert f"graphs: {'on' if on else 'off'}" in log(run)
        ends[graphs_] = chaos.final_state(tmp_path / graphs_)
    between = distance(ends["auto"]["weights"], ends["off"]["weights"])
    figure("weights_with_graphs_from_without", between)
    assert ends["auto"]["consumed"] == ends["off"]["consumed"]
    assert between < 1e-3


def test_micro_batches_are_copied_while_the_card_computes(gpu: torch.device) -> None:
    if gpu.type != "cuda":
        pytest.skip("needs a card")
    upload = Upload(gpu)
    factor = torch.rand(4096, 4096, device=gpu)
    sums = []
    for number in range(20):
        for _ in range(10):
            torch.mm(factor, factor)
        copied = upload(torch.full((8, 3, 128, 128), float(number)))
        sums.append(copied.double().sum())
        del copied
    assert upload._stream is not None
    upload._stream.synchronize()
    busy = not torch.cuda.current_stream(gpu).query()
    assert busy, "the last copy waited for the products before it"
    assert torch.stack(sums).tolist() == [number * 8 * 3 * 128 * 128 for number in range(20)]


def test_a_card_makes_the_same_floats_of_bytes_as_a_cpu(gpu: torch.device) -> None:
    upload = Upload(gpu)
    grey = torch.arange(256, dtype=torch.uint8).expand(2, 3, 16, 256).contiguous()
    for shift in range(2 * Upload.SLOTS):
        given = grey.roll(shift, -1)
        assert torch.equal(upload(given).cpu(), given / 255)
    assert torch.equal(upload(grey[:1]).cpu(), grey[:1] / 255)  # another shape


def test_after_a_failed_capture_the_allocator_works_as_before(gpu: torch.device) -> None:
    if gpu.type != "cuda":
        pytest.skip("needs the allocator of a card")
    stream, number = torch.cuda.current_stream(), torch.ones(1, device=gpu)

    def waits() -> float:
        return (number * 2).item()  # a capture may not wait for the card

    with pytest.raises(RuntimeError):
        graphs.capture(waits)
    assert torch.cuda.current_stream() == stream
    upload = Upload(gpu)
    batch = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    used = []
    for _ in range(100):
        upload(batch)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert max(used[50:]) <= max(used[:50])
