"""Exported graphs give the network's results, also at sizes other than the exported one.

Folders in the layout of the Hugging Face hub hold the network and what is known of it.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from measnet import config as configs
from measnet import export
from measnet.card import Facts, facts_of_run, model_card
from measnet.config import ModelConfig, from_dict, replace_dotted
from measnet.metrics import FIELD
from measnet.network import MEASNet
from measnet.weights import load_weights

SMALL = replace_dotted(configs.tiny(), {"dim": 8})


def trained(config: ModelConfig) -> MEASNet:
    """Weights and running statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    model = MEASNet(config)
    model(torch.rand(2, 3, 64, 64))
    return model.eval()


def test_onnx_agrees_at_any_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = trained(SMALL), tmp_path / "new" / "model.onnx"
    model.save_pretrained(tmp_path / "model.safetensors")
    assert export.main([str(tmp_path / "model.safetensors"), str(path)]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    printed = capfd.readouterr()  # what torch writes past sys.stderr too
    assert len(printed.out.splitlines()) == 2 and not printed.err
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((24, 24), (40, 72)):
        image = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
        (restored,) = session.run(["restored"], {"image": image})
        with torch.no_grad():
            expected = model(torch.from_numpy(image)).image.numpy()
        np.testing.assert_allclose(restored, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_in_fp16_is_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(SMALL)
    model.save_pretrained(tmp_path / "model.safetensors")
    arguments = [str(tmp_path / name) for name in ("model.safetensors", "half.onnx")]
    assert export.main([*arguments, "--half"]) == 0
    assert "onnxruntime gives the network's result" in capsys.readouterr().out
    assert export.check_onnx(model, tmp_path / "half.onnx") < 2e-2
    sizes = [(tmp_path / name).stat().st_size for name in ("half.onnx", "model.safetensors")]
    assert sizes[0] < sizes[1]
    assert b"stack_trace" not in (tmp_path / "half.onnx").read_bytes()


def test_a_saved_program_can_be_loaded_and_takes_any_size(tmp_path: Path) -> None:
    model = trained(SMALL)
    model.save_pretrained(tmp_path / "model.safetensors")
    arguments = [str(tmp_path / name) for name in ("model.safetensors", "model.pt2")]
    assert export.main(arguments) == 0
    program = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((24, 24), (64, 40), (32, 136)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(image), model(image).image, rtol=1e-4, atol=1e-5)


# --- The layout of the Hugging Face hub ---

REPORT = {
    "protocol": FIELD.as_dict(),
    "held": {"derain": {"packed": 3, "benchmark": 100}},
    "degradations": {
        "derain": {
            "pictures": 3,
            "input_psnr": 20.125,
            "restored_psnr": None,
            "input_ssim": 0.5,
            "restored_ssim": 0.75,
        }
    },
}


def a_run(folder: Path, model: MEASNet) -> Path:
    """The files of a run's folder that the model card is made from."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "shards").mkdir()
    (folder / "shards" / "manifest.json").write_text(json.dumps({"fingerprint": "abc123"}))
    data = {"train": str(folder / "shards"), "validation": "s3://bucket/test"}
    recipe = {"samples": 160, "lr": 0.003}
    # JSON is YAML.
    run = {"name": "rainy", "data": data, "recipe": recipe}
    (folder / "config.yaml").write_text(json.dumps(run))
    lines = [{"samples": 80, "consumed": "old"}, {"samples": 160, "consumed": "0f0f"}]
    (folder / "consumed.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "evaluation" / "summary.json").write_text(json.dumps(REPORT))
    model.save_pretrained(folder / "model.safetensors")
    return folder


def test_a_folder_holds_the_network_and_its_facts(tmp_path: Path) -> None:
    model = trained(SMALL)
    run, out = a_run(tmp_path / "run", model), tmp_path / "published"
    assert export.main([str(run), str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for loaded in (MEASNet.from_pretrained(out), load_weights(out)):
        assert loaded.config == SMALL and not loaded.training
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("model_type") == "measnet"
    assert from_dict(ModelConfig, config) == SMALL
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "# rainy" in card
    for expected in (
        "train shards: `fingerprint abc123`",
        "validation shards: `folder test, digest unknown`",
        "160, chained sha256 0f0f",
        "| derain | 3 of the benchmark's 100 | 20.12 | unknown | 0.5000 | 0.7500 |",
        f"Measured by {FIELD.describe()}.",
        "* lr: `0.003`",
        "* dim: `8`",
    ):
        assert expected in card


def test_a_card_says_what_is_unknown(tmp_path: Path) -> None:
    facts = facts_of_run(tmp_path)
    card = model_card(SMALL, facts, 1)
    assert "Not evaluated" in card and "recipe is unknown" in card
    assert "trained on is unknown" in card
    assert facts == Facts(name=tmp_path.name)


def test_a_card_has_the_protocols_digest_and_no_other() -> None:
    card = model_card(SMALL, Facts(name="rainy", evaluation=REPORT), 1)
    assert card.count(FIELD.digest) == 1
    assert re.findall(r"\b[0-9a-f]{12}\b", card) == [FIELD.digest]


LOAD = """
import sys
from measnet.metrics import FIELD
from measnet.network import MEASNet
MEASNet.from_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(not find_spec("huggingface_hub"), reason="pip install huggingface_hub")
def test_a_name_on_the_hub(tmp_path: Path) -> None:
    """From the library's cache, as it is after a download; no network is needed."""
    commit = "0" * 40
    cached = tmp_path / "models--somebody--rainy"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    trained(SMALL).save_pretrained(cached / "snapshots" / commit / "model.safetensors")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name, code in (("somebody/rainy", 0), ("somebody/else", 1)):
        command = [sys.executable, "-c", LOAD, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr


@pytest.mark.skipif(bool(find_spec("huggingface_hub")), reason="shows what happens without it")
def test_the_hub_without_its_library_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        MEASNet.from_pretrained("somebody/rainy")
    assert export.main(["somebody/rainy", str(tmp_path / "out")]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "options", "expected"),
    [
        ("model.bin", [], "suffix must be .onnx, .pt2"),
        ("folder", ["--half"], "--half is for"),
        ("folder", ["--evaluation", "nowhere.json"], "no such file"),
    ],
)
def test_wrong_arguments_are_one_line(
    out: str,
    options: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export.main(["model.safetensors", str(tmp_path / out), *options]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert export.main([str(tmp_path / "bad.safetensors"), str(tmp_path / "out.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("variant", ["paper", pytest.param("official", marks=pytest.mark.slow)])
def test_the_dense_path_compiles_in_one_piece(variant: str) -> None:
    model = MEASNet(replace_dotted(SMALL, {"variant": variant, "expert_path": "dense"}))
    torch._dynamo.reset()
    image = torch.rand(2, 3, 64, 64)
    # aot_eager traces forward and backward as the full compiler does, without generating code.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    restoration = compiled(image)
    if variant == "paper":  # the other draws noise
        torch.testing.assert_close(restoration.image, model(image).image, rtol=1e-4, atol=1e-5)
    (restoration.image.mean() + restoration.balance_loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch._dynamo.reset()
