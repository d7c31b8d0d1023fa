"""The compiled depth-wise convolutions against torch's own in double precision."""

import pytest
import torch
from torch import Tensor

from measnet import convolution
from measnet.convolution import convolve, gated_convolve

compiled = pytest.mark.skipif(convolution._run is None, reason="no compiler at installation")
# One pixel; less than a strip; several strips, parts of rows and remainders; many channels.
SHAPES = [(1, 1, 1, 8), (2, 5, 3, 24), (1, 33, 70, 96), (3, 40, 9, 16), (2, 5, 11, 1024)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two feature maps, two kernels, the gradient of what comes out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape, (shape[-1], 1, 3, 3), (shape[-1], 1, 3, 3), shape]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gate(a: Tensor, b: Tensor, kernel_a: Tensor, kernel_b: Tensor, grad: Tensor) -> list[Tensor]:
    """What comes out, and its gradients."""
    out = gated_convolve(a, b, kernel_a, kernel_b)
    return [out, *torch.autograd.grad(out, (a, b, kernel_a, kernel_b), grad)]


def depthwise(a: Tensor, _b: Tensor, kernel: Tensor, _k: Tensor, grad: Tensor) -> list[Tensor]:
    """The same of one convolution."""
    out = convolve(a, kernel, groups=len(kernel))
    return [out, *torch.autograd.grad(out, (a, kernel), grad)]


@compiled
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compute", [gate, depthwise])
def test_agrees_with_torch(compute, shape) -> None:
    ours = compute(*inputs(shape))
    assert "Backward" in type(ours[0].grad_fn).__name__
    for our, exact in zip(ours, compute(*inputs(shape, torch.float64)), strict=True):
        torch.testing.assert_close(
            our.double(), exact, rtol=0, atol=4e-6 * exact.abs().max().item()
        )


@compiled
def test_any_memory_layout_and_number_of_threads_gives_the_same() -> None:
    shape = (2, 40, 36, 64)
    straight = gate(*inputs(shape))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        apart = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in inputs(shape)[:2]]
        turned = gate(*apart, *inputs(shape)[2:])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(straight, turned, strict=True):
        assert torch.equal(one, other)


@compiled
def test_gate_far_from_zero() -> None:
    a, b, kernel_a, kernel_b, _ = inputs((1, 8, 8, 8))
    for scale in (1e3, 1e18):
        out = gated_convolve(a * scale, b, kernel_a, kernel_b)
        with convolution.torch_only():
            exact = gated_convolve(a * scale, b, kernel_a, kernel_b)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


@compiled
def test_damage_is_not_hidden() -> None:
    a, b, kernel_a, kernel_b, grad = inputs((1, 8, 8, 8))
    damaged = torch.where(torch.arange(8) == 3, float("nan"), a)
    out, *gradients = gate(damaged, b, kernel_a, kernel_b, grad)
    assert out.isnan()[..., 3].all() and not out.isnan()[..., :3].any()
    assert all(gradient.isnan().any() for gradient in gradients)


@compiled
def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        convolution._run(0, *[0] * 9, 1, 2, 2, 7, 1)


def test_only_fp32_on_a_cpu_takes_the_compiled_part() -> None:
    a, _, kernel, _, _ = inputs((1, 4, 4, 8))
    fits = convolution._compiled_part_fits
    assert fits(a, kernel) == (convolution._run is not None)
    assert not fits(a.bfloat16(), kernel.bfloat16())
    assert not fits(a.to("meta"), kernel)
    assert not fits(a[..., :6], kernel[:6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(a, kernel)
    with convolution.torch_only():
        assert not fits(a, kernel)
