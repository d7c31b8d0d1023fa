"""The exported network as an MLflow model: MLflow runs this file, so nothing has to be pickled.

Pictures (B, H, W, 3), floats in [0, 1], come back restored in the same shape and range.
"""

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from measnet.network import MEASNet


class Restorer(PythonModel):
    """`MEASNet` behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Read the weights that the model was saved with."""
        self.network = MEASNet.from_pretrained(context.artifacts["weights"]).eval()

    # MLflow would take hints of types for a schema; the signature beside the model says it better.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Restore a batch of pictures."""
        pictures = torch.from_numpy(np.asarray(model_input, dtype=np.float32))
        with torch.inference_mode():
            restored = self.network(pictures.permute(0, 3, 1, 2)).image
        return restored.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


mlflow.models.set_model(Restorer())
