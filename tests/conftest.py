"""What several tests need: where the real pictures and reference outputs lie, and a quiet torch."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)
    # The first multi-threaded exp or log of a process can be inexact in one thread (torch 2.13, CPU);
    # once on a tiny tensor avoids it.
    for function in (torch.exp, torch.log, torch.erf, torch.tanh, torch.sigmoid):
        function(torch.ones(4))


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no folder {path}; set {variable}")
    return path


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Folder of genuine benchmark pictures: denoise/, derain/, dehaze/, deblur/, lowlight/."""
    return _folder("MEASNET_TEST_DATA", "../shared/data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of outputs of the authors' program."""
    return _folder("MEASNET_GOLDEN", "../shared/golden")
