"""Perceptual metrics beside PSNR and SSIM: LPIPS, DISTS, NIQE and MUSIQ of the package pyiqa.

pyiqa downloads weights while a metric is made, in the middle of an evaluation. Here the files are
checked before, and a metric whose files are not on this machine is refused. The package comes with
`pip install "measnet-ray[iqa]"`.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from measnet.tiling import full_precision

Name = Literal["lpips", "dists", "niqe", "musiq"]
NAMES: tuple[Name, ...] = get_args(Name)

_OF_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
_OF_TORCH = "https://download.pytorch.org/models"


class File(NamedTuple):
    """A file of weights that a metric reads."""

    folder: str
    """In torch's folder `torch.hub.get_dir()`."""
    name: str
    base: str
    """Address of its folder on the network."""

    @property
    def path(self) -> Path:
        """Where pyiqa and torchvision look for it."""
        return Path(torch.hub.get_dir(), self.folder, self.name)


class Metric(NamedTuple):
    """One metric of pyiqa, with its default options."""

    files: tuple[File, ...]
    reference: bool = False
    """It compares with the clean picture."""
    lower_is_better: bool = True


METRICS: dict[Name, Metric] = {
    "lpips": Metric(
        (
            File("checkpoints", "alexnet-owt-7be5be79.pth", _OF_TORCH),
            File("pyiqa", "LPIPS_v0.1_alex-df73285e.pth", _OF_PYIQA),
        ),
        reference=True,
    ),
    "dists": Metric(
        (
            File("checkpoints", "vgg16-397923af.pth", _OF_TORCH),
            File("pyiqa", "DISTS_weights-f5e65c96.pth", _OF_PYIQA),
        ),
        reference=True,
    ),
    "niqe": Metric((File("pyiqa", "niqe_modelparameters.mat", _OF_PYIQA),)),
    "musiq": Metric(
        (File("pyiqa", "musiq_koniq_ckpt-e95806b9.pth", _OF_PYIQA),), lower_is_better=False
    ),
}
"""Name -> files and direction, of pyiqa 0.1.16."""


def missing(names: Sequence[Name]) -> list[tuple[Name, File]]:
    """Files of these metrics that are not on this machine."""
    files = [(name, file) for name in names for file in METRICS[name].files]
    return [(name, file) for name, file in files if not file.path.is_file()]


def check(names: Sequence[Name]) -> None:
    """Refuse metrics that cannot be computed on this machine; nothing is downloaded.

    Raises:
        ValueError: pyiqa or a file is missing; names each file and its address.
    """
    if names and find_spec("pyiqa") is None:
        raise ValueError(f'--iqa {names[0]} needs pyiqa: pip install "measnet-ray[iqa]"')
    if lacking := missing(names):
        listed = "; ".join(f"{name}: {file.path} from {file.base}" for name, file in lacking)
        raise ValueError(
            f"files of --iqa are not on this machine, and are not downloaded here: {listed}. Copy "
            "them there, or leave the metric out"
        )


class Perceptual:
    """Metrics on one device."""

    def __init__(self, names: Sequence[Name], device: torch.device | str) -> None:
        """Load the metrics.

        Raises:
            ValueError: as `check`.
        """
        check(names)
        import pyiqa

        self._device = torch.device(device)
        self._metrics = {name: pyiqa.create_metric(name, device=self._device) for name in names}

    @torch.no_grad()
    def __call__(self, pictures: Tensor, clean: Tensor) -> dict[str, list[float]]:
        """Metric -> its value for each picture.

        Args:
            pictures: (B, 3, H, W); clipped to [0, 1]. Whole pictures, without border or crop.
            clean: (1, 3, H, W).
        """
        pictures = pictures.to(self._device).clamp(0, 1).float()
        clean = clean.to(self._device).clamp(0, 1).float().expand_as(pictures)
        found = {}
        for name, metric in self._metrics.items():
            given = (pictures, clean) if METRICS[name].reference else (pictures,)
            # One by one: NIQE has no batches, and values must not depend on the others.
            rows = zip(*given, strict=True)
            with full_precision():
                found[str(name)] = [float(metric(*(one[None] for one in row))) for row in rows]
        return found
