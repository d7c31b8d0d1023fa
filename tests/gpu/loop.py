"""A bare training loop in a process of its own: what a step takes, without Ray and DeepSpeed.

python -m tests.gpu.loop --device cuda --preset paper --batch 8 --crop 128

Prints one line of JSON: `samples_per_s`, the median over the steps; `peak`, the most bytes that
tensors took, with the weights, their gradients, moments and average; `loss`, after the last step.
"""

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from distributed.engine import use_deterministic_algorithms
from measnet import config as configs
from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.memory import state_bytes
from measnet.network import MEASNet
from measnet.ops.choice import torch_only


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train on random pictures."""

    device: str
    """cuda or cpu."""
    preset: str
    """Function of measnet.config."""
    batch: int
    """Pictures a step."""
    crop: int
    """Their side in pixels."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 is autocast."""
    checkpointing: bool = False
    """Recompute the transformer blocks."""
    kernels: bool = False
    """Compute with Triton's kernels, and not with torch alone."""
    deterministic: bool = False
    """Only operations that repeat exactly."""
    steps: int = 10
    """Steps that are timed, after three that warm up."""


def network(preset: str) -> ModelConfig:
    """A preset with the experts' path that a GPU takes."""
    build = getattr(configs, preset)
    return replace_dotted(build(), {"expert_path": "dense"})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0."""
    given = tyro.cli(Arguments, args=argv, prog="python -m tests.gpu.loop")
    device = torch.device(given.device)
    if given.deterministic:
        use_deterministic_algorithms()
    torch.manual_seed(0)
    model = MEASNet(network(given.preset)).to(device)
    model.activation_checkpointing = given.checkpointing
    # One kernel for each weight and no copies of many: nothing besides what is predicted.
    adam = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
    average = [p.detach().clone() for p in model.parameters()]
    image = torch.rand(given.batch, 3, given.crop, given.crop, device=device)

    def autocast() -> AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16")

    def step(picture: torch.Tensor) -> float:
        start = time.perf_counter()
        with autocast():
            restoration = model(picture)
        losses = restoration_loss(restoration, picture.flip(-1), 1e-4)
        losses.total.backward()
        adam.step()
        adam.zero_grad(set_to_none=False)
        loss = losses.total.item()  # waits for the step
        seconds.append(time.perf_counter() - start)
        return loss

    seconds: list[float] = []
    with nullcontext() if given.kernels else torch_only():
        step(image[:1, :, :32, :32])  # libraries and moments are there
        before = _resident("VmRSS")
        for _ in range(2):
            step(image)
        seconds.clear()
        for _ in range(given.steps):
            loss = step(image)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = _resident("VmHWM") - before + state_bytes(sum(p.numel() for p in average))
    speed = given.batch / statistics.median(seconds)
    print(json.dumps({"samples_per_s": speed, "peak": peak, "loss": loss}))
    return 0


def _resident(field: str) -> int:
    """Bytes of this process's memory by a field of /proc: VmRSS is now, VmHWM the most ever."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
