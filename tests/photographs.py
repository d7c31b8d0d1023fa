"""Small pieces of the photographs that scikit-image ships, packed into shards of all five tasks."""

from pathlib import Path

from PIL import Image
from skimage import data

from shards.packing import pack


def pack_photographs(root: Path) -> Path:
    """Make `root/train` (two pictures) and `root/test` (one); returns `root`."""
    pieces = {
        "train": [data.astronaut()[100:196, 100:228], data.coffee()[200:296, 200:328]],
        "test": [data.chelsea()[100:196, 150:278]],
    }
    for split, pictures in pieces.items():
        folder = root / "pictures" / split
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{number}.png")
        tasks = ["dehaze", "derain", "deblur", "lowlight"]
        pack("clean", str(folder), str(root / split), synthesise=tasks, workers=1)
    return root
