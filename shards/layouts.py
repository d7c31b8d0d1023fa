"""How each kind of source folder lies on disk: folder -> groups of one clean picture and its
degraded ones.

A layout only names files; `shards.pack` opens them, compares sizes and writes them. Groups come in
the order of their names, which numbers the samples.
"""

import os
from typing import NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MAPS = (".depth.npy", ".depth.png", ".disparity.npy", ".disparity.png")


class Group(NamedTuple):
    """One clean picture and what was made of it; paths relative to the root, with `/`."""

    target: str
    inputs: tuple[str, ...] = ()
    map: str | None = None
    """A measured depth or disparity map of the clean picture."""


class Found(NamedTuple):
    """What a layout found in a folder."""

    task: str
    groups: list[Group]
    expected: int = 0
    """Samples of the whole benchmark; 0 where any count is right."""
    missing: tuple[str, ...] = ()
    """Names that the benchmark has and the folder has not."""
    leaks: tuple[str, ...] = ()
    """What is known to stand in a test set too, one line each."""


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's, and not a depth map's or a hidden file's."""
    lower = name.lower()
    return lower.endswith(SUFFIXES) and not lower.endswith(MAPS) and not name.startswith(".")


def pictures(root: str, folder: str = "") -> list[str]:
    """Pictures below `root/folder`, relative to the root, sorted by name; a top-level `depth/` is
    left out."""
    found = []
    top = os.path.join(root, folder)
    for where, folders, names in os.walk(top):
        folders[:] = [
            f for f in folders if not f.startswith(".") and f not in ("depth", "disparity")
        ]
        relative = os.path.relpath(where, root).replace(os.sep, "/")
        found += [
            name if relative == "." else f"{relative}/{name}" for name in names if is_picture(name)
        ]
    return sorted(found)


def stem(path: str) -> str:
    """Name without folder and suffix."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def clean(root: str) -> Found:
    """A folder of clean pictures, nested as it likes.

    A measured map for haze stands beside its picture (`NAME.depth.npy`, `NAME.depth.png` 16 bit, or
    `NAME.disparity.…`) or in `ROOT/depth/NAME.npy|png`, `ROOT/disparity/NAME.npy|png`.
    """
    groups = [Group(path, map=_map_of(root, path)) for path in pictures(root)]
    _not_empty(root, groups)
    return Found("denoise", groups)


def _map_of(root: str, path: str) -> str | None:
    bare = path.rsplit(".", 1)[0]
    beside = [bare + suffix for suffix in MAPS]
    apart = [
        f"{kind}/{stem(path)}.{form}" for kind in ("depth", "disparity") for form in ("npy", "png")
    ]
    return next((name for name in beside + apart if os.path.exists(os.path.join(root, name))), None)


INPUT_FOLDERS = (
    "input",
    "degraded",
    "low",
    "hazy",
    "rainy",
    "rain",
    "blur",
    "blurry",
    "lq",
    "noisy",
)
TARGET_FOLDERS = ("target", "clean", "high", "gt", "clear", "norain", "sharp", "hq", "original")


def paired(root: str, task: str) -> Found:
    """Two folders, degraded and clean, whose pictures have the same names (suffixes may differ)."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    by_name = {name.lower(): name for name in folders}
    degraded = next((by_name[name] for name in INPUT_FOLDERS if name in by_name), None)
    targets = next((by_name[name] for name in TARGET_FOLDERS if name in by_name), None)
    if degraded is None or targets is None:
        raise ValueError(
            f"{root} holds {', '.join(folders) or 'no folders'}; a paired folder needs one named "
            f"{'|'.join(INPUT_FOLDERS)} and one named {'|'.join(TARGET_FOLDERS)}"
        )
    inputs = _by_stem(root, degraded)
    cleans = _by_stem(root, targets)
    alone = sorted(set(inputs) ^ set(cleans))
    if alone:
        side = degraded if alone[0] in inputs else targets
        raise ValueError(
            f"{root}/{side} has {alone[0]!r}, but the other folder has not ({len(alone)} names "
            "stand in one of "
            f"{degraded}/ and {targets}/ only); rename, add or remove them, then run the same "
            "command again"
        )
    groups = [Group(cleans[name], (inputs[name],)) for name in sorted(inputs)]
    _not_empty(root, groups)
    return Found(task, groups)


def _by_stem(root: str, folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in pictures(root, folder):
        name = path.removeprefix(folder + "/").rsplit(".", 1)[0]
        if name in found:
            raise ValueError(f"{root} has both {found[name]} and {path}; keep one of them")
        found[name] = path
    return found


def _not_empty(root: str, groups: list[Group]) -> None:
    if not groups:
        raise ValueError(
            f"{root} holds no pictures ({', '.join(SUFFIXES)}); give the folder that holds them, "
            "as in "
            f"`python -m shards.pack LAYOUT FOLDER OUT`"
        )
