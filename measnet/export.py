"""The network for other programs: `torch.export` and ONNX.

    python -m measnet.export model.safetensors model.onnx

The exported graph takes `image`, float32 (1, 3, H, W), RGB in [0, 1], and gives `restored` of the
same size. H and W are multiples of 8 from 24 to 4096 (variant official: from 64 to 248, because its
frequency blocks compute larger ones in another way). The caller must do this:

* before: value / 255 of an 8-bit picture; pad below and right to a multiple of 8 and the least size
  by repeating the last row and column (`numpy.pad(..., mode="edge")`);
* after: cut the padding off, clamp to [0, 1], times 255, round.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from measnet.config import replace_dotted
from measnet.network import MEASNet
from measnet.weights import load_weights

SIZES = {"paper": (24, 4096), "official": (64, 248)}
"""Smallest and largest side of the graph's input."""


class Picture(nn.Module):
    """Returns the restored picture only; uses the dense expert path, whose shapes are static."""

    def __init__(self, model: MEASNet) -> None:
        """`model` is copied: its configuration is changed."""
        super().__init__()
        config = replace_dotted(model.config, {"expert_path": "dense"})
        self.model = MEASNet(config).to(next(model.parameters()).device)
        self.model.load_state_dict(model.state_dict())

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) -> same."""
        return self.model(image).image


def export_program(model: MEASNet) -> ExportedProgram:
    """`torch.export` of the network in evaluation mode, with free height and width."""
    module = Picture(model).eval()
    least, largest = SIZES[model.config.variant]
    height = 8 * Dim("eighth_height", min=least // 8, max=largest // 8)
    width = 8 * Dim("eighth_width", min=least // 8, max=largest // 8)
    example = torch.rand(1, 3, least + 16, least + 40)
    with torch.no_grad():
        return torch.export.export(
            module, (example,), dynamic_shapes={"image": {2: height, 3: width}}
        )


def export_onnx(model: MEASNet, path: str | PathLike[str]) -> None:
    """Write the network as ONNX, weights included; needs the packages onnx and onnxscript."""
    program = torch.onnx.export(
        export_program(model), (), input_names=["image"], output_names=["restored"], dynamo=True
    )
    assert program is not None
    program.save(path)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the network as ONNX, with free height and width."""

    model: tyro.conf.Positional[str]
    """Weights: a .safetensors file, a checkpoint of the authors' program, or a run folder."""
    out: tyro.conf.Positional[str]
    """ONNX file to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m measnet.export")
    try:
        export_onnx(load_weights(given.model), given.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: takes (1, 3, H, W) in [0, 1], multiples of 8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
