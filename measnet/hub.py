"""Where weights are: files, folders in the layout of the Hugging Face hub, and `small`.

The layout of the hub is config.json, model.safetensors, README.md in one folder.
"""

import re
from os import PathLike
from pathlib import Path

from measnet.errors import first_line

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SMALL = "small"
"""Name of the weights that come with this package (measnet/pretrained/README.md)."""
SMALL_FILE = Path(__file__).parent / "pretrained" / "small.safetensors"
_NAME_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def weights_file(source: str | PathLike[str], *, revision: str | None = None) -> Path:
    """The weights of a file, a folder, or a model on the hub, which is downloaded once.

    Args:
        source: a file; a folder that holds `model.safetensors`; `owner/name` on the hub; or
            `small`, if there is no such file or folder.
        revision: branch, tag or commit on the hub; None: its main branch.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no weights.
        ImportError: a name of the hub, but huggingface_hub is not installed.
        OSError: the hub cannot be reached, or has no such model.
    """
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if path.exists():
        return path
    if str(source) == SMALL:
        return SMALL_FILE
    if not _NAME_ON_THE_HUB.fullmatch(str(source)):
        raise FileNotFoundError(f"there is no file or run folder {path}")
    return Path(_download(str(source), revision))


def _download(name: str, revision: str | None) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"there is no file or folder {name}. To load it from the Hugging Face hub: "
            "pip install huggingface_hub"
        ) from error
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        return hf_hub_download(name, WEIGHTS, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no file {name}, and on the Hugging Face hub no {WEIGHTS} of that name: "
            f"{first_line(error)}"
        ) from error
