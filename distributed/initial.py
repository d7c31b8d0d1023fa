"""Weights that a run starts from, `--init`."""

from typing import TYPE_CHECKING

from measnet.config import ModelConfig, to_dict

if TYPE_CHECKING:
    from measnet.network import MEASNet


def model_config(init: str) -> ModelConfig:
    """Architecture of the weights.

    Raises:
        ValueError, OSError: no such weights.
    """
    from distributed.evaluate import load

    return load(init, "cpu").config


def check_architecture(init: str, model: ModelConfig) -> "MEASNet":
    """The network of the weights, if it is of this architecture.

    Raises:
        ValueError: it is not; names the fields that differ.
        OSError: there are no such weights.
    """
    from distributed.evaluate import load

    source = load(init, "cpu")
    own, theirs = to_dict(model), to_dict(source.config)
    differ = [
        f"model.{name}" for name in own if own[name] != theirs[name] and name != "expert_path"
    ]
    if differ:
        raise ValueError(
            f"init {init} is of another architecture: {', '.join(differ)} differ; "
            "use the same values, or leave --init out"
        )
    return source


def start_from(init: str, model: "MEASNet") -> None:
    """Copy weights and running statistics into a new network, on its device.

    Raises:
        ValueError, OSError: see `check_architecture`.
    """
    model.load_state_dict(check_architecture(init, model.config).state_dict())
