"""Restoring whole and in tiles: the results, their device, and the memory."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from measnet import config as configs
from measnet.config import ModelConfig, replace_dotted
from measnet.memory import Memory, inference
from measnet.network import MEASNet, Restoration
from measnet.tiling import (
    LEAST_TILE,
    OVERLAP,
    FeatureMemory,
    Tiling,
    choose_tile,
    choose_tiling,
    full_precision,
    pixels_at_once,
    restore,
    restore_routed,
    smaller_tile,
)
from measnet.transformer import ChannelAttention, TransformerBlock

GB = 10**9
SMALL = replace_dotted(configs.tiny(), {"dim": 8})
BLENDED = replace_dotted(SMALL, {"variant": "official"})
"""A network whose tiles overlap and are blended."""


@pytest.fixture(scope="module")
def model() -> MEASNet:
    torch.manual_seed(0)
    return MEASNet(SMALL).eval()


class Same(torch.nn.Linear):
    """Gives back its input, and notes the sizes that it was given."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sizes: list[tuple[int, int]] = []

    def forward(self, image: Tensor) -> Restoration:  # type: ignore[override]
        self.sizes.append((image.shape[-2], image.shape[-1]))
        return Restoration(image, torch.zeros(()), {}, torch.zeros(()))


@pytest.fixture(scope="module")
def blended() -> MEASNet:
    torch.manual_seed(0)
    return MEASNet(BLENDED).eval()


class LittleMemory(MEASNet):
    """Runs out of memory, as a GPU does, where it is given more than `most` pixels."""

    most = 0

    def forward(self, image: Tensor, **options: Any) -> Restoration:
        if image.shape[0] * image.shape[-2:].numel() > self.most:
            raise torch.OutOfMemoryError("this device is full")
        return super().forward(image, **options)


# --- What is given back ---


def test_at_once_is_the_network_clamped(model: MEASNet) -> None:
    batch = torch.rand(2, 3, 21, 30)
    with torch.no_grad():
        expected = model(batch).image.clamp(0, 1)
    torch.testing.assert_close(restore(model, batch), expected)
    torch.testing.assert_close(restore(model, batch[0]), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(restore(model, batch, tile=30, overlap=4), expected)
    assert restore(model, torch.rand(3, OVERLAP, 20)).shape == (3, OVERLAP, 20)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (32, 0), (17, 16), (64, 20)])
def test_tiles_cover_the_picture_once(tile: int, overlap: int) -> None:
    """With a network that returns its input, blended tiles give the picture itself."""
    network, image = Same(), torch.rand(2, 3, 75, 50)
    out = restore(network, image, tile=tile, overlap=overlap)  # type: ignore[arg-type]
    torch.testing.assert_close(out, image)
    assert max(max(size) for size in network.sizes) <= tile  # memory is bounded


def test_blended_tiles_are_near_the_whole(blended: MEASNet) -> None:
    image = torch.rand(3, 140, 180)
    whole, tiled = restore(blended, image), restore(blended, image, tile=96, overlap=16)
    assert (whole - tiled).abs().mean() < 0.25 * (whole - image).abs().mean()


def test_routing_is_the_mean_over_blended_tiles_by_their_area(blended: MEASNet) -> None:
    image = torch.rand(2, 3, 80, 128)
    done = restore_routed(blended, image, tile=80, overlap=32)
    with torch.no_grad():
        left, right = (blended(image[..., at : at + 80]).routing for at in (0, 48))
    for name, shares in done.routing.items():
        torch.testing.assert_close(shares, (left[name] + right[name]).double() / 2)
    assert (done.tile, done.overlap) == (80, 32)


def test_a_batch_in_exact_tiles_is_the_batch_whole(model: MEASNet) -> None:
    image = torch.rand(2, 3, 40, 70)
    whole, tiled = restore_routed(model, image), restore_routed(model, image, tile=24)
    torch.testing.assert_close(tiled.image, whole.image, rtol=0, atol=1e-5)
    assert tiled.routing.keys() == whole.routing.keys()
    for name, shares in tiled.routing.items():
        torch.testing.assert_close(shares, whole.routing[name], rtol=0, atol=1e-3)
    assert (tiled.tile, tiled.overlap) == (24, 0)


