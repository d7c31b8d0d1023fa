"""Validation by two ranks gives the report of one rank; no report if one of them is to stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.config import TrainConfig
from distributed.evaluate import evaluate
from distributed.validation import agree_on_tiling, validate
from measnet.config import replace_dotted, tiny
from measnet.network import MEASNet
from tests.ranks import run_ranks


def network() -> MEASNet:

    torch.manual_seed(0)
    return MEASNet(tiny()).eval()


def on_each_rank(uri: str) -> dict[str, Any]:
    changes = {"model": tiny(), "data.validation": uri, "every.validation_pictures": 1}
    config = replace_dotted(TrainConfig(), changes)
    model, rank = network(), dist.get_rank()
    tiling = agree_on_tiling(model, processes=2 - rank)
    done = validate(model, config, tiling, lambda: False)
    assert done is not None
    stopped = validate(model, config, tiling, lambda: rank == 1)
    scores = [(s.position, s.name, s.restored_psnr) for s in done[0].scores]
    return {"at_once": tiling.at_once, "scores": scores, "stopped": stopped is None}


def test_two_ranks_give_the_report_of_one(packed: Path) -> None:
    uri = str(packed / "test")
    first, second = run_ranks(2, on_each_rank, uri)
    assert first == second and first["stopped"]
    alone = evaluate(network(), uri, None, limit=1).scores
    for (position, name, psnr), expected in zip(first["scores"], alone, strict=True):
        assert (position, name) == (expected.position, expected.name)
        assert psnr == pytest.approx(expected.restored_psnr, abs=1e-6)
