"""The transformer block's Triton kernels: by the interpreter against torch, and compiled."""

import copy
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import pytest
import torch
from torch import Tensor, nn

from measnet import config as configs
from measnet.autocast import CudaAutocast
from measnet.config import replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import cpu_library, gpu_library
from measnet.ops.attention import attend_planes
from measnet.ops.choice import torch_only
from measnet.transformer import TransformerBlock
from tests.compiled import assert_fits, compiled, interpret_bf16, variants

pytest.importorskip("triton")

from measnet.ops.gpu.correlation import WIDEST_TILE
from measnet.ops.gpu.gated import WIDEST as WIDEST_GATED

# Batch, height, width, channels, heads: narrower than a tile; parts of tiles in both directions;
# several heads, and channels that no tile divides; one pixel; heads that are too wide for one tile.
SHAPES = [
    (2, 2, 3, 48, 1),
    (1, 5, 17, 32, 2),
    (2, 1, 2, 80, 5),
    (1, 1, 1, 16, 1),
    (2, 3, 4, 96, 1),
    (1, 2, 5, 160, 2),
]
WIDTHS = {
    "48": (48, 128, 1),
    "96": (96, 128, 2),
    "192": (192, 32, 4),
    "384": (384, 16, 8),
    "decoder": (96, 128, 1),
}
"""Channels, side of the features and heads in the full network at crops of 128. The last blocks of
the decoder have twice the channels of the first of the encoder, and as few heads."""
WIDEST = {"768": (768, 16, 8), "1024": (1024, 16, 16)}
"""The same of networks that are twice as wide, and as wide as `gpu_library.WIDEST`."""


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second for each program, so there are several of few rows."""
    from measnet.ops.gpu import correlation, depthwise

    monkeypatch.setattr(cpu_library, "KERNELS", {})
    for module in (depthwise, correlation):
        monkeypatch.setattr(module, "ROWS", 4)


def trained(function: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of the inputs and of every parameter."""
    inputs = tuple(one.detach().clone().requires_grad_() for one in inputs)
    out = function(*inputs)
    grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).to(out).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (*inputs, *function.parameters()), grad)]


