"""Lets spandrel, and programs that load models through it, load MEASNet.

    import spandrel
    import measnet.spandrel

    measnet.spandrel.register()
    model = spandrel.ModelLoader().load_from_file("model.safetensors")
    restored = model(image)  # (1, 3, H, W) in [0, 1], any size

Weights of this program and of the authors' are recognised by their entries. Pictures that do not
fit into the memory are restored in tiles inside the model, so spandrel's users need no tiles.
"""

from collections.abc import Mapping
from typing import Any

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
)
from torch import Tensor

from measnet.network import CONFIG_ENTRY, MEASNet
from measnet.official import weights as official
from measnet.tiling import choose_tiling, restore

_OF_THE_AUTHORS = "stpg_g_mese1.model.w_g"
"""An entry that only checkpoints of the authors' program have."""


class MEASNetArch(Architecture[MEASNet]):
    """MEASNet, both variants."""

    def __init__(self) -> None:
        """See spandrel's `Architecture`."""
        super().__init__(id="MEASNet", detect=is_measnet)

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor[MEASNet]:
        """The network with the weights of a file.

        Raises:
            ValueError: an entry is missing, unknown or misshapen.
        """
        if CONFIG_ENTRY in state_dict:
            config = bytes(state_dict[CONFIG_ENTRY].tolist()).decode()
            model = MEASNet.from_entries(state_dict, config)
        else:
            model = official.from_entries(state_dict)
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="Restoration",
            tags=[model.config.variant, f"{model.config.dim}dim"],
            supports_half=False,
            supports_bfloat16=True,
            scale=1,
            input_channels=3,
            output_channels=3,
            tiling=ModelTiling.INTERNAL,
            call_fn=_restore,
        )


def is_measnet(state_dict: Mapping[str, object]) -> bool:
    """Whether these are the entries of a file of this program, or of the authors' checkpoint."""
    return CONFIG_ENTRY in state_dict or any(
        key == _OF_THE_AUTHORS or key.endswith("." + _OF_THE_AUTHORS) for key in state_dict
    )


def register(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Add MEASNet to spandrel's architectures, before all others; again does nothing."""
    others = tuple(support.architecture.id for support in registry)
    arch = ArchSupport.from_architecture(MEASNetArch(), before=others)
    registry.add(arch, ignore_duplicates=True)


def _restore(model: MEASNet, image: Tensor) -> Tensor:
    tiling = choose_tiling(model)
    tile = tiling.side(image.shape[-2], image.shape[-1])
    return restore(model, image, tile=tile, overlap=tiling.overlap)