def test_wrong_arguments(blended: MEASNet) -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        restore(blended, torch.rand(1, 20, 20))
    with pytest.raises(ValueError, match="overlap is 32"):
        restore(blended, torch.rand(3, 20, 20), tile=32, overlap=32)


# --- On a GPU ---


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch has no autocast on `meta`, which refuses tensors of the CPU as a GPU does."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    yield


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("tile", [None, 64])
def test_all_is_on_the_device(variant: str, tile: int | None) -> None:
    config = replace_dotted(configs.tiny(), {"variant": variant, "expert_path": "dense"})
    on_device = MEASNet(config).eval().to("meta")
    for shape in ((3, 70, 150), (2, 3, 70, 150)):
        image = torch.rand(shape, device="meta")
        done = restore(on_device, image, tile=tile, overlap=16)
        assert done.device.type == "meta" and done.shape == shape


def test_figures_are_computed_in_fp32(model: MEASNet) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    seen = []

    class Looks(MEASNet):
        def forward(self, image: Tensor, **options: Any) -> Restoration:
            seen.append((products.fp32_precision, convolutions.fp32_precision))
            return super().forward(image, **options)

    before = (products.fp32_precision, convolutions.fp32_precision)
    assert before[1] == "tf32"  # torch's default
    restore(Looks(SMALL).eval(), torch.rand(3, 20, 20))
    assert seen == [("ieee", "ieee")]
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert (products.fp32_precision, convolutions.fp32_precision) == before


@pytest.mark.parametrize(("variant", "tile"), [("paper", None), ("paper", 24), ("official", 80)])
def test_bf16_is_near_fp32_also_in_tiles_and_files(
    variant: str, tile: int | None, tmp_path: Path
) -> None:
    network = MEASNet.from_pretrained("small") if variant == "paper" else MEASNet(BLENDED).eval()
    image = torch.rand(3, 40, 70) if variant == "paper" else torch.rand(3, 96, 112)
    seen = set()
    for module in network.modules():  # features between the parts of the network
        if isinstance(module, TransformerBlock | ChannelAttention):
            module.register_forward_hook(lambda *given: seen.add(given[2].dtype))
    memory = FeatureMemory(ram=0, folder=tmp_path)
    exact, rounded = (
        restore_routed(network, image, tile=tile, overlap=16, precision=precision, memory=memory)
        for precision in ("fp32", "bf16")
    )
    assert rounded.image.dtype == torch.float32
    assert torch.bfloat16 in seen
    apart = (rounded.image - exact.image).square().mean().sqrt()
    assert 0 < apart < 0.02
    assert not list(tmp_path.iterdir())


# --- Out of memory ---


def test_smaller_tiles_are_tried_where_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    network = LittleMemory(BLENDED).eval()
    network.most = 140 * 140
    image = torch.rand(3, 130, 260)
    with caplog.at_level(logging.WARNING):
        done = restore_routed(network, image)
    assert (done.tile, done.overlap) == (128, 32)
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory: 260×130 pixels do not fit whole; trying again with tiles of 128"
    ]
    torch.testing.assert_close(done.image, restore(network, image, tile=128, overlap=32))
    assert sum(done.routing["encoder1"][0]) == pytest.approx(SMALL.pixel_top_k)


def test_the_least_tile_that_does_not_fit_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        restore(LittleMemory(BLENDED).eval(), torch.rand(3, 300, 420))
    assert len(caplog.records) == 2  # 192, 128


@pytest.mark.parametrize(
    ("side", "smaller"), [(4000, 1984), (1024, 512), (300, 128), (129, 128), (128, None)]
)
def test_sides_are_halved(side: int, smaller: int | None) -> None:
    assert smaller_tile(side) == smaller


# --- How much fits ---


