"""MEASNet, in the order of the paper's Fig. 2.

Features are BHWC (see transformer.py). Levels 1 to 4 have dim, 2·dim, 4·dim, 8·dim channels at 1,
1/2, 1/4, 1/8 of the size. In the decoder level 1 has 2·dim, because the encoder's features are
concatenated there.
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from measnet import config as configs
from measnet.config import ModelConfig
from measnet.experts import PixelExperts, Use
from measnet.files import complete_file
from measnet.frequency import FrequencyExperts
from measnet.hub import weights_file
from measnet.official import network as official
from measnet.ops import gpu_library
from measnet.prompts import PromptConcat, TaskPrompt
from measnet.transformer import Conv3x3, Downsample, Merge, TransformerBlock, Upsample

MIN_SIDE = 16
"""Smaller pictures are padded to this; the prompt needs 9 pixels a side, level 4 needs 8."""
PIXEL_LIBRARIES = ("encoder1", "encoder2", "encoder3")
"""Names of the per-pixel libraries; those of the per-picture ones are like `decoder3.low`."""
FORMAT = "measnet-1"
"""Format name in the metadata of our safetensors files."""
CONFIG_ENTRY = "measnet.config"
"""Entry of such a file that holds the config: bytes of JSON in UTF-8."""


class Restoration(NamedTuple):
    """Output of `MEASNet`, in training and in evaluation."""

    image: Tensor
    """(B, 3, H, W), the size of the input; not clamped."""
    balance_loss: Tensor
    """() fp32: Eq. 6 over the pictures and libraries, without lambda; 0 without experts."""
    routing: dict[str, Tensor]
    """Block -> (B, N), detached. Per-pixel libraries ("encoder1"): share of the picture's pixels
    that chose expert n (rows sum to K). Per-picture libraries ("decoder3.low"): 1 if chosen."""
    z_loss: Tensor
    """() fp32: what `RoutingConfig.z_loss` adds to the loss, weighted; 0 where it is off."""


class MEASNet(nn.Module):
    """Multi-expert adaptive selection network for haze, rain, noise, blur and low light."""

    def __init__(self, config: ModelConfig) -> None:
        """Random weights; `from_pretrained` reads trained ones."""
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Recompute the transformer blocks in the backward pass: less memory, more time."""
        self.defer_statistics = False
        """Update running statistics only in `measnet.step_statistics.commit_statistics`."""
        self.min_side = MIN_SIDE
        width1, width2, width3, width4 = config.widths

        temperature = config.routing.prompt_temperature
        self.prompt = (
            TaskPrompt(config.prompts, config.prompt_dim, temperature=temperature)
            if config.tspg
            else None
        )
        self.patch_embed = Conv3x3(3, width1)
        self.experts1 = self._pixel_experts(width1)
        self.encoder1 = self._blocks(width1, level=1)
        self.down1 = Downsample(width1)
        self.experts2 = self._pixel_experts(width2)
        self.encoder2 = self._blocks(width2, level=2)
        self.down2 = Downsample(width2)
        self.experts3 = self._pixel_experts(width3)
        self.encoder3 = self._blocks(width3, level=3)
        self.down3 = Downsample(width3)

        self.latent = self._blocks(width4, level=4)

        self.up3 = Upsample(width4)
        self.reduce3 = Merge(width3, width3)
        self.frequency3 = self._frequency_experts(width3)
        self.decoder3 = self._blocks(width3, level=3)
        self.up2 = Upsample(width3)
        self.reduce2 = Merge(width2, width2)
        self.frequency2 = self._frequency_experts(width2)
        self.decoder2 = self._blocks(width2, level=2)
        self.up1 = Upsample(width2)
        self.frequency1 = self._frequency_experts(width2)
        self.decoder1 = self._blocks(width2, level=1)
        self.refinement = self._blocks(width2, level=1, count=config.num_refinement_blocks)
        self.output = Conv3x3(width2, 3)

        self.extra = nn.ModuleDict()
        """Blocks that the paper does not have; filled by the variant official."""
        if config.variant == "official":
            self.min_side = official.OFFICIAL_MIN_SIDE
            for name, part in official.replacements(config).items():
                setattr(self, name, part)
            self.extra.update(official.additions(config))

    def forward(self, image: Tensor, *, generator: torch.Generator | None = None) -> Restoration:
        """Restore a batch.

        Args:
            image: (B, 3, H, W) in [0, 1], any size; padded inside to a multiple of 8 and to
                `min_side`.
            generator: source of the gates' noise in training (variant official, or
                `RoutingConfig.noise`).
        """
        padded = self.pad(image).to(self.patch_embed.weight.dtype)
        if gpu_library.takes(padded):
            with gpu_library.packed_weights(self, padded):
                return self._forward(image, padded, generator)
        return self._forward(image, padded, generator)

    def _forward(
        self, image: Tensor, padded: Tensor, generator: torch.Generator | None
    ) -> Restoration:
        prompt = None if self.prompt is None else self.prompt(padded)
        uses: dict[str, Use] = {}

        x = self.patch_embed(padded.permute(0, 2, 3, 1).contiguous())
        x = self._select("encoder1", self.experts1, x, prompt, generator, uses)
        skip1 = self._run(self.encoder1, x)
        x = self.down1(skip1)
        x = self._select("encoder2", self.experts2, x, prompt, generator, uses)
        skip2 = self._run(self.encoder2, x)
        x = self.down2(skip2)
        x = self._select("encoder3", self.experts3, x, prompt, generator, uses)
        skip3 = self._run(self.encoder3, x)

        x = self._run(self.latent, self.down3(skip3))
        x = self._extra("latent", x, padded)

        x = self.reduce3(self.up3(x), skip3)
        x = self._decompose("decoder3", self.frequency3, x, generator, uses)
        x = self._run(self.decoder3, x)
        x = self._extra("decoder3", x, padded)
        x = self.reduce2(self.up2(x), skip2)
        x = self._decompose("decoder2", self.frequency2, x, generator, uses)
        x = self._run(self.decoder2, x)
        x = self._extra("decoder2", x, padded)
        x = torch.cat([self.up1(x), skip1], dim=-1)
        x = self._decompose("decoder1", self.frequency1, x, generator, uses)
        x = self._run(self.decoder1, x)
        x = self._run(self.refinement, x)
        residual = self.output(x).permute(0, 3, 1, 2)[..., : image.shape[-2], : image.shape[-1]]

        shares = {name: one.shares.detach() for name, one in uses.items()}
        balance, z_loss = self._auxiliary_losses(uses, image)
        return Restoration(image + residual, balance, shares, z_loss)

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write weights and running statistics as safetensors, the config in its metadata.

        The config is also an entry, for programs that read the tensors only.
        """
        config = json.dumps(configs.to_dict(self.config))
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        state[CONFIG_ENTRY] = torch.frombuffer(bytearray(config.encode()), dtype=torch.uint8)
        metadata = {"format": FORMAT, "config": config}
        with complete_file(Path(path)) as unfinished:
            save_file(state, unfinished, metadata)

    @classmethod
    def from_pretrained(
        cls, source: str | PathLike[str], *, revision: str | None = None
    ) -> "MEASNet":
        """Read trained weights; in evaluation mode, on the CPU.

        Args:
            source: a file of `save_pretrained`, a folder that `measnet.export` wrote, or the name
                of such a folder on the Hugging Face hub (`owner/name`).
            revision: branch, tag or commit on the hub; None: its main branch.

        Raises:
            ValueError: another kind of file, or its weights do not fit its config.
            OSError: there is no such file, or the hub cannot be reached.
            ImportError: a name of the hub, but huggingface_hub is not installed.
        """
        path = weights_file(source, revision=revision)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:  # safetensors has its own error types
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} has no MEASNet config; read weights of the authors' program by "
                "measnet.official.weights.load"
            )
        return cls.from_entries(state, metadata["config"], path)

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, Tensor], config: str, path: str | PathLike[str] = "the file"
    ) -> "MEASNet":
        """The network in evaluation mode, from the entries of its file and its config as JSON.

        `path` is for messages.

        Raises:
            ValueError: the weights do not fit the config.
        """
        model = cls(configs.from_dict(ModelConfig, json.loads(config), "model"))
        try:
            model.load_state_dict({k: v for k, v in entries.items() if k != CONFIG_ENTRY})
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its own config: {error}") from error
        return model.eval()

    def _blocks(self, channels: int, level: int, count: int | None = None) -> nn.ModuleList:
        config = self.config
        count = config.num_blocks[level - 1] if count is None else count
        heads = config.heads[level - 1]
        return nn.ModuleList(
            TransformerBlock(channels, heads, config.ffn_expansion) for _ in range(count)
        )

    def _pixel_experts(self, channels: int) -> nn.Module | None:
        """STP-G-MESE, or the parts of it that are switched on."""
        config = self.config
        if config.mese:
            return PixelExperts(
                channels,
                experts=config.pixel_experts,
                top_k=config.pixel_top_k,
                expansion=config.ffn_expansion,
                prompt_length=config.prompt_dim if config.tspg else None,
                path=config.expert_path,
                routing=config.routing,
            )
        return PromptConcat(channels, config.prompt_dim) if config.tspg else None

    def _frequency_experts(self, channels: int) -> nn.Module | None:
        """FD-MEE, or the parts of it that are switched on."""
        config = self.config
        if not (config.fd or config.mee):
            return None
        return FrequencyExperts(
            channels,
            experts=config.image_experts,
            top_k=config.image_top_k,
            path=config.expert_path,
            fd=config.fd,
            mee=config.mee,
            routing=config.routing,
        )

    def pad(self, image: Tensor) -> Tensor:
        """Pad to a multiple of 8 and to `min_side`, by repeating the last row and column."""
        height, width = image.shape[-2:]
        below = max(-height % 8, self.min_side - height)
        right = max(-width % 8, self.min_side - width)
        return F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image

    def _select(
        self,
        name: str,
        experts: nn.Module | None,
        x: Tensor,
        prompt: Tensor | None,
        generator: torch.Generator | None,
        uses: dict[str, Use],
    ) -> Tensor:
        if experts is None:
            return x
        if isinstance(experts, PromptConcat):
            return experts(x, prompt)
        x, uses[name] = experts(x, prompt, generator)
        return x

    def _decompose(
        self,
        level: str,
        experts: nn.Module | None,
        x: Tensor,
        generator: torch.Generator | None,
        uses: dict[str, Use],
    ) -> Tensor:
        if experts is None:
            return x
        x, of_bands = experts(x, self.defer_statistics, generator)
        uses.update({f"{level}.{band}": use for band, use in of_bands.items()})
        return x

    def _extra(self, name: str, x: Tensor, image: Tensor) -> Tensor:
        return self.extra[name](x, image) if name in self.extra else x

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def _auxiliary_losses(self, uses: dict[str, Use], image: Tensor) -> tuple[Tensor, Tensor]:
        """The balance loss without lambda, and the z-loss; both ()."""
        zero = torch.zeros((), device=image.device)
        routing = self.config.routing
        pixel, picture, z_losses = [], [], []
        for name, use in uses.items():
            if use.z_loss is not None:
                z_losses.append(use.z_loss)
            if use.balance is None:
                continue
            if name in PIXEL_LIBRARIES:
                weight = routing.level_weights[PIXEL_LIBRARIES.index(name)]
                pixel.append(use.balance if weight == 1 else weight * use.balance)
            else:
                picture.append(routing.picture_weight * use.balance)
        z_loss = torch.stack(z_losses).sum() if z_losses else zero
        balance = zero
        if pixel:
            losses = torch.stack(pixel)
            balance = losses.sum() if self.config.variant == "official" else losses.mean()
        if picture and routing.picture_weight:
            balance = balance + torch.stack(picture).mean()
        return balance, z_loss
