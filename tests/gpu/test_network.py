"""The network on a card against the same network on the CPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distributed import evaluate as evaluation
from measnet import config as configs
from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.tiling import restore

pytestmark = pytest.mark.gpu

Figure = Callable[[str, float], None]
VALUE, GRADIENT = 1e-5, 5e-3
"""Largest difference of images over their maximum; of a gradient over its norm."""
BF16 = 2**-7
"""Distance of neighbouring bf16 numbers, over their size."""


class Step(NamedTuple):
    """What one forward and backward pass gives, on the CPU."""

    image: Tensor
    loss: float
    gradients: dict[str, Tensor]


def size(config: ModelConfig, gpu: torch.device) -> ModelConfig:
    """The whole network on a card; where that is tried on a CPU, a small one."""
    if gpu.type == "cuda":
        return config
    return replace_dotted(configs.tiny(), {"variant": config.variant})


def build(config: ModelConfig, path: str = "dense") -> MEASNet:
    torch.manual_seed(0)
    return MEASNet(replace_dotted(config, {"expert_path": path}))


def train(model: MEASNet, device: torch.device, *, bf16: bool = False) -> Step:
    model = copy.deepcopy(model).to(device)
    generator = torch.Generator().manual_seed(1)
    image, clean = (torch.rand(2, 3, 64, 64, generator=generator).to(device) for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        restoration = model(image, generator=generator)  # on the CPU: the same noise everywhere
    losses = restoration_loss(restoration, clean, 1e-4)
    losses.total.backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return Step(restoration.image.detach().cpu(), losses.total.item(), gradients)


def differences(ours: Step, theirs: Step) -> tuple[float, float]:
    """Of the images over their maximum; the largest of a gradient over its norm."""
    image = ((ours.image - theirs.image).abs().max() / theirs.image.abs().max()).item()
    assert ours.gradients.keys() == theirs.gradients.keys()
    whole = torch.stack([g.norm() for g in theirs.gradients.values()]).norm()
    relative = [
        # Below a millionth of all gradients, one is what rounding leaves of larger terms.
        (ours.gradients[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-6 * whole)
        for name, gradient in theirs.gradients.items()
    ]
    return image, torch.stack(relative).max().item()


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_card_computes_what_a_cpu_computes(
    gpu: torch.device, figure: Figure, variant: str
) -> None:
    model = build(size(getattr(configs, variant)(), gpu))
    image, gradient = differences(train(model, gpu), train(model, torch.device("cpu")))
    figure(f"{variant}_image_from_cpu", image)
    figure(f"{variant}_gradient_from_cpu", gradient)
    assert image < VALUE and gradient < GRADIENT


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_dense_and_the_sorted_experts_agree(
    gpu: torch.device, figure: Figure, variant: str
) -> None:
    config = size(getattr(configs, variant)(), gpu)
    dense, by_expert = (train(build(config, path), gpu) for path in ("dense", "sorted"))
    image, gradient = differences(dense, by_expert)
    figure(f"{variant}_image_dense_from_sorted", image)
    figure(f"{variant}_gradient_dense_from_sorted", gradient)
    assert image < VALUE and gradient < GRADIENT


@pytest.mark.parametrize("path", ["dense", "sorted"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_bf16_is_near_fp32(gpu: torch.device, figure: Figure, variant: str, path: str) -> None:
    model = build(size(getattr(configs, variant)(), gpu), path)
    exact, rounded = (train(model, gpu, bf16=bf16) for bf16 in (False, True))
    error = abs(rounded.loss / exact.loss - 1)
    figure(f"{variant}_{path}_bf16_loss_from_fp32", error)
    assert error < BF16
    assert all(torch.isfinite(gradient).all() for gradient in rounded.gradients.values())


# --- Pictures in tiles ---


class Same(nn.Linear):
    """Gives back its input: no part looks beyond a tile, so tiles must give the whole."""

    def forward(self, image: Tensor) -> object:  # type: ignore[override]
        return type("Restoration", (), {"image": image, "routing": {}})


@pytest.mark.parametrize("where", ["cpu", "card"])
def test_tiles_cover_the_picture_once(gpu: torch.device, where: str) -> None:
    image = torch.rand(3, 150, 100, device=gpu if where == "card" else "cpu")
    model = Same(1, 1).to(gpu)
    restored = restore(model, image, tile=64, overlap=20)  # type: ignore[arg-type]
    assert restored.device.type == image.device.type
    torch.testing.assert_close(restored, image)


def test_tiles_on_a_card_are_those_of_a_cpu(gpu: torch.device, figure: Figure) -> None:
    model, image = build(configs.tiny()).eval(), torch.rand(3, 150, 100)
    expected = restore(model, image, tile=64, overlap=20)
    model.to(gpu)
    worst = 0.0
    for where in ("cpu", gpu):
        restored = restore(model, image.to(where), tile=64, overlap=20).cpu()
        worst = max(worst, (restored - expected).abs().max().item())
    figure("tiles_from_cpu", worst)
    assert worst < VALUE


# --- The benchmark protocol ---


def test_a_checkpoint_scores_the_same(
    gpu: torch.device, figure: Figure, packed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    build(size(configs.paper(), gpu), "auto").save_pretrained(path)
    scores = [
        evaluation.evaluate(
            evaluation.load(str(path), device), str(packed / "test"), None, limit=1
        ).scores
        for device in (torch.device("cpu"), gpu)
    ]
    worst = max(abs(a.restored_psnr - b.restored_psnr) for a, b in zip(*scores, strict=True))
    figure("psnr_db_from_cpu", worst)
    assert len(scores[0]) == 7
    assert worst < 0.005