@pytest.mark.parametrize("card", [4, 8, 16, 24, 80])
@pytest.mark.parametrize("taken", [0.5, 2, 3.9])
@pytest.mark.parametrize(
    ("height", "width"), [(481, 321), (1080, 1920), (3000, 4000), (400, 8000), (100, 100)]
)
def test_tiles_fit_the_card_and_are_the_largest(
    card: int, taken: float, height: int, width: int
) -> None:
    """`taken` GB of a card of `card` GB are not free."""
    memory, free = Memory(115_000_000, 216_268.0, 6316.0), (card - taken) * GB
    at_once = pixels_at_once(memory, free)
    tile = choose_tile(height, width, at_once)

    def takes(side: int) -> float:
        return memory.constant + memory.per_pixel * min(side, height) * min(side, width)

    if tile is None:
        assert takes(max(height, width)) <= 0.9 * free or max(height, width) <= LEAST_TILE
        return
    assert tile % 64 == 0 and LEAST_TILE <= tile < max(height, width)
    assert takes(tile) <= 0.9 * free or tile == LEAST_TILE
    assert takes(tile + 64) > 0.9 * free


@pytest.mark.parametrize(
    ("free", "height", "width", "expected"),
    [
        (0, 1080, 1920, 128),  # nothing is free: the least, and memory may still run out
        (2, 1080, 1920, 512),
        (8, 1080, 1920, 1024),
        (24, 1080, 1920, None),
        (24, 3000, 4000, 1792),
        (80, 3000, 4000, 3776),
        (2, 128, 120, None),  # no tile is smaller
    ],
)
def test_tiles_by_free_memory(free: int, height: int, width: int, expected: int | None) -> None:
    at_once = pixels_at_once(Memory(0, 0.0, 6316.0), free * GB)
    assert choose_tile(height, width, at_once) == expected


def test_the_users_tiles_win(model: MEASNet, blended: MEASNet) -> None:
    asked = choose_tiling(model, tile=128, overlap=16)
    assert asked.side(100, 300) == 128 and asked.side(100, 128) is None
    assert asked.decision == ("tiles of 128 pixels", "asked for")
    with pytest.raises(ValueError, match="overlap is 64"):
        choose_tiling(blended, tile=32, overlap=64)


def test_processes_share_the_memory_of_a_cpu(model: MEASNet) -> None:
    one, four = (choose_tiling(model, processes=n) for n in (1, 4))
    assert four.at_once == pytest.approx(one.at_once / 4, rel=0.3)  # others use memory too
    assert "GB of memory is free" in one.decision.reason
    assert Tiling(at_once=10_000).side(100, 100) is None


MEASURE = """
import sys, torch
from measnet import config
from measnet.network import MEASNet
from measnet.tiling import restore
torch.set_num_threads(2)
preset, height, width = sys.argv[1], *map(int, sys.argv[2:])
model = MEASNet(getattr(config, preset)()).eval()
restore(model, torch.rand(3, 32, 32))  # libraries are loaded
def resident(field):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field))
before = resident("VmRSS")
restore(model, torch.rand(3, height, width))
print((resident("VmHWM") - before) * 1024)
"""


def check_inference(preset: str, height: int, width: int) -> None:
    # An allocator that keeps what was freed would be measured instead of the network.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, preset, str(height), str(width)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    config: ModelConfig = getattr(configs, preset)()
    memory = inference(config, "cpu")
    predicted = memory.constant + memory.per_pixel * height * width
    assert predicted == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_inference() -> None:
    check_inference("tiny", 400, 600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_memory_of_inference_of_more(preset: str) -> None:
    check_inference(preset, 480, 640)


def test_predicting_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    inference.__wrapped__(SMALL, "cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("experts", [4, 16])
def test_memory_on_a_gpu_does_not_grow_with_the_experts(experts: int) -> None:
    """All experts are computed there, but for a limited number of pixels at a time."""
    changed = replace_dotted(configs.tiny(), {"pixel_experts": experts, "expert_path": "dense"})
    few = inference(configs.tiny(), "cuda")
    assert inference(changed, "cuda").per_pixel == pytest.approx(few.per_pixel, rel=0.1)
