"""A training step in a bare loop: what the network and the optimizer take, without Ray and
DeepSpeed."""

from collections.abc import Callable

import torch

from distributed.graphs import WARM_UP, capture, side_stream
from measnet import config as configs
from measnet.config import replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import gpu_library


def build(preset: str) -> MEASNet:
    """A network with random weights, its experts on the path that needs no synchronisation."""
    torch.manual_seed(0)
    return MEASNet(replace_dotted(getattr(configs, preset)(), {"expert_path": "dense"}))


class Training:
    """Network, optimizer and one batch, all on the device."""

    def __init__(
        self, model: MEASNet, device: torch.device, batch: int, crop: int, precision: str
    ) -> None:
        self._model = model.to(device).train()
        on_gpu = device.type == "cuda"
        self._adam = torch.optim.AdamW(
            self._model.parameters(), lr=2e-4, fused=on_gpu, capturable=on_gpu
        )
        self._image = torch.rand(batch, 3, crop, crop, device=device)
        self._clean = torch.rand(batch, 3, crop, crop, device=device)
        self._bf16 = precision == "bf16"

    def step(self) -> None:
        """Forward, backward and update."""
        device = self._image.device.type
        # Weights are cast in every step, also in one that a graph repeats.
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            restoration = self._model(self._image)
        restoration_loss(restoration, self._clean, 1e-4).total.backward()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def graphed(self) -> Callable[[], None]:
        """The same step as one CUDA graph.

        Raises:
            RuntimeError: it cannot be captured; what runs without a graph works as before.
        """
        with side_stream(self._image.device):
            for _ in range(WARM_UP):
                self.step()
        return capture(self.step)[0]


def launches(model: MEASNet, batch: int, crop: int) -> list[gpu_library.Launch]:
    """The Triton kernels of one step in bf16, counted on `meta`."""
    with gpu_library.stand_in("meta"), gpu_library.counting() as found:
        Training(model, torch.device("meta"), batch, crop, "fp32").step()
    return found
