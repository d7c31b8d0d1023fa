"""Frequency decomposition and per-picture experts against a plain version of Eq. 7-10."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measnet.frequency import (
    FrequencyExperts,
    FrequencySplit,
    KernelNorm,
    PictureExperts,
)
from measnet.ops.low_pass import reflect_pad
from measnet.step_statistics import commit_statistics


def plain_split(x_bhwc: Tensor, split: FrequencySplit) -> tuple[Tensor, Tensor]:
    """Eq. 7-8, tap by tap, by torch's own batch norm."""
    batch, height, width, channels = x_bhwc.shape
    norm = split.norm
    pooled = x_bhwc.mean((1, 2)) @ split.predict.T
    taps = F.batch_norm(
        pooled, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias,
        training=split.training,
    )  # fmt: skip
    kernel = taps.view(batch, 8, 3, 3).flatten(2).softmax(-1).view(batch, 8, 3, 3)
    padded = F.pad(x_bhwc.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect")
    low = torch.zeros_like(padded[..., 1:-1, 1:-1])
    for i in range(3):
        for j in range(3):
            tap = kernel[:, :, i, j].repeat_interleave(channels // 8, dim=1)
            low = low + tap[..., None, None] * padded[..., i : i + height, j : j + width]
    low = low.permute(0, 2, 3, 1)
    return low, x_bhwc - low


@pytest.mark.parametrize("training", [True, False])
def test_equations_7_and_8(training: bool) -> None:
    split = FrequencySplit(16).train(training)
    nn.init.normal_(split.norm.running_mean)
    nn.init.uniform_(split.norm.running_var, 0.5, 2)
    nn.init.normal_(split.norm.weight)
    x = torch.randn(8, 5, 7, 16, requires_grad=True)  # fewer pictures: a variance may be near 0
    inputs = [x, *split.parameters()]
    theirs = plain_split(x, split)
    ours = split(x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0] + ours[1], x)
    grads = [
        torch.autograd.grad((low**2).sum() + (high**3).sum(), inputs)
        for low, high in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_low_pass_keeps_what_is_constant() -> None:
    split = FrequencySplit(8).eval()
    low, high = split(torch.ones(1, 6, 6, 8))
    torch.testing.assert_close(low, torch.ones_like(low))
    torch.testing.assert_close(high, torch.zeros_like(high), atol=1e-6, rtol=0)


# --- The norm of the predicted kernels ---


@pytest.mark.parametrize("batch", [2, 5])
def test_norm_is_batch_norm(batch: int) -> None:
    ours, theirs = KernelNorm(4), nn.BatchNorm1d(4)
    for _ in range(3):
        x = torch.randn(batch, 4) * 3 + 1
        torch.testing.assert_close(ours(x, False), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    x = torch.randn(1, 4)
    torch.testing.assert_close(ours(x, False), theirs(x))


def test_norm_trains_with_single_pictures() -> None:
    """Gradients exist, and the running statistics approach mean and variance of the pictures."""
    norm = KernelNorm(2)
    spread, centre = torch.tensor([0.5, 3.0]), torch.tensor([-1.0, 4.0])
    means, variances = [], []
    for step in range(600):
        x = (torch.randn(1, 2) * spread + centre).requires_grad_()
        (gradient,) = torch.autograd.grad(norm(x, False).sum(), x)
        assert (gradient != 0).all()
        if step >= 100:
            means.append(norm.running_mean.clone())
            variances.append(norm.running_var.clone())
    torch.testing.assert_close(torch.stack(means).mean(0), centre, rtol=0.1, atol=0.1)
    torch.testing.assert_close(torch.stack(variances).mean(0), spread**2, rtol=0.25, atol=0)


def test_statistics_of_a_step_do_not_depend_on_the_ranks() -> None:
    pictures = torch.randn(8, 4)
    micro_batches = [pictures[:3], pictures[3:4], pictures[4:8]]

    def statistics(shares: list[list[int]]) -> list[Tensor]:
        ranks = [nn.Sequential(KernelNorm(4)) for _ in shares]
        for rank, share in zip(ranks, shares, strict=True):
            for i in share:
                rank[0](micro_batches[i], True)
            assert (rank[0].running_mean == 0).all()  # nothing moves before the commit
        total = sum(rank[0].moments.flatten() for rank in ranks)
        for rank in ranks:
            commit_statistics(rank, lambda flat: flat.copy_(total))
            assert (rank[0].moments == 0).all()
        assert all(torch.equal(r[0].running_var, ranks[0][0].running_var) for r in ranks)
        return [ranks[0][0].running_mean, ranks[0][0].running_var]

    alone = statistics([[0, 1, 2]])
    for shares in ([[0], [1, 2]], [[2, 0], [1]], [[0], [1], [2]], [[0, 1, 2], []]):
        for a, b in zip(alone, statistics(shares), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    at_once = nn.BatchNorm1d(4)
    at_once(pictures)
    torch.testing.assert_close(alone[0], at_once.running_mean)
    torch.testing.assert_close(alone[1], at_once.running_var)


def test_a_commit_without_pictures_moves_nothing() -> None:
    model = nn.Sequential(KernelNorm(4))
    commit_statistics(model)
    assert (model[0].running_mean == 0).all() and (model[0].running_var == 1).all()
    commit_statistics(nn.Linear(2, 2))  # an ablation without frequency decomposition


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_leaves_the_statistics(value: float, defer: bool) -> None:
    """Its step is skipped; in the statistics it would stay, and spoil all restored pictures."""
    norm = KernelNorm(8).train()
    good, bad = torch.randn(4, 8), torch.randn(4, 8)
    bad[1, 2] = value
    norm(good, defer=False)
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(bad, defer=defer)
    commit_statistics(norm)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
    norm(good, defer=defer)
    commit_statistics(norm)
    assert norm.running_mean.isfinite().all() and not torch.equal(norm.running_mean, before[0])


def test_statistics_stay_exact_in_a_half_precision_model() -> None:
    norm = KernelNorm(4)
    norm(torch.randn(3, 4), False)
    exact = norm.running_mean.clone()
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.moments.dtype == torch.float64
    assert torch.equal(norm.running_mean, exact)


# --- Per-picture experts ---


def plain_experts(x_bhwc: Tensor, mee: PictureExperts) -> Tensor:
    """Eq. 9-10, picture by picture, expert by expert."""
    outs = []
    for x in x_bhwc:
        normed = F.layer_norm(x, x.shape[-1:], mee.norm.weight, mee.norm.bias)
        depth = F.conv2d(
            normed.permute(2, 0, 1)[None], mee.depthwise, padding=1, groups=x.shape[-1]
        )
        depth = depth[0].permute(1, 2, 0)  # F^d
        w = torch.softmax(mee.gate @ depth.mean((0, 1)) + mee.gate_bias, dim=0)
        lower = depth @ mee.project.T  # F^p
        mixed = lower * depth + lower  # Eq. 9
        out = x
        for n in w.argsort(descending=True)[: mee.top_k].tolist():  # Eq. 10
            start, stop = sum(mee.widths[:n]), sum(mee.widths[: n + 1])
            hidden = F.gelu(mixed @ mee.weight_in[start:stop].T + mee.bias_in[start:stop])
            out = out + w[n] * (hidden @ mee.weight_out[:, start:stop].T + mee.bias_out[n])
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.parametrize("path", ["dense", "sorted"])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 2), (1, 1), (3, 3)])
def test_equations_9_and_10(path: str, experts: int, top_k: int) -> None:
    mee = PictureExperts(16, experts=experts, top_k=top_k, path=path)
    nn.init.normal_(mee.gate, std=3)
    x = torch.randn(3, 6, 5, 16, requires_grad=True)
    ours, chosen = mee(x).features, mee(x).shares
    theirs = plain_experts(x, mee)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert chosen.sum(1).tolist() == [top_k] * 3 and set(chosen.unique().tolist()) <= {0.0, 1.0}
    inputs = [x, *mee.parameters()]
    unused = experts == 1  # the gate of a single expert is 1 whatever its logit
    grads = [
        torch.autograd.grad(out.square().sum(), inputs, allow_unused=unused)
        for out in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hidden_widths_grow_with_the_expert() -> None:
    mee = PictureExperts(20, experts=5, top_k=2, path="auto")
    assert mee.widths == [4, 8, 12, 16, 20]
    assert PictureExperts(4, experts=8, top_k=1, path="auto").widths[0] == 1


@pytest.mark.parametrize("fd", [True, False])
@pytest.mark.parametrize("mee", [True, False])
def test_bands_have_their_own_experts(fd: bool, mee: bool) -> None:
    if not (fd or mee):
        return
    block = FrequencyExperts(16, experts=3, top_k=1, path="auto", fd=fd, mee=mee).eval()
    x = torch.randn(2, 6, 6, 16)
    out, choices = block(x)
    names = ({"high", "low"} if fd else {"all"}) if mee else set()
    assert set(choices) == names
    if not fd:
        torch.testing.assert_close(out, block.experts["all"](x)[0])
        return
    low, high = block.split(x)
    if mee:
        low, high = block.experts["low"](low)[0], block.experts["high"](high)[0]
    expected = torch.cat([high, low], dim=-1) @ block.merge.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_deferring_does_not_change_the_output() -> None:
    split = FrequencySplit(16)
    other = copy.deepcopy(split)
    x = torch.randn(2, 4, 4, 16)
    for a, b in zip(split(x, False), other(x, True), strict=True):
        assert torch.equal(a, b)


def test_reflection_is_the_same_where_only_deterministic_algorithms_may_run() -> None:
    x = torch.randn(2, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    plain = reflect_pad(x)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = reflect_pad(x)
        (gradient,) = torch.autograd.grad((deterministic * weights).sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(deterministic, plain)
    torch.testing.assert_close(gradient, expected)
