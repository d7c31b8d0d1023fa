"""Architecture of the network: `ModelConfig`, its presets, strict dict <-> dataclass conversion.

Does not import torch, so a wrong command line is reported at once.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How experts are chosen and balanced; all defaults are the paper's. Variant `paper` only."""

    temperature: float = 1.0
    """The gates' logits are divided by this before their softmax."""
    prompt_temperature: float = 1.0
    """The same for the weights of the basic prompts (Eq. 1)."""
    renormalise: bool = False
    """Divide the gates of the chosen K by their sum, so that they add up to 1."""
    noise: float = 0.0
    """Standard deviation of normal noise that is added to the logits for choosing, in training."""
    noise_until: float = 0.5
    """Share of the run after which the noise has faded, linearly, to 0."""
    level_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the balance loss of the per-pixel libraries at levels 1 to 3, times lambda."""
    balance_over: Literal["picture", "batch"] = "picture"
    """`picture`: each picture uses all experts alike (Eq. 6); `batch`: the global batch does, and
    tasks may differ."""
    picture_weight: float = 0.0
    """Weight of the balance loss of the per-picture libraries over the global batch, times
    lambda."""
    bias_rate: float = 0.0
    """How far each step moves a bias on the logits, which changes the choice but not the gates,
    towards equal use; 0: no bias (arXiv 2408.15664)."""
    z_loss: float = 0.0
    """Weight of the squared logsumexp of the logits, which keeps them small; not times lambda."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("temperature", "prompt_temperature", "noise_until"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"model.routing.{name} is {getattr(self, name)}, but must be above 0"
                )
        for name in ("noise", "picture_weight", "bias_rate", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"model.routing.{name} is {getattr(self, name)}, but must not be negative"
                )
        if min(self.level_weights) < 0:
            raise ValueError(
                f"model.routing.level_weights is {self.level_weights}; none may be negative"
            )


PAPER_ROUTING = RoutingConfig()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of MEASNet; equation numbers are those of the paper."""

    variant: Literal["paper", "official"] = "paper"
    """`paper`: the equations as printed; `official`: what the authors' program computes."""
    dim: int = 48
    """Channels at level 1; levels 2, 3, 4 have 2, 4, 8 times as many."""
    num_blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    """Transformer blocks at levels 1 to 4, in the encoder and again in the decoder."""
    num_refinement_blocks: int = 4
    """Transformer blocks after the decoder, at full resolution."""
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    """Attention heads at levels 1 to 4; each divides its level's channels."""
    ffn_expansion: float = 2.66
    """Hidden channels of feed-forward and pixel experts, as a multiple of the level's."""
    prompts: int = 32
    """T, the number of learnt basic prompts (Eq. 1)."""
    prompt_dim: int = 256
    """M, the length of a prompt (Eq. 1)."""
    pixel_experts: int = 6
    """N of the per-pixel libraries in the encoder (Eq. 2-3)."""
    pixel_top_k: int = 2
    """K of the per-pixel libraries: experts used by each pixel."""
    image_experts: int = 5
    """N of the per-picture libraries in the decoder, for each frequency band (Eq. 9-10)."""
    image_top_k: int = 2
    """K of the per-picture libraries: experts used by each picture."""
    tspg: bool = True
    """Task-specific prompts (Eq. 1); off in the ablation of Table VI."""
    mese: bool = True
    """Per-pixel expert selection (Eq. 2-6); off in the ablation of Table VI."""
    fd: bool = True
    """Frequency decomposition (Eq. 7-8); off in the ablation of Table VI."""
    mee: bool = True
    """Per-picture expert ensemble (Eq. 9-10); off in the ablation of Table VI."""
    expert_path: Literal["auto", "dense", "sorted"] = "auto"
    """How experts are computed: all N masked, or only the K chosen. The result is the same."""
    routing: RoutingConfig = PAPER_ROUTING
    """How experts are chosen and balanced."""

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of levels 1 to 4."""
        return self.dim, 2 * self.dim, 4 * self.dim, 8 * self.dim

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for field in ("dim", "num_refinement_blocks", "prompts", "prompt_dim"):
            _at_least("model." + field, getattr(self, field), 1)
        if self.dim % 4:
            raise ValueError(
                f"model.dim is {self.dim}, but must be a multiple of 4: "
                f"the frequency decomposition cuts 2·dim channels into 8 groups"
            )
        for level, (blocks, heads) in enumerate(zip(self.num_blocks, self.heads, strict=True)):
            _at_least(f"model.num_blocks[{level}]", blocks, 1)
            _at_least(f"model.heads[{level}]", heads, 1)
            channels = self.dim * 2**level
            if channels % heads:
                raise ValueError(
                    f"model.heads[{level}] is {heads}, but the {channels} channels of level "
                    f"{level + 1} (model.dim {self.dim}) must divide by it"
                )
        if self.ffn_expansion * self.dim < 1:
            raise ValueError(
                f"model.ffn_expansion is {self.ffn_expansion}; it must leave a hidden channel"
            )
        for kind in ("pixel", "image"):
            experts, top_k = getattr(self, f"{kind}_experts"), getattr(self, f"{kind}_top_k")
            _at_least(f"model.{kind}_experts", experts, 1)
            if not 1 <= top_k <= experts:
                raise ValueError(
                    f"model.{kind}_top_k is {top_k}, but must lie between 1 and "
                    f"model.{kind}_experts ({experts})"
                )
        if self.variant == "official" and self.dim % 8:
            raise ValueError(
                f"model.dim is {self.dim}, but variant official needs a multiple of 8: "
                f"its channel attention cuts 2·dim channels by 16"
            )
        if self.variant == "official" and not (self.tspg and self.mese and self.fd and self.mee):
            raise ValueError(
                "model.variant official has no ablation switches: leave tspg, mese, fd and mee on"
            )
        if self.variant == "official" and self.routing != PAPER_ROUTING:
            raise ValueError(
                "model.variant official chooses its experts in its own way: leave model.routing as "
                "it is, or set model.variant paper"
            )


def paper() -> ModelConfig:
    """The paper's network at full width."""
    return ModelConfig()


