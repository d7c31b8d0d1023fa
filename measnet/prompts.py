"""TSPG, task-specific prompt generation (Eq. 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measnet.ops.convolution import pointwise
from measnet.ops.whole import pixel_mean
from measnet.transformer import weight

PROMPT_MIN_SIDE = 9
"""Smallest side in pixels for two convolutions of stride 3; their joint stride."""


class TaskPrompt(nn.Module):
    """p̃ = gelu(q · P_t): weights `q` from the picture mix T learnt prompts `P_t` (Eq. 1)."""

    def __init__(
        self, prompts: int, length: int, width: int = 64, temperature: float = 1.0
    ) -> None:
        """Learnt prompts, and the layers that read the picture.

        Args:
            prompts: T.
            length: M.
            width: channels of the layers that give `q`.
            temperature: divides the logits of `q`.
        """
        super().__init__()
        self.temperature = temperature

        def leaky() -> nn.Module:
            return nn.LeakyReLU(0.1)

        self.reader = nn.Sequential(
            *(nn.Conv2d(3, width, 3, stride=3), leaky()),
            *(nn.Conv2d(width, width, 3, stride=3), leaky()),
            *(nn.Conv2d(width, width, 1), leaky()),
            *(nn.Conv2d(width, width, 1), leaky()),
            nn.Conv2d(width, 32, 1),
        )
        self.mix = nn.Linear(32, prompts)
        self.prompts = nn.Parameter(torch.randn(prompts, length))

    def forward(self, image_bchw: Tensor) -> Tensor:
        """(B, 3, H, W) -> the prompt of each picture, (B, M).

        Raises:
            ValueError: the picture is too small for the two strided convolutions.
        """
        if min(image_bchw.shape[-2:]) < PROMPT_MIN_SIDE:
            height, width = image_bchw.shape[-2:]
            raise ValueError(
                f"the picture is {height}x{width}, but needs at least "
                f"{PROMPT_MIN_SIDE} pixels a side"
            )
        read_bchw = self.reader(image_bchw)
        read_bc = pixel_mean(read_bchw.permute(0, 2, 3, 1)).to(read_bchw.dtype)
        return F.gelu(self.weights(read_bc) @ self.prompts.to(read_bc.dtype))

    def weights(self, read_bc: Tensor) -> Tensor:
        """q of Eq. 1, (B, T): how much of each basic prompt, from what `reader` saw."""
        logits = self.mix(read_bc).float()
        if self.temperature != 1:
            logits = logits / self.temperature
        return torch.softmax(logits, dim=-1).to(read_bc.dtype)


class PromptConcat(nn.Module):
    """TSPG without experts (Table VI): the prompt beside every pixel, a 1×1 convolution 2C → C."""

    def __init__(self, channels: int, length: int) -> None:
        """`length` is M."""
        super().__init__()
        self.to_channels = nn.Linear(length, channels)
        self.weight = weight(channels, 2 * channels, fan_in=2 * channels)

    def forward(self, x_bhwc: Tensor, prompt_bm: Tensor) -> Tensor:
        """Features (B, H, W, C) and prompts (B, M) -> (B, H, W, C)."""
        for_features, for_prompt = self.weight.chunk(2, dim=1)
        prompt_bc = F.linear(self.to_channels(prompt_bm), for_prompt)
        return pointwise(x_bhwc, for_features) + prompt_bc[:, None, None]
