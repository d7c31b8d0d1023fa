"""Per-pixel experts against a plain version of Eq. 2-6, by the dense and the sorted path."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from measnet import experts
from measnet.experts import ExpertBank, PixelExperts, resolve_path
from measnet.official.network import LogExpertBank
from measnet.selection import squared_variation

PATHS = ["dense", "sorted"]


def library(path: str, *, experts: int = 5, top_k: int = 2, prompt: int | None = 7) -> PixelExperts:
    torch.manual_seed(3)
    return PixelExperts(
        6, experts=experts, top_k=top_k, expansion=2.66, prompt_length=prompt, path=path
    )


def plain(x_bhwc: Tensor, prompt_bm: Tensor, module: PixelExperts) -> tuple[Tensor, Tensor]:
    """Eq. 2-6 as printed, pixel by pixel: the features and the balance loss."""
    bank, out, losses = module.bank, torch.zeros_like(x_bhwc), []
    experts = module.experts
    for b, picture in enumerate(x_bhwc):
        total, chosen = torch.zeros(experts), torch.zeros(experts)
        prompt_c = module.gate.to_channels(prompt_bm[b])
        for i, j in torch.cartesian_prod(*(torch.arange(n) for n in picture.shape[:2])).tolist():
            pixel = picture[i, j]
            w = torch.softmax(torch.cat([pixel, prompt_c]) @ module.gate.weight, dim=0)  # Eq. 2
            for n in w.argsort(descending=True)[: module.top_k].tolist():
                hidden = F.gelu(bank.weight_in[n] @ pixel + bank.bias_in[n])
                expert = bank.weight_out[n] @ hidden + bank.bias_out[n]
                out[b, i, j] = out[b, i, j] + w[n] * expert  # Eq. 3, not renormalised
                chosen[n] += 1  # Eq. 5
            total = total + w  # Eq. 4
        for load in (total, chosen):  # Eq. 6
            mean = load.sum() / experts
            variance = ((load - mean) ** 2).sum() / experts
            losses.append(variance / (mean**2 + 1e-10))
    return x_bhwc + out, sum(losses, torch.zeros(())) / len(x_bhwc)


@pytest.mark.parametrize("path", PATHS)
def test_equations_2_to_6(path: str) -> None:
    module = library(path)
    x, prompt = torch.randn(2, 3, 4, 6), torch.randn(2, 7)
    grads = []
    for compute in (
        lambda: (module(x, prompt).features, module(x, prompt).balance),
        lambda: plain(x, prompt, module),
    ):
        module.zero_grad()
        x.grad, prompt.grad = None, None
        x.requires_grad_(), prompt.requires_grad_()
        out, balance = compute()
        ((out * torch.linspace(-1, 1, 6)).sum() + 3 * balance).backward()
        grads.append(
            [out.detach(), balance.detach(), x.grad, prompt.grad]
            + [p.grad for p in module.parameters()]
        )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (16, 1), (7, 5)])
def test_any_n_and_k(path: str, experts: int, top_k: int) -> None:
    module = library(path, experts=experts, top_k=top_k)
    x, prompt = torch.randn(1, 4, 5, 6), torch.randn(1, 7)
    routed = module(x, prompt)
    out, balance = plain(x, prompt, module)
    torch.testing.assert_close(routed.features, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed.balance, balance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed.shares.sum(1), torch.tensor([float(top_k)]))


@pytest.mark.parametrize("path", PATHS)
def test_no_pixel_is_dropped_when_all_choose_one_expert(path: str) -> None:
    bank = ExpertBank(6, 8, 20)
    x = torch.randn(1000, 8, requires_grad=True)
    index = torch.full((1000, 1), 4)
    out = bank(x, torch.ones(1000, 1), index, path)
    expected = F.linear(F.gelu(F.linear(x, bank.weight_in[4], bank.bias_in[4])),
                        bank.weight_out[4], bank.bias_out[4])  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    for parameter in bank.parameters():
        assert parameter.grad is not None  # also of the experts that nobody chose: zero, not None
        assert (parameter.grad[[0, 1, 2, 3, 5]] == 0).all() and (parameter.grad[4] != 0).any()


def test_paths_have_equal_gradients() -> None:
    bank = ExpertBank(6, 8, 20).double()
    x = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    gate, index = torch.rand(300, 6, dtype=torch.float64, requires_grad=True).topk(2)
    results = []
    for path in PATHS:
        out = bank(x, gate, index, path)
        inputs = [x, gate, *bank.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)])
    for dense, by_order in zip(*results, strict=True):
        torch.testing.assert_close(dense, by_order)


def test_all_gives_each_experts_output() -> None:
    bank = ExpertBank(3, 4, 9)
    x = torch.randn(11, 4)
    every = bank.chosen(x, torch.arange(3).expand(11, 3))
    torch.testing.assert_close(bank.all(x), every)


@pytest.mark.parametrize("path", PATHS)
def test_the_gate_stays_fp32_under_autocast(path: str) -> None:
    module = library(path)
    x, prompt = torch.randn(2, 8, 8, 6), torch.randn(2, 7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = module(x, prompt)
        bare = module.gate.logits(x, module.gate.to_channels(prompt), module.gate.weight)
    assert bare.dtype == half.balance.dtype == half.shares.dtype == torch.float32
    full = module(x, prompt)
    assert (half.shares - full.shares).abs().max() < 0.05
    torch.testing.assert_close(half.features.float(), full.features, rtol=0.05, atol=0.05)


def test_rule_of_the_path() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_path("dense", 64, 1, cpu) == "dense"
    assert resolve_path("sorted", 2, 2, gpu) == "sorted"
    assert resolve_path("auto", 6, 2, cpu) == "sorted"
    assert resolve_path("auto", 2, 2, cpu) == "dense"
    assert resolve_path("auto", 6, 2, gpu) == "dense"
    assert resolve_path("auto", 16, 2, gpu) == "sorted"


def test_squared_variation_of_known_loads() -> None:
    # Two experts at 1 and 3: mean 2, variance 1.
    torch.testing.assert_close(squared_variation(torch.tensor([1.0, 3.0])), torch.tensor(0.25))
    assert squared_variation(torch.full((4,), 7.0)) == 0
    assert squared_variation(torch.zeros(4)) == 0  # ε keeps an unused library from dividing by 0


@pytest.mark.parametrize("kind", [ExpertBank, LogExpertBank])
def test_without_gradients_pixels_come_in_chunks_and_the_result_is_the_same(
    kind: type[ExpertBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, x = kind(5, 8, 16), torch.randn(100, 8)
    gate, index = torch.rand(100, 5).log_softmax(-1).topk(2)
    with_gradient = bank(x, gate, index, "dense")
    monkeypatch.setattr(experts, "CHUNK", 32)
    sizes = []
    monkeypatch.setattr(
        kind, "_mixed", lambda *given, of=kind._mixed: sizes.append(len(given[2])) or of(*given)
    )
    with torch.no_grad():
        torch.testing.assert_close(bank(x, gate, index, "dense"), with_gradient.detach())
    assert sizes == [32, 32, 32, 4]
    torch.testing.assert_close(bank(x, gate, index, "dense"), with_gradient, rtol=0, atol=0)
    assert sizes[4:] == [100]
