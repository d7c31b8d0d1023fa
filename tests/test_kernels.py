"""The compiled kernels against torch's own operations in double precision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from measnet.ops import cpu_library
from measnet.ops.attention import attend_planes
from measnet.ops.choice import torch_only
from measnet.ops.convolution import convolve, project
from measnet.ops.low_pass import low_pass
from measnet.transformer import TransformerBlock

compiled = pytest.mark.skipif(not cpu_library.KERNELS, reason="no compiler at installation")
# Batch, height, width, channels, heads: one pixel; rows shorter than a band; parts of rows with
# remainders; more heads; hidden channels that need padding everywhere; vectors of 8 alone.
SHAPES = [
    (1, 1, 1, 16, 1),
    (2, 5, 3, 48, 1),
    (1, 33, 70, 96, 2),
    (3, 40, 9, 32, 2),
    (2, 5, 11, 384, 8),
    (2, 35, 6, 24, 1),
    (1, 3, 130, 8, 1),
]


def block_and_input(shape: tuple[int, ...]) -> tuple[TransformerBlock, Tensor]:
    torch.manual_seed(0)
    batch, height, width, channels, heads = shape
    block = TransformerBlock(channels, heads, 2.66)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(batch, height, width, channels)


def trained(block: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = block(x)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (x, *block.parameters()), grad)]


def assert_close(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for our, one in zip(ours, exact, strict=True):
        limit = tolerance * one.abs().max().item()
        torch.testing.assert_close(our.double(), one.double(), rtol=0, atol=limit)


@compiled
@pytest.mark.parametrize("lanes", sorted(cpu_library.KERNELS))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_agrees_with_torch(shape, lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "KERNELS", {lanes: cpu_library.KERNELS[lanes]})
    block, x = block_and_input(shape)
    fits = cpu_library.fits(x, heads=shape[-1])
    assert fits == (shape[3] % (shape[4] * lanes) == 0)
    ours, exact = trained(block, x), trained(copy.deepcopy(block).double(), x.double())
    with torch_only():
        torchs = trained(block, x)
    worst = max(
        ((one.double() - true).abs().max() / true.abs().max()).item()
        for one, true in zip(torchs, exact, strict=True)
    )
    assert_close(
        ours, exact, max(5e-6, 10 * worst)
    )  # a temperature's gradient is a sum that cancels
    with torch.no_grad():
        assert_close([block(x)], exact[:1], 2e-6)


@compiled
def test_the_kernels_are_what_runs() -> None:
    block, x = block_and_input((1, 8, 8, 48, 1))
    assert "_FeedForward" in type(block(x).grad_fn).__name__
    with torch_only():
        assert "_FeedForward" not in type(block(x).grad_fn).__name__


def assert_agree_with_torch(compute: Callable[..., Any], tensors: list[Tensor]) -> None:
    """`compute` gives one or several outputs; they and all gradients, with and without autograd."""

    def results(dtype: torch.dtype) -> list[Tensor]:
        cast = [one.detach().to(dtype).requires_grad_() for one in tensors]
        outs = compute(*cast)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        gradients = [torch.linspace(-0.5, 1, one.numel()).view(one.shape).to(dtype) for one in outs]
        return [*outs, *torch.autograd.grad(outs, cast, gradients)]

    ours = results(torch.float32)
    assert_close(ours, results(torch.float64), 5e-6)
    with torch.no_grad():
        straight = compute(*tensors)
        straight = [straight] if isinstance(straight, Tensor) else list(straight)
        assert all(torch.equal(one, our) for one, our in zip(straight, ours, strict=False))


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@compiled
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_depthwise_agrees_with_torch(shape, size, gelu) -> None:
    x, kernel, offset = numbers(shape[:4], (shape[3], 1, *size), shape[3:4])

    def compute(x: Tensor, kernel: Tensor, *offset: Tensor) -> Tensor:
        return convolve(x, kernel, *offset, groups=shape[3], gelu=gelu)

    assert_agree_with_torch(compute, [x, kernel])
    assert_agree_with_torch(compute, [x, kernel, offset])


@compiled
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("channels", [(16, 48), (48, 24), (8, 8), (192, 16), (40, 96)])
def test_projections_agree_with_torch(channels, count, gelu) -> None:
    """Fewer pixels than a tile, and so many that they are cut, with a remainder."""
    into, out = channels
    for pixels in ((3,), (1, 71, 131)):
        x, *weights = numbers((*pixels, into), *[(out, into)] * count, *[(out,)] * count)
        assert cpu_library.fits(x, out=out)
        assert_agree_with_torch(
            lambda x, *all: project(x, all[:count], all[count:], gelu=gelu), [x, *weights]
        )
        assert_agree_with_torch(lambda x, *all: project(x, all, gelu=gelu), [x, *weights[:count]])


@compiled
@pytest.mark.parametrize("shape", SHAPES[1:])  # with one pixel no gradient is left of q and k
def test_attention_of_given_planes_agrees_with_torch(shape) -> None:
    plane, channels, heads = shape[:4], shape[3], shape[4]
    tensors = numbers(*[plane] * 3, (3, channels, 1, 3, 3), (heads, 1, 1), (channels, channels))
    assert_agree_with_torch(attend_planes, tensors)


@compiled
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (2, 5), (32, 7), (33, 8), (34, 3), (70, 9)])
def test_a_low_pass_agrees_with_torch(size) -> None:
    """Small ones, where a row is beyond both edges, and several parts."""
    x, taps = numbers((2, *size, 16), (2, 16, 9))
    assert_agree_with_torch(low_pass, [x, taps])
    low, high = low_pass(x, taps)
    torch.testing.assert_close(low + high, x)


@compiled
@pytest.mark.parametrize("size", [(1, 5), (5, 1)])
def test_a_single_row_or_column_has_nothing_to_reflect(size) -> None:
    x, taps = numbers((1, *size, 16), (1, 16, 9))
    with pytest.raises(ValueError, match="a low-pass needs 2x2"):
        low_pass(x, taps)


@compiled
def test_any_memory_layout_and_number_of_threads_gives_the_same() -> None:
    block, x = block_and_input((2, 40, 36, 48, 1))
    straight = trained(block, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turned = trained(block, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(straight, turned, strict=True):
        assert torch.equal(one, other)


@compiled
def test_a_picture_does_not_depend_on_its_batch_mates() -> None:
    block, x = block_and_input((3, 34, 12, 48, 1))
    with torch.no_grad():
        together = block(x)
        assert all(torch.equal(together[i : i + 1], block(x[i : i + 1])) for i in range(3))


@compiled
def test_only_some_gradients_are_wanted() -> None:
    """Of the input alone, and of the parameters alone."""
    block, x = block_and_input((1, 8, 8, 48, 1))
    everything = trained(block, x)
    block.requires_grad_(False)
    of_x = x.clone().requires_grad_()
    out = block(of_x)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
    assert torch.equal(torch.autograd.grad(out, of_x, grad)[0], everything[1])
    block.requires_grad_(True)
    gradients = torch.autograd.grad(block(x), list(block.parameters()), grad)
    for one, other in zip(gradients, everything[2:], strict=True):
        assert torch.equal(one, other)


@compiled
def test_the_gate_far_from_zero() -> None:
    block, x = block_and_input((1, 8, 8, 48, 1))
    for scale in (1e2, 1e6):
        block.feed_forward.project_in.data[0] *= scale
        with torch.no_grad():
            ours, exact = block(x), copy.deepcopy(block).double()(x.double())
        assert_close([ours], [exact], 5e-6)


@compiled
def test_damage_is_not_hidden() -> None:
    block, x = block_and_input((1, 8, 8, 48, 1))
    x[0, 3, 4, 5] = float("nan")
    assert all(one.isnan().any() for one in trained(block, x))


@compiled
def test_bad_arguments_are_refused() -> None:
    for lanes, run in ((lanes, module.run) for lanes, module in cpu_library.KERNELS.items()):
        nothing = [0] * len(cpu_library.ADDRESSES)
        with pytest.raises(ValueError, match=f"multiple of {lanes}"):
            run(0, nothing, (1, 2, 2, 7, 7, 7, 1, 1, 0, 1), 0.0, 1)
        with pytest.raises(ValueError, match="addresses"):
            run(0, nothing[1:], (1, 2, 2, 8, 8, 8, 1, 1, 0, 1), 0.0, 1)
        with pytest.raises(ValueError, match="unknown kind"):
            run(len(cpu_library.KINDS), nothing, (1, 2, 2, 8, 8, 8, 1, 1, 0, 1), 0.0, 1)


def test_only_fp32_on_a_cpu_takes_the_kernels() -> None:
    x, matrix = torch.randn(1, 4, 4, 16), torch.randn(16, 16)
    assert cpu_library.fits(x, matrix) == bool(cpu_library.KERNELS)
    assert not cpu_library.fits(x.bfloat16(), matrix.bfloat16())
    assert not cpu_library.fits(x, matrix.double())
    assert not cpu_library.fits(x.to("meta"), matrix)
    matrix.ds_id = 0  # as ZeRO-3 marks a parameter that it keeps in parts
    assert not cpu_library.fits(x, matrix)
    del matrix.ds_id
    assert not cpu_library.fits(x[..., :6], matrix)
    assert not cpu_library.fits(x, matrix, heads=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_library.fits(x, matrix)
    with torch_only():
        assert not cpu_library.fits(x, matrix)
