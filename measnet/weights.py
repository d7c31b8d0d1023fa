"""Loads trained weights: a file of this or of the authors' program, or a run."""

import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from measnet.hub import WEIGHTS, weights_file
from measnet.network import MEASNet
from measnet.official.weights import load as load_official

OF_A_RUN = WEIGHTS
"""Weights in the folder of a finished training run, named as on the Hugging Face hub."""


def load_weights(path: str | Path) -> MEASNet:
    """Read trained weights.

    Args:
        path: a file of `MEASNet.save_pretrained`; a checkpoint of the authors' program (.ckpt, .pth
            or .safetensors); the folder of a finished run or of `measnet.export`; the name of
            such a folder on the Hugging Face hub (owner/name); or `small`, which comes with this
            package.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        ValueError: none of these; gives the reason.
        OSError: there is no such file, or it cannot be read.
        ImportError: a name of the hub, but huggingface_hub is not installed.
    """
    file = _file(Path(path))
    if file.suffix == ".safetensors" and _is_ours(file):
        return MEASNet.from_pretrained(file)
    try:
        return load_official(file)
    except ValueError as error:
        raise ValueError(
            f"{file} has no weights of this or of the authors' program: {error}"
        ) from error


def _file(path: Path) -> Path:
    """The file that holds the weights: `path` itself, or the file in a run's folder."""
    if not path.is_dir():
        return weights_file(path)
    inside = path / OF_A_RUN
    if inside.is_file():
        return inside
    if (path / "checkpoints").is_dir():
        raise ValueError(
            f"the run {path} has no {OF_A_RUN}, because it is not finished; write one from its "
            f"newest checkpoint: python -m distributed.checkpoint export {shlex.quote(str(path))} "
            f"{OF_A_RUN}"
        )
    raise ValueError(
        f"the folder {path} holds no {OF_A_RUN} and no checkpoints: "
        "give a weights file or the folder of a run, such as runs/demo"
    )


def _is_ours(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as tensors:
            return "config" in (tensors.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
