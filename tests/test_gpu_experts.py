"""Triton kernels of experts, their gates and FD: by the interpreter against torch, and compiled."""

import contextlib
import copy
import os
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import pytest
import torch
from torch import Tensor, nn

from measnet.autocast import CudaAutocast
from measnet.experts import PixelExperts, Use
from measnet.frequency import PictureExperts
from measnet.ops import cpu_library, gpu_library
from measnet.ops.choice import torch_only
from measnet.ops.low_pass import low_pass
from measnet.ops.whole import Incomplete, Totals
from tests.compiled import assert_fits, compiled, interpret_bf16
from tests.test_gpu_block import assert_close

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpreterBuilder

from measnet.ops.gpu.experts import by_choice, tile_sizes


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from measnet.ops.gpu import depthwise

    monkeypatch.setattr(cpu_library, "KERNELS", {})
    monkeypatch.setattr(depthwise, "ROWS", 4)


def pixel_experts(channels: int, experts: int, top_k: int) -> PixelExperts:
    torch.manual_seed(0)
    sizes = {"experts": experts, "top_k": top_k, "expansion": 2.66}
    return PixelExperts(channels, **sizes, prompt_length=8, path="dense")


def trained(module: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    """Features, balance, shares; gradients of the features and balance."""
    x = x.detach().clone().requires_grad_()
    features, rest = module(x, *others)
    if isinstance(rest, Use):
        rest = [one for one in (rest.balance, rest.shares) if one is not None]
    else:
        rest = [rest]
    wanted = torch.sin(torch.arange(features.numel(), dtype=torch.float64)).to(features)
    total = (features * wanted.view(features.shape)).sum()
    if rest[0].requires_grad:
        total = total + rest[0]
    gradients = torch.autograd.grad(
        total, (x, *(p for p in module.parameters() if p.requires_grad))
    )
    return [features.detach(), *(one.detach() for one in rest), *gradients]


@pytest.mark.parametrize(
    ("channels", "experts", "top_k", "size"),
    [(16, 6, 2, (2, 3, 5)), (48, 3, 3, (1, 4, 5)), (32, 17, 1, (3, 1, 2))],
)
def test_pixel_experts_agree_with_torch(
    channels: int, experts: int, top_k: int, size: tuple[int, int, int]
) -> None:
    module = pixel_experts(channels, experts, top_k)
    x, prompt = torch.randn(*size, channels), torch.randn(size[0], 8)
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double(), prompt.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(module, x, prompt)
    (started,) = (one for one in launches if one.name == "_backward")
    assert started.constants["SORTED"] == (experts >= 3 * top_k)
    names = {one.name for one in launches}
    assert names == {
        *("_route", "_route_back", "_forward", "_backward", "_weights_backward"),
        "_weight_gradient",  # of the outputs' biases
    }
    assert_close(ours, exact, 1e-5)


def test_pixels_in_order_of_their_choice() -> None:
    gates = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.2], [0.0, 0.1, 0.9], [0.3, 0.0, 0.7]])
    assert by_choice(gates).tolist() == [1, 3, 0, 2]  # 101, 101, 110, 110 in bits
    wide = torch.zeros(4, 64)
    wide[0, 63] = wide[1, 0] = wide[2, 63] = wide[3, 40] = 1.0
    assert by_choice(wide).tolist() in ([0, 2, 1, 3], [1, 3, 0, 2])


