"""Triton kernels of the ensemble in log space: by the interpreter against torch, and compiled."""

import copy
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import pytest
import torch
from torch import Tensor, nn

from measnet.autocast import CudaAutocast
from measnet.config import ModelConfig
from measnet.official import network as official
from measnet.official.network import LogExpertBank, NoisyPixelExperts
from measnet.ops import cpu_library, gpu_library
from measnet.ops.choice import torch_only
from tests.compiled import assert_fits, compiled, interpret_bf16
from tests.test_gpu_block import assert_close
from tests.test_gpu_experts import trained

pytest.importorskip("triton")
# The interpreter takes the logarithm of 0 for the pixels that a tile has too many.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "KERNELS", {})


def noisy_experts(channels: int, experts: int, top_k: int) -> NoisyPixelExperts:
    """In evaluation: its noise cannot choose others in double precision."""
    torch.manual_seed(0)
    config = ModelConfig(variant="official", pixel_experts=experts, pixel_top_k=top_k, prompt_dim=8)
    module = NoisyPixelExperts(channels, config, used=True).eval()
    module.gate.noise.requires_grad_(False)  # no noise, no gradient
    return module


@pytest.mark.parametrize(
    ("channels", "experts", "top_k", "size"),
    [(16, 6, 2, (2, 3, 5)), (48, 3, 3, (1, 4, 5)), (32, 9, 1, (3, 1, 2))],
)
def test_experts_in_log_space_agree_with_torch(
    channels: int, experts: int, top_k: int, size: tuple[int, int, int]
) -> None:
    module = noisy_experts(channels, experts, top_k)
    for weight in (module.bank.weight_in, module.bank.weight_out, module.bank.bias_out):
        nn.init.normal_(weight, std=0.4)  # the experts differ, so their shares do
    x, prompt = torch.randn(*size, channels), torch.randn(size[0], 8)
    with torch_only():
        exact = trained(copy.deepcopy(module).double(), x.double(), prompt.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(module, x, prompt)
    assert {one.name for one in launches} == {"_log_forward", "_log_backward", "_weights_backward"}
    assert_close(ours, exact, 1e-5)


def log_ensemble(bank: LogExpertBank, x: Tensor) -> Tensor:
    """Of the first two experts alike, without a residual."""
    gate = torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(len(x), 4)
    return bank.fused(x, gate, torch.zeros_like(x), 2)


@pytest.mark.parametrize(
    ("output", "expected"), [(500.0, 500.0), (-90.0, -90.0), (-200.0, official.LOG_FLOOR)]
)
def test_an_ensemble_in_log_space_neither_overflows_nor_vanishes(
    output: float, expected: float
) -> None:
    bank, x = LogExpertBank(4, 16, 16), torch.randn(10, 16)
    nn.init.zeros_(bank.weight_out)
    nn.init.constant_(bank.bias_out, output)
    with gpu_library.stand_in("cpu"):
        out = log_ensemble(bank, x)
        out.sum().backward()
    torch.testing.assert_close(out, torch.full_like(x, expected))
    of_bias = bank.bias_out.grad
    assert of_bias is not None
    share = 5.0 if output == expected else 0.0  # ten pixels; the floor has no gradient
    torch.testing.assert_close(of_bias[:2], torch.full((2, 16), share))
    assert not of_bias[2:].any()


def test_damage_in_log_space_is_not_hidden() -> None:
    bank, x = LogExpertBank(4, 16, 16), torch.randn(3, 16)
    nn.init.constant_(bank.bias_out, float("nan"))
    with gpu_library.stand_in("cpu"):
        assert log_ensemble(bank, x).isnan().all()
        gates = torch.full((3, 4), float("nan"))
        assert bank.fused(x, gates, torch.zeros_like(x), 2).isnan().all()


def test_an_ensemble_under_autocast_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_bf16(monkeypatch)
    module = noisy_experts(16, 3, 3)  # all chosen: rounding cannot choose others
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


def test_nothing_is_kept_without_gradients() -> None:
    bank = LogExpertBank(4, 16, 16)
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches, torch.no_grad():
        log_ensemble(bank, torch.randn(3, 16))
    assert [one.constants["KEEP"] for one in launches] == [False]


def step_at_full_width() -> None:
    """Start the kernels as the full network does, on `meta`: only level 1 has this ensemble."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(8, 128, 128, 48, device="meta", dtype=dtype, requires_grad=True)
        features, use = noisy_experts(48, 6, 2).to("meta")(x, x.new_empty(8, 8).float())
        assert features.shape == x.shape
        (features.sum() + use.balance).backward()
        assert x.grad is not None
        assert x.grad.is_meta


def test_kernels_compile_for_three_cards() -> None:
    assert_fits(compiled("tests.test_gpu_log_experts:step_at_full_width", 80, 89, 90))
