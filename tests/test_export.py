"""Exported graphs give the network's results, also at sizes other than the exported one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from measnet import config as configs
from measnet import export
from measnet.config import ModelConfig, replace_dotted
from measnet.network import MEASNet

SMALL = replace_dotted(configs.tiny(), {"dim": 8})


def trained(config: ModelConfig) -> MEASNet:
    """Weights and running statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    model = MEASNet(config)
    model(torch.rand(2, 3, 64, 64))
    return model.eval()


def test_torch_export_with_any_size() -> None:
    model = trained(SMALL)
    program = export.export_program(model).module()
    for size in ((24, 24), (64, 40), (32, 136)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(image), model(image).image, rtol=1e-4, atol=1e-5)


def test_onnx_agrees_at_any_size(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = trained(SMALL), tmp_path / "model.onnx"
    model.save_pretrained(tmp_path / "model.safetensors")
    assert export.main([str(tmp_path / "model.safetensors"), str(path)]) == 0
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((24, 24), (40, 72)):
        image = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
        (restored,) = session.run(["restored"], {"image": image})
        with torch.no_grad():
            expected = model(torch.from_numpy(image)).image.numpy()
        np.testing.assert_allclose(restored, expected, rtol=1e-4, atol=1e-4)


def test_a_wrong_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert export.main([str(tmp_path / "bad.safetensors"), str(tmp_path / "out.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("variant", ["paper", "official"])
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
