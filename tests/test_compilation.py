"""torch.compile in training: what happens with and without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed.compilation import compile_blocks
from measnet import config as configs
from measnet.network import MEASNet

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_COMPILER = """
import torch
from distributed.compilation import compile_blocks
from measnet.config import tiny
from measnet.network import MEASNet
model = MEASNet(tiny())
print(compile_blocks(model, torch.device("cpu")))
model(torch.rand(1, 3, 16, 16)).image.sum().backward()
"""


def test_a_machine_without_a_compiler_trains_without_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    for name in ("CC", "CXX"):
        environment.pop(name, None)
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("off: torch.compile cannot build here") and "C compiler" in line


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    model = MEASNet(configs.tiny())
    picture = torch.rand(2, 3, 32, 32)
    expected = model(picture).image
    decision = compile_blocks(model, torch.device("cpu"))
    if decision.choice == "off":
        pytest.skip(decision.reason)
    compiled = model(picture).image
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == MEASNet(configs.tiny()).state_dict().keys()
