"""Whether the best trial becomes the `champion` of MLflow's model registry, and why."""

from collections.abc import Mapping
from pathlib import Path

from distributed import mlflow_model, mlflow_tracker
from measnet.hardware import Decision
from shards.wording import counted
from tune.config import Register, SearchConfig
from tune.record import SearchRecord, TrialRecord

ALIAS = "champion"
PSNR, DATA, PROTOCOL = "measnet.psnr", "measnet.validation_data", "measnet.protocol"
"""Tags of a registered version: its PSNR in dB, its validation shards and the protocol."""


def decide(
    policy: Register, new: Mapping[str, str], champion: Mapping[str, str], *, above_noise: bool
) -> Decision:
    """Whether to register a model.

    Args:
        policy: of the search.
        new: tags `PSNR`, `DATA` and `PROTOCOL` of the model.
        champion: the same of the version that the alias points at; empty where there is none.
        above_noise: whether the model is clearly better than the degraded pictures.

    Returns:
        `yes` or `no`, and the reason.
    """
    ask = "--register always registers it"
    if policy == "never":
        return Decision("no", "--register never")
    if policy == "always":
        return Decision("yes", "--register always")
    if not above_noise:
        return Decision("no", f"its gain over the degraded pictures is not above noise; {ask}")
    if not champion:
        return Decision("no", f"there is no champion to compare it with; {ask}")
    for tag, what in ((DATA, "validation data"), (PROTOCOL, "protocol")):
        if champion.get(tag) != new[tag]:
            known = "other" if tag in champion else "unknown"
            return Decision("no", f"the champion was measured with {known} {what}; {ask}")
    old, now = float(champion.get(PSNR, "nan")), float(new[PSNR])
    if not now > old:
        return Decision("no", f"it has {now:.2f} dB, the champion {old:.2f} dB; {ask}")
    return Decision("yes", f"it has {now:.2f} dB, the champion had {old:.2f} dB")


def protocol(config: SearchConfig) -> str:
    """How the trials of a search are validated."""
    from measnet.metrics import FIELD

    limit = config.train.every.validation_pictures
    pictures = f"{counted(limit, 'picture')} per degradation" if limit else "all pictures"
    return f"{FIELD.describe()}; {pictures}; averaged weights"


def register_champion(
    config: SearchConfig, record: SearchRecord, best: TrialRecord, weights: Path, card: str
) -> None:
    """Register the best trial's model if `decide` allows it; write the reason into the record."""
    model = f"{config.model_name}@{ALIAS}"
    if record.registered == [best.name, model]:
        return
    key = mlflow_tracker.run_key(best.folder)
    run = mlflow_tracker.prepare(config.train.tracking, name=best.name, key=key)
    champion = mlflow_model.registered(run, config.model_name, ALIAS) if run.id else None
    if champion is None:
        record.registration = "MLflow did not answer; the same command tries again"
        return
    new = {PSNR: str(best.psnr), DATA: record.validation_data, PROTOCOL: protocol(config)}
    gain = best.gain()
    decision = decide(config.register, new, champion, above_noise=gain is not None and gain[1])
    if decision.choice == "no":
        record.registration = f"{best.name} was not registered as {model}: {decision.reason}"
    elif mlflow_model.log_model(run, weights) and mlflow_model.register(
        run, config.model_name, ALIAS, card, new
    ):
        record.registered = [best.name, model]
        record.registration = f"{best.name} is {model} now: {decision.reason}"
    else:
        record.registration = "MLflow did not accept the model; the same command tries again"
    mlflow_tracker.finish(run, "FINISHED")  # `prepare` has opened it again