def official() -> ModelConfig:
    """The network of the authors' released program, as its options build it."""
    return ModelConfig(variant="official", num_blocks=(4, 4, 6, 8))


def tiny() -> ModelConfig:
    """A network that trains on a laptop's CPU in minutes: all kinds of blocks, but few of each."""
    return ModelConfig(
        dim=16,
        num_blocks=(1, 1, 1, 1),
        num_refinement_blocks=1,
        pixel_experts=4,
        image_experts=3,
        prompts=8,
        prompt_dim=64,
    )


def ablation_baseline() -> ModelConfig:
    """Table VI: the backbone alone."""
    return ModelConfig(tspg=False, mese=False, fd=False, mee=False)


def ablation_prompts() -> ModelConfig:
    """Table VI: adds prompts that are concatenated with the features."""
    return ModelConfig(mese=False, fd=False, mee=False)


def ablation_pixel_experts() -> ModelConfig:
    """Table VI: adds per-pixel experts, chosen by the prompts."""
    return ModelConfig(fd=False, mee=False)


def ablation_decomposition() -> ModelConfig:
    """Table VI: adds the frequency decomposition, without experts for the bands."""
    return ModelConfig(mee=False)


def ablation_picture_experts() -> ModelConfig:
    """Table VI: per-picture experts on undivided features, without frequency decomposition."""
    return ModelConfig(fd=False)


ABLATION = {
    "baseline": ablation_baseline,
    "prompts": ablation_prompts,
    "pixel-experts": ablation_pixel_experts,
    "decomposition": ablation_decomposition,
    "picture-experts": ablation_picture_experts,
    "full": paper,
}
"""The six rows of Table VI, from the backbone to the whole network."""


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings of a config dataclass, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return typing.cast(dict[str, Any], plain(config))


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from plain data: YAML, checkpoints, searches.

    Args:
        cls: a dataclass, possibly with dataclasses as fields.
        data: field -> value; fields that are left out keep their defaults.
        where: dotted path of `data`, for the messages.

    Raises:
        ValueError: unknown field, wrong type or refused value; names the dotted field.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__} must be a mapping of fields, not {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise ValueError(
                f"unknown field {_join(where, name)}; known here: {', '.join(sorted(fields))}"
            )
    return cls(
        **{name: _convert(hints[name], value, _join(where, name)) for name, value in data.items()}
    )


def replace_dotted(config: T, changes: Mapping[str, Any]) -> T:
    """A copy of `config` with dotted fields changed together: `{"model.pixel_experts": 8, ...}`.

    Together, because fields are checked against each other (K = 7 needs N = 8 first).
    """
    data = to_dict(config)
    for dotted, value in changes.items():
        *path, leaf = dotted.split(".")
        at = data
        for part in path:
            if not isinstance(at.get(part), dict):
                raise ValueError(f"unknown field {dotted}: there is no section {part!r}")
            at = at[part]
        at[leaf] = value
    return from_dict(type(config), data)


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{field} is {value}, but must be at least {least}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _convert(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if isinstance(value, bool) and {"on", "off"} <= set(args):
            return "on" if value else "off"  # YAML reads on and off as true and false
        if value not in args:
            raise ValueError(f"{where} is {value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ValueError(f"{where} needs {len(kinds)} values, got {len(value)}")
        return tuple(
            _convert(k, v, f"{where}[{i}]")
            for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, not {value!r}")
        return {k: _convert(args[1], v, _join(where, k)) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, not {value!r} ({type(value).__name__})")
    return value
