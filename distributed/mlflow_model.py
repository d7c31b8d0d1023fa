"""The exported network as an MLflow model, and in MLflow's registry."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.environment import requirement
from distributed.mlflow_tracker import Run, attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MODEL_NEEDS = ("torch", "safetensors", "numpy", "psutil")
"""Packages that the exported model imports, besides MLflow."""


def log_model(run: Run, weights: Path) -> bool:
    """Store exported weights as an MLflow model of code and safetensors, without pickle.

    `mlflow.pyfunc.load_model("runs:/RUN_ID/model").predict(pictures)` restores pictures
    (B, H, W, 3), floats in [0, 1].
    """

    def send(client: "MlflowClient", run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_model(weights, Path(folder) / "model")
            client.log_artifacts(run.id, str(Path(folder) / "model"), "model")

    return attempt(run, "the model", send)


def save_model(weights: Path, folder: Path) -> None:
    """Write an MLflow model (pyfunc, from code) of exported weights into a new folder."""
    import numpy as np
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    here = Path(__file__).resolve().parent
    picture = TensorSpec(np.dtype(np.float32), (-1, -1, -1, 3))
    with warnings.catch_warnings(record=True):  # MLflow warns if there is no input example
        pyfunc.save_model(
            path=str(folder),
            python_model=str(here / "mlflow_restorer.py"),
            artifacts={"weights": str(weights)},
            code_paths=[str(here.parent / "measnet")],
            pip_requirements=[requirement(name) for name in _MODEL_NEEDS],
            signature=ModelSignature(inputs=Schema([picture]), outputs=Schema([picture])),
        )


def registered(run: Run, name: str, alias: str) -> dict[str, str] | None:
    """Tags of the version of the registered model `name` that has the alias.

    Empty if there is no such version; None if MLflow does not answer.
    """
    tags: dict[str, str] = {}

    def ask(client: "MlflowClient", run: Run) -> None:
        for model in client.search_registered_models(f"name = '{name}'"):
            if alias in model.aliases:
                version = client.get_model_version(name, model.aliases[alias])
                tags.update(version.tags, **{"measnet.version": str(version.version)})

    return tags if attempt(run, f"the request for {name}@{alias}", ask) else None


def register(
    run: Run, name: str, alias: str, card: str, tags: Mapping[str, str] | None = None
) -> bool:
    """Make the run's model a new version of the registered model `name`, with the alias `alias`.

    `models:/NAME@ALIAS` loads it. The card is Markdown; the tags belong to the version.

    Returns:
        Whether MLflow accepted it.
    """

    def send(client: "MlflowClient", run: Run) -> None:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{client.get_run(run.id).info.artifact_uri}/model"
        version = client.create_model_version(
            name, source, run.id, tags=dict(tags or {}), description=card
        )
        client.set_registered_model_alias(name, alias, version.version)

    return attempt(run, f"the model {name}@{alias}", send)
