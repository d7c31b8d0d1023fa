"""What a training command would run: its configuration and decisions. Nothing is started."""

from importlib.util import find_spec

from distributed.config import TrainConfig, to_yaml
from distributed.decisions import decide, training_device
from measnet.hardware import Decision, Machine

ON_A_WORKER = {"kernels", "graphs", "reduction"}
"""Decisions about a GPU that need a try on it."""


def dry_run(config: TrainConfig, machine: Machine | None) -> str:
    """The configuration as YAML, and as its comments the decisions that are known by now.

    Args:
        config: of the run.
        machine: this machine, where the run stays on it; None on a cluster.

    Raises:
        ValueError: see `distributed.decisions.training_device`.
    """
    known = _known(config, machine)
    lines = [f"# {name}: {made.choice} ({made.reason})" for name, made in known.items()]
    return to_yaml(config) + "\n".join(lines) + "\n"


def _known(config: TrainConfig, machine: Machine | None) -> dict[str, Decision]:
    scaling, world = config.scaling, config.scaling.bounds[1]
    if machine is None and scaling.device == "auto":
        return {"device": Decision("open", "the cluster's resources decide, and the rest with it")}
    device = training_device(scaling, 0, machine)
    reason = f"scaling.device is {scaling.device}"
    if machine is not None and scaling.device == "auto":
        reason = machine.cards[0].name if machine.cards else machine.problem or "there is no GPU"
    known = {"device": Decision(device, reason)}
    if device == "cuda" and machine is None:
        return known | {"others": Decision("open", "they depend on the card of the workers")}
    if device == "cpu":
        from measnet.ops import cpu_library

        # The workers of a cluster may have other processors.
        kernels = cpu_library.choice() if machine is not None else None
        decisions = decide(config, world, None, None, kernels)
        hidden = set() if machine is not None else {"kernels"}
    else:
        from distributed.engine import predict_fit
        from measnet.ops.gpu_library import LEAST_CAPABILITY

        assert machine is not None
        card = machine.cards[0]
        automatic = config.engine.activation_checkpointing == "auto"
        # As far as is known without starting Triton: it needs a card that is new enough.
        fused = card.capability >= LEAST_CAPABILITY and find_spec("triton") is not None
        predicted = predict_fit(config, world, card, kernels=fused) if automatic else None
        decisions, hidden = decide(config, world, card, predicted), ON_A_WORKER
    known |= {k: v for k, v in decisions._asdict().items() if k not in hidden}
    if hidden:
        names = ", ".join(sorted(hidden))
        known["others"] = Decision("open", f"the workers decide about {names}")
    if scaling.elastic:
        reason = f"for {world} workers; {decisions.accumulation.reason}"
        known["accumulation"] = Decision(decisions.accumulation.choice, reason)
    return known
