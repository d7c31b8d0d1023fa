"""Reads checkpoints of the authors' released program into our network.

Each entry of a checkpoint is used, or known to have no effect, or refused by its name.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from measnet.config import ModelConfig
from measnet.errors import first_line
from measnet.network import MEASNet
from measnet.official.network import MINING_HEADS


def load(path: str | PathLike[str]) -> MEASNet:
    """Read a checkpoint of the authors' program: Lightning `.ckpt`, `.pth` or safetensors.

    All sizes are inferred from the entries, except K, which is 2 as in the program. Only plain
    data is unpickled (`weights_only`).

    Returns:
        The network in evaluation mode, on the CPU, fp32.

    Raises:
        ValueError: another kind of file; or an entry (named) is missing, unknown or misshapen.
    """
    return from_entries(_read(Path(path)))


def from_entries(entries: Mapping[str, Tensor]) -> MEASNet:
    """The same from the entries of a checkpoint, with or without a prefix."""
    entries = strip_prefix(entries)
    model = MEASNet(infer_config(entries))
    state = convert(entries, model.config)
    model.load_state_dict(state)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has error types of its own
        raise ValueError(
            f"{path} cannot be read safely as a checkpoint (weights only): {first_line(error)}"
        ) from error
    for wrapper in ("state_dict", "params", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} has no state dict")
    wrong = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{path} has entries that are not tensors: {', '.join(wrong[:5])}")
    return dict(content)


def strip_prefix(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries without the prefix of a wrapper (`net.`, `module.net.`, ...)."""
    anchor = "patch_embed.proj.weight"
    found = [key for key in entries if key == anchor or key.endswith("." + anchor)]
    if len(found) != 1:
        raise ValueError(f"no weights of MEASNet: {len(found)} entries are named {anchor}, not 1")
    prefix = found[0].removesuffix(anchor)
    return {key.removeprefix(prefix): value for key, value in entries.items()}