def assert_close(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for our, one in zip(ours, exact, strict=True):
        limit = tolerance * one.abs().max().item()
        torch.testing.assert_close(our.double(), one.double(), rtol=0, atol=limit)


def block_and_input(shape: tuple[int, ...]) -> tuple[TransformerBlock, Tensor]:
    torch.manual_seed(0)
    *sizes, heads = shape
    block = TransformerBlock(sizes[-1], heads, 2.66)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(*sizes) + 2.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_agrees_with_torch(shape: tuple[int, ...]) -> None:
    block, x = block_and_input(shape)
    with torch_only():
        exact = trained(copy.deepcopy(block).double(), x.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(block, x)
    names = {one.name for one in launches}
    assert names >= {"_norm_project", "_multiply", "_gate"}
    assert ("_gate_project" in names) == (shape[3] <= WIDEST_GATED)
    assert "_correlate" in names
    assert ("_correlate_back_half" in names) == (shape[3] // shape[4] > WIDEST_TILE)
    assert_close(ours, exact, 1e-5)


def test_a_block_under_autocast_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_bf16(monkeypatch)
    block, x = block_and_input((1, 3, 5, 48, 1))
    with torch_only():
        exact = trained(copy.deepcopy(block).double(), x.double())
    with torch_only(), torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        plain = trained(block, x)
    with gpu_library.stand_in("cpu"), torch.autocast("cpu", torch.bfloat16):
        ours = trained(block, x)
    assert ours[0].dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in ours[1:])
    for our, theirs, one in zip(ours, plain, exact, strict=True):
        error, usual = ((got.double() - one).norm() / one.norm() for got in (our, theirs))
        # The gradient of a temperature is one sum that cancels: its rounding depends on the
        # processor, and one value says little about the usual error.
        assert error <= 1.5 * usual + (0.05 if one.numel() == 1 else 0.005)


class Planes(nn.Module):
    """Attention of planes that come from anything."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise = nn.Parameter(torch.randn(3, channels, 1, 3, 3))
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.project_out = nn.Parameter(torch.randn(channels, channels))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_planes(q, k, v, self.depthwise, self.temperature, self.project_out)


def test_attention_of_three_planes_agrees_with_torch() -> None:
    planes = Planes(32, 2)
    inputs = [torch.randn(2, 5, 6, 32) for _ in range(3)]
    with torch_only():
        exact = trained(copy.deepcopy(planes).double(), *(one.double() for one in inputs))
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(planes, *inputs)
    assert launches
    names = ["out", "q", "k", "v", *(name for name, _ in planes.named_parameters())]
    for name, our, one in zip(names, ours, exact, strict=True):
        # The gradient of a temperature is one sum that cancels.
        assert_close([our], [one], 3e-5 if name == "temperature" else 1e-5)


def test_a_plane_of_zeros_has_finite_gradients() -> None:
    planes = Planes(16, 1)
    zeros = torch.zeros(1, 3, 3, 16)
    with gpu_library.stand_in("cpu"):
        assert all(one.isfinite().all() for one in trained(planes, zeros, zeros, zeros))


def test_which_work_the_kernels_take() -> None:
    x, weight = torch.randn(1, 4, 4, 48), torch.randn(48, 48)
    assert not gpu_library.fits(x, weight)  # it lies on the CPU
    with gpu_library.stand_in("cpu"):
        assert gpu_library.fits(x, weight)
        assert not gpu_library.fits(x.double(), weight)
        assert not gpu_library.fits(x[..., :40], weight)  # not a multiple of 16
        assert not gpu_library.fits(x, weight, heads=2)  # 24 channels a head
        assert not gpu_library.fits(torch.randn(1, 2, 2, 2048), weight)
        wide = torch.randn(1, 2, 2, 256)
        assert gpu_library.fits(wide, weight)
        assert gpu_library.fits(wide, weight, heads=2)
        assert not gpu_library.fits(wide, weight, heads=1)  # too wide for one head
        assert not gpu_library.fits(x[:0], weight)
        with torch_only():
            assert not gpu_library.fits(x, weight)
        partitioned = nn.Parameter(weight)
        partitioned.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks them
        assert not gpu_library.fits(x, partitioned)


def test_without_a_working_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from measnet.ops.gpu import trial

    assert trial.doubles(torch.device("cpu"))

    def fails(device: torch.device) -> bool:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trial, "doubles", fails)
    choose = gpu_library.choice.__wrapped__  # without what it remembers
    chosen = choose(torch.device("cuda"))
    assert chosen.choice == "torch"
    assert "RuntimeError: Failed to find C compiler.)" in chosen.reason
    assert "gcc python3-dev" in chosen.reason
    monkeypatch.setattr(trial, "doubles", lambda device: True)
    assert choose(torch.device("cuda")).choice == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in choose(torch.device("cuda")).reason


def step_at_full_width(
    dtype: torch.dtype = torch.bfloat16, widths: tuple[str, ...] = ("48", "384", "decoder")
) -> None:
    """Start all kernels of blocks of the full network, forward and backward, on `meta`."""
    for width in widths:
        channels, side, heads = (WIDTHS | WIDEST)[width]
        block = TransformerBlock(channels, heads, 2.66).to("meta")
        shape = (8, side, side, channels)
        x = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        out = block(x)
        torch.autograd.grad(out, (x, *block.parameters()), torch.empty_like(out))


def every_step_at_full_width() -> None:
    """The same for every width, and in fp32 too; also for the most channels that kernels take."""
    for dtype in (torch.bfloat16, torch.float32):
        step_at_full_width(dtype, (*WIDTHS, *WIDEST))


def test_kernels_compile_for_three_cards() -> None:
    assert_fits(compiled("tests.test_gpu_block:step_at_full_width", 80, 89, 90))


@pytest.mark.slow
def test_kernels_of_all_widths_and_types_compile() -> None:
    assert_fits(compiled("tests.test_gpu_block:every_step_at_full_width", 80, 89, 90))


def whole_networks(batch: int = 2, height: int = 128, width: int = 128) -> None:
    """Start what both networks start, at full width with one block of each kind, on `meta`."""
    for variant in (configs.paper(), configs.official()):
        shallow = {"num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "expert_path": "dense"}
        with torch.device("meta"):
            network = MEASNet(replace_dotted(variant, shallow)).train()
        pictures = torch.empty(batch, 3, height, width, device="meta")
        for enabled in (True, False):
            with (
                CudaAutocast(),
                torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False),
            ):
                restoration = network(pictures)
            restoration_loss(restoration, pictures, 1e-4).total.backward()


@pytest.mark.slow
def test_all_kernels_of_the_full_networks_compile() -> None:
    assert_fits(compiled("tests.test_gpu_block:whole_networks", 80, 89, 90))


def whole_networks_of_another_size() -> None:
    """The same of a picture whose sides no tile divides, at any level."""
    whole_networks(1, 104, 88)


def test_pictures_of_all_sizes_share_what_was_compiled() -> None:
    """A picture of a new size must not wait for compilers; one kernel of training alone may."""
    sizes = ("whole_networks", "whole_networks_of_another_size")
    one, other = (variants(f"tests.test_gpu_block:{size}") for size in sizes)
    assert {name.split()[0] for name in one ^ other} <= {"_norm_project_back"}
    assert len(one) > 50


def test_a_block_moves_little_memory() -> None:
    """Counted in tensors as large as the features: forward some 30, with backward some 115.

    Torch's own operations move more than twice as much.
    """
    with gpu_library.stand_in("meta"), gpu_library.counting() as launches:
        step_at_full_width(widths=("96",))
    features = 8 * 128 * 128 * 96 * 2
    assert sum(one.bytes for one in launches) / features < 120
    assert len(launches) <= 20
