"""The weights that one Triton kernel prepares for all others, by the interpreter."""

import copy
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import pytest
import torch
from torch import Tensor, nn

from measnet import config as configs
from measnet.config import replace_dotted
from measnet.network import MEASNet
from measnet.ops import cpu_library, gpu_library
from measnet.ops.choice import torch_only
from measnet.ops.gpu_library import HasWeights
from measnet.transformer import TransformerBlock
from tests.compiled import assert_fits, compiled, interpret_bf16
from tests.test_gpu_block import assert_close, trained

pytest.importorskip("triton")

from measnet.ops.gpu import packing

IMAGE = torch.rand(1, 3, 2, 2)


class Blocks(nn.Module):
    """Two blocks of different widths, one after the other, with their weights packed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (TransformerBlock(16, heads, 2.66) for heads in (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with gpu_library.packed_weights(self, x):
            return self.second(self.first(x))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from measnet.ops.gpu import correlation, depthwise

    monkeypatch.setattr(cpu_library, "KERNELS", {})
    for module in (depthwise, correlation):
        monkeypatch.setattr(module, "ROWS", 4)


def expected(weight: gpu_library.Weight, features: torch.dtype) -> Tensor:
    whole = torch.zeros(weight.sizes)
    whole[tuple(slice(size) for size in weight.view.shape)] = weight.view
    return whole.to(features if weight.matrix else torch.float32)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_all_weights_are_padded_and_cast(
    features: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpret_bf16(monkeypatch)
    blocks = nn.ModuleList([TransformerBlock(48, 1, 2.66), TransformerBlock(32, 2, 2.66)])
    parts = [part for part in blocks.modules() if isinstance(part, HasWeights)]
    weights = [weight for part in parts for weight in part.kernel_weights()]
    assert len(weights) == 8
    with gpu_library.stand_in("cpu"):
        low = torch.autocast("cpu", torch.bfloat16, enabled=features == torch.bfloat16)
        with low, gpu_library.counting() as launches, gpu_library.packed_weights(blocks, IMAGE):
            for one in weights:
                made = packing.of(one.parameter)
                assert made is not None and made.is_contiguous()
                assert torch.equal(made, expected(one, features))
    # Matrices and taps are two starts, or one where both have the same type.
    assert len(launches) == (1 if features == torch.float32 else 2)
    assert packing.of(weights[0].parameter) is None  # outside it nothing is kept


def test_a_network_trains_as_without_them() -> None:
    blocks, x = Blocks(), torch.randn(1, 3, 5, 16)
    with torch_only():
        exact = trained(copy.deepcopy(blocks).double(), x.double())
    with gpu_library.stand_in("cpu"), gpu_library.counting() as launches:
        ours = trained(blocks, x)
    assert [one.name for one in launches].count("_pack") == 1
    assert_close(ours, exact, 1e-5)


def test_weights_are_made_anew_in_each_pass_and_found_where_they_lie() -> None:
    blocks = Blocks()
    weight = blocks.first.attention.qkv

    def made() -> Tensor:
        with gpu_library.packed_weights(blocks, IMAGE):
            found = packing.of(weight)
        assert found is not None
        return found

    with gpu_library.stand_in("cpu"):
        first = made()
        with torch.no_grad():
            weight.add_(1)  # as an optimizer does
        assert torch.equal(made(), first + 1)
        weight.data = weight.data * 2  # it lies elsewhere now
        assert torch.equal(made(), 2 * (first + 1))


def test_what_is_not_whole_and_fp32_is_left_to_each_module() -> None:
    blocks = Blocks()
    weight = blocks.first.attention.qkv
    with gpu_library.stand_in("cpu"):
        for spoil in (
            lambda: setattr(weight, "ds_id", 0),  # as ZeRO-3 marks them
            lambda: blocks.bfloat16(),
        ):
            spoil()
            with gpu_library.counting() as launches, gpu_library.packed_weights(blocks, IMAGE):
                assert packing.of(weight) is None
            assert not launches
            weight.__dict__.pop("ds_id", None)
    with gpu_library.packed_weights(Blocks(), IMAGE):  # a CPU
        assert packing.of(weight) is None


def one_pass() -> None:
    """The start of a network, on `meta`."""
    small = {"num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "expert_path": "dense"}
    with torch.device("meta"):
        network = MEASNet(replace_dotted(configs.paper(), small))
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            image = torch.empty(1, 3, 32, 32, device="meta")
            with gpu_library.packed_weights(network, image):
                pass


def test_it_compiles_for_three_cards() -> None:
    assert_fits(compiled("tests.test_gpu_packing:one_pass", 80, 89, 90))


def test_a_forward_pass_casts_no_weight_of_a_block() -> None:
    small = {"num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "expert_path": "dense"}
    with torch.device("meta"):
        network = MEASNet(replace_dotted(configs.paper(), small))
    with (
        gpu_library.stand_in("meta"),
        gpu_library.counting() as launches,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        network(torch.empty(1, 3, 32, 32, device="meta"))
    assert [one.name for one in launches].count("_pack") == 2
    inputs = [
        one.arguments[3].dtype for one in launches if one.name == "_norm_project"
    ]  # the matrix
    assert inputs and set(inputs) == {torch.bfloat16}