def infer_config(entries: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration whose network has these entries (names without prefix)."""

    def shape(key: str) -> torch.Size:
        if key not in entries:
            raise ValueError(f"entry {key} is missing")
        return entries[key].shape

    def count(stage: str) -> int:
        numbers = {int(k.split(".")[1]) for k in entries if k.startswith(stage + ".")}
        return len(numbers)

    stages = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    dim = shape("patch_embed.proj.weight")[0]
    hidden = [shape(f"{stage}.0.ffn.project_out.weight")[1] for stage in stages]
    pixel_hidden = [shape(f"stpg_g_mese{level}.model.el.0.fc1.weight")[0] for level in (1, 2, 3)]
    widths = [dim * 2**level for level in range(4)]
    prompts, prompt_dim = shape("task_prompt.dictionary")
    pixel_experts = shape("stpg_g_mese1.model.w_g")[1]
    image_experts = shape("fe_mee1.high_block.block.moe_layer.wet.body.2.weight")[0]
    blocks = [count(stage) for stage in stages]
    heads = [shape(f"{stage}.0.attn.temperature")[0] for stage in stages]
    return ModelConfig(
        variant="official",
        dim=dim,
        num_blocks=(blocks[0], blocks[1], blocks[2], blocks[3]),
        num_refinement_blocks=count("refinement"),
        heads=(heads[0], heads[1], heads[2], heads[3]),
        ffn_expansion=_expansion(widths + widths[:3], hidden + pixel_hidden),
        prompts=prompts,
        prompt_dim=prompt_dim,
        pixel_experts=pixel_experts,
        pixel_top_k=min(2, pixel_experts),
        image_experts=image_experts,
        image_top_k=min(2, image_experts),
    )


def _expansion(widths: list[int], hidden: list[int]) -> float:
    """The shortest factor with int(width · factor) == hidden for all; the usual 2.66 first."""
    least = max(h / w for w, h in zip(widths, hidden, strict=True))
    for digits in range(16):
        for candidate in (2.66, round(least, digits), round(least + 10.0**-digits, digits)):
            if all(int(w * candidate) == h for w, h in zip(widths, hidden, strict=True)):
                return candidate
    raise ValueError(
        f"hidden channels {hidden} of the feed-forwards and experts at {widths} channels "
        f"(entries *.ffn.project_out.weight, *.el.0.fc1.weight) follow from no one expansion factor"
    )


class _Entries:
    """The program's entries; each is taken once."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.left = dict(entries)

    def take(self, key: str, *shape: int) -> Tensor:
        """The entry as fp32; its shape is checked after dropping dimensions of one element."""
        if key not in self.left:
            raise ValueError(f"entry {key} is missing")
        value = self.left.pop(key).float()
        if [n for n in value.shape if n > 1] != [n for n in shape if n > 1]:
            raise ValueError(f"entry {key} has shape {tuple(value.shape)}, not {shape}")
        return value.reshape(shape)

    def drop(self, *keys: str) -> None:
        """Drop entries that the program stores but never uses."""
        for key in keys:
            self.left.pop(key, None)


def convert(entries: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The program's entries (without prefix) as our state dict, strictly.

    Uses differentiable operations, so that gradients can be compared by the program's names.

    Raises:
        ValueError: an entry is missing, unknown or has a wrong shape; names it.
    """
    source = _Entries(entries)
    state: dict[str, Tensor] = {}
    width1, width2, width3, width4 = (config.dim * 2**level for level in range(4))
    heads1, heads2, heads3, heads4 = config.heads

    state["patch_embed.weight"] = source.take("patch_embed.proj.weight", width1, 3, 3, 3)
    state |= _prefixed("prompt", _prompt(source, config))
    for level, width in enumerate((width1, width2, width3), start=1):
        state |= _prefixed(f"experts{level}", _pixel_experts(source, level, width, config))
    for stage, theirs, width, heads, blocks in (
        ("encoder1", "encoder_level1", width1, heads1, config.num_blocks[0]),
        ("encoder2", "encoder_level2", width2, heads2, config.num_blocks[1]),
        ("encoder3", "encoder_level3", width3, heads3, config.num_blocks[2]),
        ("latent", "latent", width4, heads4, config.num_blocks[3]),
        ("decoder3", "decoder_level3", width3, heads3, config.num_blocks[2]),
        ("decoder2", "decoder_level2", width2, heads2, config.num_blocks[1]),
        ("decoder1", "decoder_level1", width2, heads1, config.num_blocks[0]),
        ("refinement", "refinement", width2, heads1, config.num_refinement_blocks),
    ):
        for i in range(blocks):
            block = _transformer_block(source, f"{theirs}.{i}", width, heads, config.ffn_expansion)
            state |= _prefixed(f"{stage}.{i}", block)
    for ours, theirs, width in (
        ("down1", "down1_2", width1),
        ("down2", "down2_3", width2),
        ("down3", "down3_4", width3),
    ):
        kernel = source.take(f"{theirs}.body.0.weight", width // 2, width, 3, 3)
        state[f"{ours}.conv.weight"] = kernel
    for ours, theirs, width in (
        ("up3", "up4_3", width4),
        ("up2", "up3_2", width3),
        ("up1", "up2_1", width2),
    ):
        kernel = source.take(f"{theirs}.body.0.weight", width * 2, width, 3, 3)
        state[f"{ours}.conv.weight"] = kernel
    for level, width in ((3, width3), (2, width2)):
        merge = source.take(f"reduce_chan_level{level}.weight", width, 2 * width)
        state[f"reduce{level}.weight"] = merge
    for ours, theirs, width in (
        ("frequency3", "fe_mee1", width3),
        ("frequency2", "fe_mee2", width2),
        ("frequency1", "fe_mee3", width2),
    ):
        state |= _prefixed(ours, _frequency_experts(source, theirs, width, config))
    for ours, theirs, width in (
        ("latent", "block1", width4),
        ("decoder3", "block2", width3),
        ("decoder2", "block3", width2),
    ):
        state |= _prefixed(f"extra.{ours}", _mining(source, theirs, width))
    state["output.weight"] = source.take("output.weight", 3, width2, 3, 3)
    if source.left:
        names = ", ".join(sorted(source.left)[:5])
        raise ValueError(f"{len(source.left)} entries are unknown: {names}")
    return state


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def _prompt(source: _Entries, config: ModelConfig) -> dict[str, Tensor]:
    at = "task_prompt."
    state = {"prompts": source.take(at + "dictionary", config.prompts, config.prompt_dim)}
    shapes = {0: (64, 3, 3, 3), 2: (64, 64, 3, 3), 4: (64, 64, 1, 1)}
    shapes |= {6: (64, 64, 1, 1), 8: (32, 64, 1, 1)}
    for i, shape in shapes.items():
        state[f"reader.{i}.weight"] = source.take(f"{at}CondNet.{i}.weight", *shape)
        state[f"reader.{i}.bias"] = source.take(f"{at}CondNet.{i}.bias", shape[0])
    state["mix.weight"] = source.take(at + "lastOut.weight", config.prompts, 32)
    state["mix.bias"] = source.take(at + "lastOut.bias", config.prompts)
    return state


def _pixel_experts(
    source: _Entries, level: int, width: int, config: ModelConfig
) -> dict[str, Tensor]:
    at = f"stpg_g_mese{level}."
    experts, hidden = config.pixel_experts, int(width * config.ffn_expansion)
    source.drop(at + "model.mean", at + "model.std")
    state = {
        "gate.to_channels.weight": source.take(at + "fc.weight", width, config.prompt_dim),
        "gate.to_channels.bias": source.take(at + "fc.bias", width),
        "gate.weight": source.take(at + "model.w_g", 2 * width, experts),
        "gate.noise": source.take(at + "model.w_n", 2 * width, experts),
    }
    bank: dict[str, list[Tensor]] = {
        name: [] for name in ("weight_in", "bias_in", "weight_out", "bias_out")
    }
    for n in range(experts):
        expert = f"{at}model.el.{n}."
        bank["weight_in"].append(source.take(expert + "fc1.weight", hidden, width))
        bank["bias_in"].append(source.take(expert + "fc1.bias", hidden))
        bank["weight_out"].append(source.take(expert + "fc2.weight", width, hidden))
        bank["bias_out"].append(source.take(expert + "fc2.bias", width))
    if level == 1:  # the program discards the output of the experts of levels 2 and 3
        state |= {f"bank.{name}": torch.stack(values) for name, values in bank.items()}
    return state


def _transformer_block(
    source: _Entries, at: str, width: int, heads: int, expansion: float
) -> dict[str, Tensor]:
    hidden = int(width * expansion)
    state = {}
    for norm in ("norm1", "norm2"):
        state[f"{norm}.weight"] = source.take(f"{at}.{norm}.body.weight", width)
        state[f"{norm}.bias"] = source.take(f"{at}.{norm}.body.bias", width)
    attn, ffn = f"{at}.attn.", f"{at}.ffn."
    qkv = source.take(attn + "qkv.weight", 3 * width, width)
    qkv_depthwise = source.take(attn + "qkv_dwconv.weight", 3 * width, 1, 3, 3)
    project_in = source.take(ffn + "project_in.weight", 2 * hidden, width)
    depthwise = source.take(ffn + "dwconv.weight", 2 * hidden, 1, 3, 3)
    return state | {
        "attention.temperature": source.take(attn + "temperature", heads, 1, 1),
        "attention.qkv": qkv.unflatten(0, (3, width)),
        "attention.qkv_depthwise": qkv_depthwise.unflatten(0, (3, width)),
        "attention.project_out": source.take(attn + "project_out.weight", width, width),
        "feed_forward.project_in": project_in.unflatten(0, (2, hidden)),
        "feed_forward.depthwise": depthwise.unflatten(0, (2, hidden)),
        "feed_forward.project_out": source.take(ffn + "project_out.weight", width, hidden),
    }


def _frequency_experts(
    source: _Entries, at: str, width: int, config: ModelConfig
) -> dict[str, Tensor]:
    split, taps = f"{at}.spilit.", 72
    source.drop(split + "lamb_l", split + "lamb_h", split + "bn.num_batches_tracked")
    state = {"split.predict": source.take(split + "conv.weight", taps, width)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"split.norm.{name}"] = source.take(f"{split}bn.{name}", taps)
    for band in ("high", "low"):
        state |= _prefixed(band, _rank_experts(source, f"{at}.{band}_block.", width, config))
    state["merge.weight"] = source.take(f"{at}.proj.weight", width, 2 * width)
    state["merge.bias"] = source.take(f"{at}.proj.bias", width)
    return state


def _rank_experts(source: _Entries, at: str, width: int, config: ModelConfig) -> dict[str, Tensor]:
    source.drop(at + "norm_2.weight", at + "norm_2.bias")
    block = at + "block."
    state = {
        f"norm.{name}": source.take(f"{at}norm_1.{name}", width) for name in ("weight", "bias")
    }
    for ours, theirs, shape in (
        ("conv_in", "conv_1.0", (width, width, 3, 3)),
        ("divide", "conv_1.2", (2 * width, width)),
        ("across", "conv_2.0.conv.0", (width, 1, 1, 3)),
        ("along", "conv_2.0.conv.1", (width, 1, 3, 1)),
        ("shrink", "agg_conv.0", (width, 1, 4, 4)),
        ("smooth", "conv.0", (width, 1, 3, 3)),
    ):
        state[ours] = source.take(f"{block}{theirs}.weight", *shape)
        state[f"{ours}_bias"] = source.take(f"{block}{theirs}.bias", shape[0])
    for ours, theirs in (("calibrate", "conv.1"), ("project", "proj")):
        state[f"{ours}.weight"] = source.take(f"{block}{theirs}.weight", width, width)
        state[f"{ours}.bias"] = source.take(f"{block}{theirs}.bias", width)
    layer, experts = block + "moe_layer.", config.image_experts
    state["gate"] = source.take(layer + "wet.body.2.weight", experts, width)
    parts: dict[str, list[Tensor]] = {}
    for n in range(experts):
        rank, expert = n + 2, f"{layer}experts.{n}."
        for ours, theirs in (("from_x", "conv_1"), ("from_k", "conv_2")):
            kernel = source.take(f"{expert}{theirs}.weight", rank, width)
            parts.setdefault(ours, []).append(kernel)
            bias = source.take(f"{expert}{theirs}.bias", rank)
            parts.setdefault(f"{ours}_bias", []).append(bias)
        parts.setdefault("back", []).append(source.take(expert + "conv_3.weight", width, rank))
        parts.setdefault("back_bias", []).append(source.take(expert + "conv_3.bias", width))
    state["back"] = torch.cat(parts.pop("back"), dim=1)
    state["back_bias"] = torch.stack(parts.pop("back_bias"))
    return state | {name: torch.cat(values) for name, values in parts.items()}


def _mining(source: _Entries, at: str, width: int) -> dict[str, Tensor]:
    source.drop(f"{at}.initial_conv.weight")
    source.drop(f"{at}.score_generator.weight", f"{at}.score_generator.bias")
    state = {
        "embed": source.take(f"{at}.aux_conv.weight", width, 3, 3, 3),
        "rate_in": source.take(f"{at}.rate_adaptive_conv.0.weight", width // 8, width),
        "rate_out": source.take(f"{at}.rate_adaptive_conv.2.weight", 2, width // 8),
        "alpha": source.take(f"{at}.param_alpha", width),
        "beta": source.take(f"{at}.param_beta", width),
    }
    # The program uses the weights that it calls low for the high band, and vice versa.
    for ours, theirs in (("high", "low"), ("low", "high"), ("both", "agg")):
        attend = _cross_attention(source, f"{at}.cross_layer_{theirs}.", width)
        state |= _prefixed(f"attend_{ours}", attend)
    return state | _prefixed("modulate", _modulate(source, f"{at}.freq_refinement.", width))


def _cross_attention(source: _Entries, at: str, width: int) -> dict[str, Tensor]:
    kv = source.take(at + "kv.weight", 2 * width, width)
    kv_depthwise = source.take(at + "kv_dwconv.weight", 2 * width, 1, 3, 3)
    return {
        "temperature": source.take(at + "temperature", MINING_HEADS, 1, 1),
        "q": source.take(at + "q.weight", width, width),
        "q_depthwise": source.take(at + "q_dwconv.weight", width, 1, 3, 3),
        "kv": kv.unflatten(0, (2, width)),
        "kv_depthwise": kv_depthwise.unflatten(0, (2, width)),
        "project_out": source.take(at + "project_out.weight", width, width),
    }


def _modulate(source: _Entries, at: str, width: int) -> dict[str, Tensor]:
    channel = at + "modulate2.squential."
    return {
        "spatial": source.take(at + "modulate1.spatial.weight", 1, 2, 7, 7),
        "reduce": source.take(channel + "0.weight", width // 16, width),
        "expand": source.take(channel + "2.weight", width, width // 16),
        "project.weight": source.take(at + "conv.weight", width, width),
        "project.bias": source.take(at + "conv.bias", width),
    }
