"""Import of the authors' checkpoints: names, shapes, other sizes, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import plain
from measnet.config import ModelConfig
from measnet.network import MEASNet
from measnet.official import weights
from tests.official_reference import NETWORK, SMALL, Golden, assert_near


class Recorder(weights._Entries):
    """Makes each entry that the importer asks for, so that any size of the program can be had."""

    def __init__(self) -> None:
        super().__init__({})
        self.made: dict[str, Tensor] = {}
        self.unused: set[str] = set()

    def take(self, key: str, *shape: int) -> Tensor:
        assert key not in self.made
        self.made[key] = torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        if key.endswith("running_var"):
            self.made[key].abs_()
        return self.made[key]

    def drop(self, *keys: str) -> None:
        self.unused |= set(keys)


def record(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_Entries", lambda entries: recorder)
        weights.convert({}, config)
    return recorder


FULL = ModelConfig(variant="official", num_blocks=(4, 4, 6, 8))
OTHER = ModelConfig(
    variant="official",
    dim=24,
    num_blocks=(2, 1, 1, 2),
    num_refinement_blocks=2,
    heads=(1, 2, 2, 4),
    ffn_expansion=2.0,
    prompts=16,
    prompt_dim=96,
    pixel_experts=4,
    image_experts=3,
)


@pytest.mark.parametrize(("size", "config"), [("tiny", SMALL), ("dim48", FULL)])
def test_names_and_shapes_are_the_programs(
    golden: Path, monkeypatch: pytest.MonkeyPatch, size: str, config: ModelConfig
) -> None:
    recorder = record(config, monkeypatch)
    entries = Golden(golden, torch.device("cpu")).entries(size)
    assert set(recorder.made) | recorder.unused == set(entries)
    for key, value in recorder.made.items():
        assert value.squeeze().shape == entries[key].squeeze().shape, key
    assert weights.infer_config(entries) == config


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_load_other_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    recorder = record(OTHER, monkeypatch)
    entries = {f"net.{key}" if suffix == ".ckpt" else key: v for key, v in recorder.made.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(entries, path)
    else:
        lightning = {"state_dict": entries, "epoch": 3, "pytorch-lightning_version": "2.0.1"}
        torch.save(lightning if suffix == ".ckpt" else entries, path)
    model = weights.load(path)
    assert model.config == OTHER and not model.training
    image = torch.rand(2, 3, 64, 72)
    with torch.no_grad():
        assert_near(model(image).image, plain.forward(model, image).image, NETWORK)


@pytest.mark.slow
def test_full_width_equals_the_plain_reading() -> None:
    model, image = MEASNet(FULL).eval(), torch.rand(2, 3, 72, 64)
    for block in model.extra.values():
        nn.init.normal_(block.alpha)
    with torch.no_grad():
        assert_near(model(image).image, plain.forward(model, image).image, NETWORK)


def test_load_refuses_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = record(OTHER, monkeypatch).made
    first = "encoder_level2.0.attn.qkv.weight"

    def message(changed: dict[str, Tensor]) -> str:
        path = tmp_path / "changed.pth"
        torch.save(changed, path)
        with pytest.raises(ValueError) as caught:
            weights.load(path)
        return str(caught.value)

    assert first in message({k: v for k, v in entries.items() if k != first})
    assert first in message(entries | {first: torch.zeros(3, 3)})
    assert "head.weight" in message(entries | {"head.weight": torch.zeros(1)})
    assert "latent.0.ffn.dwconv.weight" in message(
        entries | {"latent.0.ffn.dwconv.weight": torch.zeros(2, 1, 3, 3)}
    )
    assert "patch_embed" in message({"other.weight": torch.zeros(2)})
    assert "entries that are not tensors: note" in message(entries | {"note": "text"})  # type: ignore[dict-item]


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in a checkpoint ran",))


def test_load_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "harmful.ckpt"
    torch.save({"state_dict": {}, "callbacks": Harmful()}, path)
    with pytest.raises(ValueError, match="safely"):
        weights.load(path)
    assert "ran" not in capsys.readouterr().out
