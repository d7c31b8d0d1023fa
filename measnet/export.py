"""The network for other programs: a folder for the Hugging Face hub, ONNX, or `torch.export`.

    python -m measnet.export runs/demo published/     config.json, model.safetensors, README.md
    python -m measnet.export runs/demo model.onnx     ONNX; with --half in fp16
    python -m measnet.export runs/demo model.pt2      a program of torch.export

A graph (ONNX, torch.export) takes `image`, float32 (1, 3, H, W), RGB in [0, 1], and gives
`restored` of the same size. H and W are multiples of 8 from 24 to 4096 (variant official: from 64
to 248, because its frequency blocks compute larger ones in another way). docs/export.md says what
the caller must do before and after.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from measnet import config as configs
from measnet.card import facts_of_run, model_card
from measnet.config import replace_dotted
from measnet.files import complete_file
from measnet.hub import CARD, CONFIG, WEIGHTS
from measnet.network import MEASNet
from measnet.weights import load_weights

SIZES = {"paper": (24, 4096), "official": (64, 248)}
"""Smallest and largest side of the graph's input."""


class Picture(nn.Module):
    """Returns the restored picture only; uses the dense expert path, whose shapes are static."""

    def __init__(self, model: MEASNet, *, half: bool = False) -> None:
        """`model` is copied: its configuration is changed; `half`: compute in fp16."""
        super().__init__()
        config = replace_dotted(model.config, {"expert_path": "dense"})
        self.model = MEASNet(config).to(next(model.parameters()).device)
        self.model.load_state_dict(model.state_dict())
        if half:
            self.model.half()

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) -> same."""
        return self.model(image).image


def export_program(model: MEASNet, *, half: bool = False) -> ExportedProgram:
    """`torch.export` of the network in evaluation mode, with free height and width.

    Args:
        model: its weights are copied.
        half: compute in fp16; input and output stay fp32.
    """
    module = Picture(model, half=half).eval()
    least, largest = SIZES[model.config.variant]
    height = 8 * Dim("eighth_height", min=least // 8, max=largest // 8)
    width = 8 * Dim("eighth_width", min=least // 8, max=largest // 8)
    example = torch.rand(1, 3, least + 16, least + 40)
    with torch.no_grad():
        return torch.export.export(
            module, (example,), dynamic_shapes={"image": {2: height, 3: width}}
        )


def export_onnx(model: MEASNet, path: str | PathLike[str], *, half: bool = False) -> None:
    """Write the network as ONNX, weights included; the file appears when it is complete.

    Raises:
        ImportError: the packages onnx and onnxscript are not installed.
    """
    _need("onnx", "onnxscript")
    with _without_notes():
        program = torch.onnx.export(
            export_program(model, half=half),
            (),
            input_names=["image"],
            output_names=["restored"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for part in (graph, *graph):  # torch's notes name files of this machine, and are large
        part.metadata_props.clear()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as unfinished:
        program.save(unfinished)


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Hides torch's and onnxscript's notes: a missing torchvision, operations left as they are, a
    deprecated class that torch itself uses. Errors are still shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def check_onnx(model: MEASNet, path: str | PathLike[str]) -> float:
    """Largest difference of onnxruntime's result to the network's, over pictures of two sizes.

    Raises:
        ImportError: the package onnxruntime is not installed.
    """
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    least, _ = SIZES[model.config.variant]
    worst = 0.0
    for height, width in ((least, least + 8), (least + 48, least + 24)):
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        (restored,) = session.run(["restored"], {"image": image.numpy()})
        with torch.no_grad():
            expected = model(image).image
        worst = max(worst, (torch.from_numpy(restored) - expected).abs().max().item())
    return worst


def export_folder(
    model: MEASNet, folder: Path, *, run: Path | None = None, evaluation: Path | None = None
) -> None:
    """Write config.json, model.safetensors and README.md, the layout of the Hugging Face hub.

    Args:
        model: the network.
        folder: made if it is missing; its files of these names are replaced.
        run: folder of the run that trained it, for the model card.
        evaluation: summary.json of `python -m distributed.evaluate`; None: what the run has.
    """
    facts = facts_of_run(run or folder, evaluation)
    card = model_card(model.config, facts, sum(p.numel() for p in model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / WEIGHTS)
    config = {"model_type": "measnet", **configs.to_dict(model.config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / CARD).write_text(card)


def _run_of(source: Path) -> Path | None:
    """The folder of the run that the weights are from; None where they are from no run."""
    if source.is_dir():
        return source
    marks = ("checkpoints", "config.yaml", "outcome.json")
    is_run = source.exists() and any((source.parent / mark).exists() for mark in marks)
    return source.parent if is_run else None


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write trained weights for other programs.

    The suffix of OUT decides: .onnx is ONNX, .pt2 a program of torch.export, no suffix a folder in
    the layout of the Hugging Face hub.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Weights: a .safetensors file, a checkpoint of the authors' program, a run folder, or the name
    of a model on the Hugging Face hub."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder, or file with the suffix .onnx or .pt2."""
    half: bool = False
    """Graphs compute in fp16; their input and output stay fp32."""
    evaluation: Path | None = None
    """summary.json of `python -m distributed.evaluate`, for the model card; default: what the run
    folder has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m measnet.export")
    try:
        print(_export(given))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(given: Arguments) -> str:
    kind = given.out.suffix.lower()
    if kind not in ("", ".onnx", ".pt2"):
        raise ValueError(
            f"OUT is {given.out}, but its suffix must be .onnx, .pt2 or none (a folder)"
        )
    if given.half and not kind:
        raise ValueError("--half is for .onnx and .pt2: model.safetensors keeps fp32")
    if given.evaluation and not given.evaluation.is_file():
        raise FileNotFoundError(f"--evaluation is {given.evaluation}, but there is no such file")
    model = load_weights(given.model)
    if not kind:
        run = _run_of(Path(given.model))
        export_folder(model, given.out, run=run, evaluation=given.evaluation)
        return f"{given.out}: {CONFIG}, {WEIGHTS}, {CARD}; upload it as it is"
    if kind == ".pt2":
        program = export_program(model, half=given.half)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(given.out) as unfinished:
            torch.export.save(program, unfinished)
        return f"{given.out}: takes (1, 3, H, W) in [0, 1], multiples of 8"
    export_onnx(model, given.out, half=given.half)
    checked = "onnxruntime is not installed, so the file was not run"
    if find_spec("onnxruntime"):
        worst = check_onnx(model, given.out)
        checked = f"onnxruntime gives the network's result, largest difference {worst:.1e}"
    return f"{given.out}: takes (1, 3, H, W) in [0, 1], multiples of 8\n{checked}"


if __name__ == "__main__":
    sys.exit(main())
