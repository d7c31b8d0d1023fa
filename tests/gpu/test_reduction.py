"""Gradients of two cards, added up by NCCL during the backward pass."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.test_reduction import assert_the_same, compare

pytestmark = pytest.mark.gpu


def test_two_cards_add_up_their_gradients_as_deepspeed_does(gpu: torch.device) -> None:
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs a machine with two GPUs")
    backend = "nccl" if gpu.type == "cuda" else "gloo"  # as training has it
    assert_the_same(run_ranks(2, compare, gpu.type, backend=backend), exactly=gpu.type == "cpu")