def test_fewer_products_if_pixels_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of pixel chooses one expert, and neighbours are of different kinds."""
    from measnet.ops.gpu import experts as kernels

    monkeypatch.setattr(kernels, "tile_sizes", lambda x, n, rows: tile_sizes(x, n, 2))
    module = pixel_experts(16, 3, 1)
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[:3] = 9 * torch.eye(3)
    pixels = torch.eye(16)[torch.arange(48) % 3].view(1, 1, 48, 16)
    product, calls, done = InterpreterBuilder.create_dot, [0], []

    def counted(*given: Any) -> Any:
        calls[0] += 1
        return product(*given)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    for sort_from in (3, 1000):
        monkeypatch.setattr(kernels, "SORT_FROM", sort_from)
        calls[0] = 0
        with gpu_library.stand_in("cpu"), torch.no_grad():
            features = module(pixels, torch.zeros(1, 8)).features
        done.append((features, calls[0]))
    (ordered, few), (as_they_lie, many) = done
    torch.testing.assert_close(ordered, as_they_lie)
    assert 2 * few < many


def test_an_expert_that_no_pixel_chooses_has_a_gradient_of_zero() -> None:
    module = pixel_experts(16, 4, 1)
    with torch.no_grad():
        module.gate.weight[:, 2:] = 0.0
        module.gate.weight[:16, 0] = 9.0
        module.gate.weight[:16, 1] = -9.0
    with gpu_library.stand_in("cpu"):
        features, use = module(torch.rand(1, 4, 4, 16), torch.zeros(1, 8))
        features.sum().backward()
    assert use.shares[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    for weight in (module.bank.weight_in, module.bank.bias_in, module.bank.weight_out):
        assert weight.grad is not None
        assert weight.grad[0].abs().sum() > 0
        assert weight.grad[1:].abs().sum() == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("experts", [3, 4])  # with and without a padded lane
def test_damaged_gates_are_not_hidden(experts: int) -> None:
    x, prompt = torch.randn(1, 3, 3, 16), torch.randn(1, 8)
    pixels = pixel_experts(16, experts, 2)
    pictures = PictureExperts(16, experts=experts, top_k=2, path="dense")
    for weight in (pixels.gate.weight, pictures.gate):
        nn.init.constant_(weight, float("nan"))
    with gpu_library.stand_in("cpu"):
        for module, others in ((pixels, [prompt]), (pictures, [])):
            features, *rest = trained(module, x, *others)
            assert features.isnan().all()
            of_x, *of_weights = rest[2 if module is pixels else 1 :]
            assert of_x.isnan().all()
            assert all(one.isnan().any() for one in of_weights)


def test_experts_under_autocast_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_bf16(monkeypatch)
    module = pixel_experts(16, 3, 3)  # all chosen: rounding cannot choose others
    x, prompt = torch.randn(1, 3, 5, 16).bfloat16(), torch.randn(1, 8)
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double(), prompt.double())
    with torch_only(), torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        plain = trained(module, x, prompt)
    with gpu_library.stand_in("cpu"), torch.autocast("cpu", torch.bfloat16):
        ours = trained(module, x, prompt)
    assert ours[0].dtype == torch.bfloat16
    for our, theirs, one in zip(ours, plain, exact, strict=True):
        error, usual = ((got.double() - one).norm() for got in (our, theirs))
        assert error <= 1.5 * usual + 0.005 * one.norm()


@pytest.mark.parametrize(("channels", "size"), [(32, (3, 2, 5)), (16, (1, 5, 17)), (80, (2, 1, 1))])
def test_picture_experts_agree_with_torch(channels: int, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    module = PictureExperts(channels, experts=5, top_k=2, path="dense")
    for parameter in (module.norm.weight, module.norm.bias):
        nn.init.normal_(parameter)
    x = torch.randn(*size, channels) + 2.0
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(module, x)
    one_pixel = size[1:] == (1, 1)  # the gates of a picture are those of a pixel
    assert [one.name for one in launches] == [
        *("_statistics", "_convolve", "_multiply", "_forward", "_backward", "_weights_backward"),
        *(["_weight_gradient"] if one_pixel else []),
        *("_modulate_back", "_weight_gradient", "_convolve_back", "_norm_back"),
    ]
    assert_close(ours, exact, 1e-5)


def test_picture_experts_under_autocast_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_bf16(monkeypatch)
    torch.manual_seed(0)
    module = PictureExperts(32, experts=3, top_k=3, path="dense")
    x = torch.randn(2, 3, 5, 32).bfloat16()
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double())
    with torch_only(), torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        plain = trained(module, x)
    with gpu_library.stand_in("cpu"), torch.autocast("cpu", torch.bfloat16):
        ours = trained(module, x)
    assert ours[0].dtype == torch.bfloat16
    for our, theirs, one in zip(ours, plain, exact, strict=True):
        error, usual = ((got.double() - one).norm() for got in (our, theirs))
        assert error <= 1.5 * usual + 0.005 * one.norm()


@pytest.mark.parametrize("gates_of", ["pixels", "pictures"])
def test_gradients_of_the_outputs_biases_are_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, gates_of: str
) -> None:
    from measnet.ops.gpu.experts import _bias_gradient

    interpret_bf16(monkeypatch)
    torch.manual_seed(0)
    gradient = (1 + torch.rand(2, 5, 60, 16)).bfloat16()
    gates = torch.rand(600 if gates_of == "pixels" else 2, 3).bfloat16().float()
    each = gates if gates_of == "pixels" else gates.repeat_interleave(300, 0)
    exact = each.double().t() @ gradient.flatten(0, -2).double()
    with gpu_library.stand_in("cpu"):
        ours = _bias_gradient(gates, gradient)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_picture_experts_in_parts_are_those_of_the_whole() -> None:
    """The mean over a picture is not known in one pass over its parts: torch's path takes over."""
    torch.manual_seed(0)
    module = PictureExperts(16, experts=3, top_k=2, path="dense")
    x, totals = torch.randn(1, 4, 6, 16), Totals()
    with gpu_library.stand_in("cpu"), torch.no_grad():
        whole = module(x).features
        for _ in range(2):
            with totals.part(slice(None), slice(None)), contextlib.suppress(Incomplete):
                part = module(x).features
            totals.complete()
    torch.testing.assert_close(part, whole)


