"""The exported network as an MLflow model: MLflow runs this file, so nothing has to be pickled.

Takes pictures (B, H, W, 3), floats in [0, 1], and returns them restored. Uses the GPU if there is
one; pictures that do not fit into its memory are restored in tiles.
"""

from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from measnet.hardware import choose_device, this_machine
from measnet.network import MEASNet
from measnet.tiling import choose_tiling, restore


class Restorer(PythonModel):
    """`MEASNet` behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load the weights of the model onto the device."""
        network = MEASNet.from_pretrained(context.artifacts["weights"])
        self.network = network.to(choose_device("auto", this_machine()).choice).eval()

    # No type hints: MLflow would read them as a schema, but the model already has a signature.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Restore a batch of pictures (B, H, W, 3) of any size, as many at once as memory holds."""
        pictures = torch.from_numpy(np.array(model_input, dtype=np.float32)).permute(0, 3, 1, 2)
        height, width = pictures.shape[-2:]
        tiling = choose_tiling(self.network)
        fitting = max(1, tiling.at_once // (height * width))
        tile = tiling.side(height, width)
        restored = [
            restore(self.network, some, tile=tile, overlap=tiling.overlap)
            for some in pictures.split(fitting)
        ]
        return torch.cat(restored).permute(0, 2, 3, 1).contiguous().numpy()


mlflow.models.set_model(Restorer())
