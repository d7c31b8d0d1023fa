"""Outputs of the authors' program, and how near ours must be."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from measnet.config import ModelConfig

# Largest difference over the reference's maximum.
BLOCK, NETWORK, LARGE, GRADIENT = 2e-5, 5e-5, 2e-4, 1e-3
WORST: dict[float, float] = {}
"""Tolerance -> largest difference that was compared with it."""
SMALL = ModelConfig(variant="official", dim=16, num_blocks=(1, 2, 1, 2), num_refinement_blocks=1)


class Golden:
    """Reference outputs, and the rules by which their weights and inputs were made."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """All tensors are on `device`."""
        spec = importlib.util.spec_from_file_location("golden_rules", folder / "rules.py")
        assert spec and spec.loader
        self.rules = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.rules)
        self.folder, self.device = folder, device
        self.outputs: dict[str, Tensor] = {}
        for name in ("model", "modules", "train"):
            with np.load(folder / f"golden_{name}.npz") as file:
                prefix = "train/" if name == "train" else ""
                self.outputs |= {prefix + key: self.tensor(file[key]) for key in file.files}
        self.meta = json.loads((folder / "meta.json").read_text())

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.rules.det_normal(name, shape).to(self.device)

    def image(self, name: str, height: int, width: int, batch: int = 1) -> Tensor:
        return self.rules.det_image(name, height, width, batch).to(self.device)

    def entries(self, size: str, at: str = "", changed: dict[str, tuple[int, ...]] | None = None):
        """Filled entries of the tiny or full network, or of its block `at` by names within it."""
        shapes = json.loads((self.folder / f"keys_{size}.json").read_text())["entries"]
        shapes = {k.removeprefix(at): s for k, (_, _, s) in shapes.items() if k.startswith(at)}
        shapes |= changed or {}
        return {k: self.tensor(self.rules.fill_value(k, s)) for k, s in shapes.items()}


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    WORST[tolerance] = max(error, WORST.get(tolerance, 0.0))
    assert error < tolerance, f"relative error {error:.2e}, tolerance {tolerance:.0e}"