class Split(nn.Module):
    """FD's filter with taps that are trained."""

    def __init__(self, batch: int, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.taps = nn.Parameter(torch.rand(batch, channels, 9))

    def forward(self, x_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low_pass(x_bhwc, self.taps)
        return low + 2 * high, high.detach()


# Twice the same pixel on either side of an edge; tiles in both directions; two columns.
@pytest.mark.parametrize("shape", [(2, 2, 2, 16), (1, 9, 17, 16), (2, 3, 2, 48), (1, 5, 3, 16)])
def test_low_pass_agrees_with_torch(shape: tuple[int, int, int, int]) -> None:
    module, x = Split(shape[0], shape[3]), torch.randn(shape)
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(module, x)
    assert len(launches) == 2  # forward and backward, for all pictures
    assert_close(ours, exact, 1e-5)


@pytest.mark.parametrize("size", [(1, 5), (5, 1)])
def test_a_single_row_or_column_has_nothing_to_reflect(size: tuple[int, int]) -> None:
    with (
        gpu_library.stand_in("cpu"),
        pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels .* needs 2x2"),
    ):
        low_pass(torch.randn(1, *size, 16), torch.randn(1, 16, 9))


WIDTHS = {48: 128, 96: 64, 192: 32}
"""Channels -> side, as in the full network at crops of 128."""


def step_at_full_width(
    dtype: torch.dtype = torch.bfloat16, widths: tuple[int, ...] = (48, 192)
) -> None:
    """Start all kernels of experts and FD of the full network, on `meta`."""
    for channels in widths:
        side = WIDTHS[channels]
        x = torch.empty(8, side, side, channels, device="meta", dtype=dtype, requires_grad=True)
        prompt = torch.empty(8, 8, device="meta")
        features, use = pixel_experts(channels, 6, 2).to("meta")(x, prompt)
        pictures = PictureExperts(channels, experts=5, top_k=2, path="dense").to("meta")
        low, high = low_pass(x, torch.empty(8, channels, 9, device="meta", requires_grad=True))
        total = features.sum() + use.balance + (low + high).sum()
        if dtype == torch.bfloat16:  # in fp32 the convolution of `meta` is torch's
            total = total + pictures(x.to(dtype))[0].sum()
        total.backward()


def every_step_at_full_width() -> None:
    """In fp32 too, for as many channels as the kernels take there."""
    step_at_full_width(widths=tuple(WIDTHS))
    step_at_full_width(torch.float32, (48, 96))


def test_kernels_compile_for_a_card() -> None:
    assert_fits(compiled("tests.test_gpu_experts:step_at_full_width", 89))


@pytest.mark.slow
def test_kernels_of_both_types_compile_for_three_cards() -> None:
    assert_fits(compiled("tests.test_gpu_experts:every_step_at_full_width", 80, 89, 90))
