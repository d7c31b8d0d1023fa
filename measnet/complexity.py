"""Size of the network: parameters, multiply-adds, and the memory of training.

    python -m measnet.complexity [paper|official|tiny] [--chart FILE.png]
    python -m measnet.complexity [preset] --memory 24GiB [--crop 128] [--precision bf16]
    python -m measnet.complexity [preset] --cards [--crop 128]

One multiply-add counts as 1. fvcore counts the executed operations for one picture of 256×256×3:
convolutions, matrix products, layer norms (2 per element) and bilinear resizing; only K of N
experts, and only the frequencies that are computed. The per-picture experts differ in width: the
widest K are counted, which is the highest cost of a picture.
Not counted: activations, additions, softmax, pooling, sorting and copying.
"""

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from measnet import config as configs
from measnet.config import ModelConfig
from measnet.frequency import PictureExperts
from measnet.memory import Precision, cards_table, memory_table, parse_bytes
from measnet.network import MEASNet

PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "paper": configs.paper,
    "official": configs.official,
    "tiny": configs.tiny,
}
SIDE = 256
"""Height and width of the picture for multiply-adds, as in the paper's Fig. 9."""
DEAD_OFFICIAL_PARAMETERS = 1_496_160
"""Parameters of the authors' program at full width that have no effect on the result."""


class Peer(NamedTuple):
    """Another network: its size by fvcore on its authors' code, its PSNR from its paper."""

    name: str
    parameters: float
    """Millions."""
    multiply_adds: float
    """10⁹, for 256×256×3."""
    psnr: float
    """dB, mean over SOTS, Rain100L and BSD68 at σ 15, 25, 50, from its paper."""


PEERS = (
    Peer("MoCE-IR-S", 11.48, 44.4, 32.57),
    Peer("MoCE-IR", 25.35, 94.2, 32.73),
    Peer("AdaIR", 28.78, 161.8, 32.69),
    Peer("PromptIR", 35.59, 172.7, 32.06),
    Peer("MEASNet (authors' program)", 31.68, 179.2, 32.85),
)


# --- Multiply-adds ---


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """Size of one network."""

    parameters: dict[str, int]
    """By top-level block."""
    multiply_adds: dict[str, float]
    """By top-level block."""
    operators: dict[str, float]
    """Multiply-adds by operator."""

    @property
    def total_parameters(self) -> int:
        """All parameters, also those that are not trained."""
        return sum(self.parameters.values())

    @property
    def total_multiply_adds(self) -> float:
        """For one picture."""
        return sum(self.multiply_adds.values())


class _Image(nn.Module):
    """Returns one tensor, as fvcore needs."""

    def __init__(self, network: MEASNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).image


