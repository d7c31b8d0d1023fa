"""spandrel loads and runs both kinds of weights; skipped where it is not installed."""

from pathlib import Path

import pytest
import torch

from measnet import config as configs
from measnet.config import replace_dotted
from measnet.network import MEASNet
from measnet.tiling import restore

spandrel = pytest.importorskip("spandrel", reason="pip install spandrel")

SMALL = replace_dotted(configs.tiny(), {"dim": 8, "pixel_top_k": 3})


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    from measnet.spandrel import register

    register()
    register()  # again does nothing


def test_weights_of_this_program(tmp_path: Path) -> None:
    network = MEASNet(SMALL)
    network(torch.rand(2, 3, 64, 64))
    network.eval().save_pretrained(tmp_path / "model.safetensors")
    loaded = spandrel.ModelLoader().load_from_file(tmp_path / "model.safetensors")
    assert loaded.architecture.id == "MEASNet" and loaded.model.config == SMALL
    image = torch.rand(1, 3, 45, 70)
    torch.testing.assert_close(loaded(image), restore(network, image))
    half = loaded.bfloat16()(image.bfloat16())
    assert half.shape == image.shape and half.isfinite().all()


@pytest.mark.parametrize("prefix", ["", "net.", "module."])
def test_a_checkpoint_of_the_authors(prefix: str, golden: Path, tmp_path: Path) -> None:
    from tests.official_reference import Golden

    entries = Golden(golden, torch.device("cpu")).entries("tiny")
    torch.save({"state_dict": {prefix + k: v for k, v in entries.items()}}, tmp_path / "a.ckpt")
    loaded = spandrel.ModelLoader().load_from_file(tmp_path / "a.ckpt")
    assert loaded.architecture.id == "MEASNet" and loaded.model.config.variant == "official"
    image = torch.rand(1, 3, 70, 66)
    with torch.no_grad():
        expected = loaded.model(image).image.clamp(0, 1)
    torch.testing.assert_close(loaded(image), expected)


def test_other_networks_are_not_taken() -> None:
    from measnet.spandrel import is_measnet

    assert not is_measnet({"patch_embed.proj.weight": torch.zeros(1), "encoder_level1.0.a": 0})