def count(model: MEASNet, height: int = SIDE, width: int = SIDE) -> Complexity:
    """Parameters, and the highest number of multiply-adds for one picture, by block."""
    training = model.training
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with torch.no_grad(), _widest_experts(model):
        analysis = FlopCountAnalysis(_Image(model.eval()), image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::layer_norm", _layer_norm)
        by_module, operators = analysis.by_module(), analysis.by_operator()
    model.train(training)
    blocks = [name for name, child in model.named_children() if any(True for _ in child.modules())]
    multiply_adds = {name: float(by_module[f"network.{name}"]) for name in blocks}
    parameters = {
        name: sum(p.numel() for p in getattr(model, name).parameters()) for name in blocks
    }
    kept = [name for name in blocks if parameters[name]]
    return Complexity(
        parameters={name: parameters[name] for name in kept},
        multiply_adds={name: multiply_adds[name] for name in kept},
        operators={name: float(value) for name, value in operators.items() if value},
    )


@contextmanager
def _widest_experts(model: MEASNet) -> Iterator[None]:
    """Inside the block, each picture chooses the widest experts, independent of the weights."""
    libraries = [module for module in model.modules() if isinstance(module, PictureExperts)]
    kept = [(library.gate.data, library.gate_bias.data) for library in libraries]
    for library in libraries:
        widths = torch.tensor(library.widths, dtype=library.gate_bias.dtype)
        library.gate.data = torch.zeros_like(library.gate)
        library.gate_bias.data = widths.to(library.gate_bias.device)
    try:
        yield
    finally:
        for library, (gate, bias) in zip(libraries, kept, strict=True):
            library.gate.data, library.gate_bias.data = gate, bias


def network_cost(config: ModelConfig) -> dict[str, float]:
    """`parameters`, and `multiply_adds` of one picture of 256×256 (one multiply-add = 1)."""
    counted = count(MEASNet(config))
    return {
        "parameters": float(counted.total_parameters),
        "multiply_adds": float(counted.total_multiply_adds),
    }


def latency_ms(config: ModelConfig, device: str) -> float:
    """Median time of restoring one picture of 128×128, in milliseconds."""
    model = MEASNet(config).to(device).eval()
    picture = torch.full((1, 3, 128, 128), 0.5, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(9):
            start = time.perf_counter()
            model(picture)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1000  # the first two warm up


def _layer_norm(inputs: list[Any], outputs: list[Any]) -> float:
    """Two per element: one for the normalisation, one for weight and bias."""
    elements = 1
    for size in inputs[0].type().sizes():
        elements *= size
    return 2.0 * elements


def table(complexity: Complexity) -> str:
    """Blocks in the order of the figure, for the terminal."""
    lines = [f"{'block':<16}{'parameters':>14}{'10⁹ multiply-adds':>20}"]
    for name, parameters in complexity.parameters.items():
        gigas = complexity.multiply_adds[name] / 1e9
        lines.append(f"{name:<16}{parameters:>14,}{gigas:>20.3f}")
    total = complexity.total_multiply_adds / 1e9
    lines.append(f"{'total':<16}{complexity.total_parameters:>14,}{total:>20.3f}")
    return "\n".join(lines)


def peers_table(name: str, complexity: Complexity) -> str:
    """The size beside other networks, as a table for the terminal."""
    ours = f"this, {name}"
    lines = [f"{'network':<30}{'10⁶ parameters':>16}{'10⁹ multiply-adds':>20}{'PSNR printed':>14}"]
    for peer in PEERS:
        figures = f"{peer.parameters:>16.2f}{peer.multiply_adds:>20.1f}{peer.psnr:>14.2f}"
        lines.append(f"{peer.name:<30}{figures}")
    size = f"{complexity.total_parameters / 1e6:>16.2f}"
    lines.append(f"{ours:<30}{size}{complexity.total_multiply_adds / 1e9:>20.1f}{'':>14}")
    return "\n".join(lines)


def bubble_chart(name: str, complexity: Complexity, path: str | PathLike[str]) -> None:
    """PSNR over multiply-adds, areas by parameters; this network has no PSNR and is a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for peer in PEERS:
        axes.scatter(peer.multiply_adds, peer.psnr, s=25 * peer.parameters, alpha=0.6)
        radius = (25 * peer.parameters / math.pi) ** 0.5  # points; `s` is an area
        _beside(axes, f"{peer.name}\n{peer.parameters:.1f} M", peer[2:], radius + 4)
    ours = complexity.total_multiply_adds / 1e9
    axes.axvline(ours, linestyle="--", color="grey", zorder=0)
    label = f"this, {name}: {complexity.total_parameters / 1e6:.1f} M"
    _beside(axes, label, (ours, 31.95), 4)
    axes.set_xlabel("10⁹ multiply-adds for 256×256×3 (fvcore)")
    axes.set_ylabel("mean PSNR, three tasks, as printed in the papers [dB]")
    axes.set_xlim(0, 275)
    axes.set_ylim(31.9, 33.1)
    figure.savefig(path, dpi=150)


def _beside(axes: Any, label: str, at: tuple[float, float], points: float) -> None:
    """Write a label to the right of a position, at a distance in points."""
    offset = {"xytext": (points, 0), "textcoords": "offset points"}
    axes.annotate(label, at, ha="left", va="center", fontsize=8, **offset)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Parameters, multiply-adds and training memory of a network.

    One multiply-add counts as 1, for a picture of 256×256×3. docs/network.md says what is counted.
    """

    preset: tyro.conf.Positional[str] = "paper"
    """paper, official or tiny."""
    chart: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """Write the bubble chart here."""
    memory: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """Memory of a GPU, such as 24GiB: print the largest micro-batch for training instead."""
    cards: bool = False
    """Print the largest micro-batch of each card instead."""
    crop: int = 128
    """Side of the training crops in pixels."""
    precision: Precision = "bf16"
    """Arithmetic of training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m measnet.complexity")
    try:
        if given.preset not in PRESETS:
            raise ValueError(f"unknown preset {given.preset}; choose {', '.join(PRESETS)}")
        if given.crop < 1:
            raise ValueError(f"--crop is {given.crop}, but must be at least 1")
        config = PRESETS[given.preset]()
        if given.memory:
            budget = parse_bytes(given.memory)
            print(memory_table(config, budget, given.crop, given.precision))
            return 0
        if given.cards:
            print(cards_table(config, given.crop))
            return 0
        complexity = count(MEASNet(config))
        print(table(complexity), peers_table(given.preset, complexity), sep="\n\n")
        if given.preset == "official":
            print(f"The authors' program stores {DEAD_OFFICIAL_PARAMETERS:,} more, without effect.")
        if given.chart:
            bubble_chart(given.preset, complexity, given.chart)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
