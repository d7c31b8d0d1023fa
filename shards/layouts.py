"""How each benchmark lies on disk: a folder -> groups of one clean picture and its degraded ones.

A layout only names files; `shards.pack` opens them, compares sizes and writes them. It knows how
many samples the whole benchmark has, and names the ones that are not there. Groups come in the
order of their names, which numbers the samples. Suffixes and the case of folder names do not
matter.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from shards import names

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MAPS = (".depth.npy", ".depth.png", ".disparity.npy", ".disparity.png")
INPUT_FOLDERS = (
    *("input", "degraded", "low", "hazy", "haze", "synthetic", "rainy", "rain"),
    *("blur", "blurry", "blurred", "lq", "noisy"),
)
TARGET_FOLDERS = (
    *("target", "clean", "high", "gt", "clear", "original", "norain", "sharp", "hq", "normal"),
)


class Group(NamedTuple):
    """One clean picture and what was made of it; paths relative to the root, with `/`."""

    target: str
    inputs: tuple[str, ...] = ()
    map: str | None = None
    """A measured depth or disparity map of the clean picture."""
    centre: bool = False
    """The inputs show the centre of a larger target."""


class Found(NamedTuple):
    """What a layout found in a folder."""

    groups: list[Group]
    missing: Sequence[str] = ()
    """Names that the benchmark has and the folder has not."""
    leaks: Sequence[str] = ()
    """What is known to stand in a test set too, one line each."""
    ignored: Sequence[str] = ()
    """Pictures in the folder that are not part of the benchmark."""

    @property
    def samples(self) -> int:
        """Pairs, or clean pictures where nothing degraded is stored."""
        return sum(max(1, len(group.inputs)) for group in self.groups)


class Layout(NamedTuple):
    """One kind of source folder."""

    find: Callable[[str], Found]
    task: str | None
    """None: the user says it."""
    expected: int
    """Samples of the whole benchmark; 0 where any count is right."""
    shape: str
    """How it lies on disk, in a line."""


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's, and not a depth map's or a hidden file's."""
    lower = name.lower()
    return lower.endswith(SUFFIXES) and not lower.endswith(MAPS) and not name.startswith(".")


def pictures(
    root: str, folder: str = "", skip: Iterable[str] = ("depth", "disparity")
) -> list[str]:
    """Pictures below `root/folder`, relative to the root, sorted; folders named in `skip` are left
    out."""
    found = []
    for where, folders, files in os.walk(os.path.join(root, folder)):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        relative = os.path.relpath(where, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + name for name in files if is_picture(name)]
    return sorted(found)


def stem(path: str) -> str:
    """Name without folder and suffix."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def clean(root: str) -> Found:
    """Any folder of clean pictures, nested as it likes, with depth or disparity maps where there
    are some.

    A map stands beside its picture (`NAME.depth.npy`, `NAME.depth.png` with 16 bit, or
    `NAME.disparity.…`) or in `ROOT/depth/NAME.npy|png`, `ROOT/disparity/NAME.npy|png`.
    """
    groups = [Group(path, map=_map_of(root, path)) for path in pictures(root)]
    known = {stem(group.target).removeprefix("a") for group in groups} & names.CBSD68
    return Found(groups, leaks=[f"{name} is a test picture of CBSD68" for name in sorted(known)])


def _map_of(root: str, path: str) -> str | None:
    bare = path.rsplit(".", 1)[0]
    beside = [bare + suffix for suffix in MAPS]
    kinds = [(kind, form) for kind in ("depth", "disparity") for form in ("npy", "png")]
    apart = [f"{kind}/{stem(path)}.{form}" for kind, form in kinds]
    return next((one for one in beside + apart if os.path.exists(os.path.join(root, one))), None)


def paired(root: str) -> Found:
    """Two folders, degraded and clean, whose pictures have the same names."""
    degraded, targets = _sides(root)
    inputs = _by(lambda path: path.split("/", 1)[1].rsplit(".", 1)[0], pictures(root, degraded))
    cleans = _by(lambda path: path.split("/", 1)[1].rsplit(".", 1)[0], pictures(root, targets))
    missing = [f"{targets}/{name}" for name in sorted(set(inputs) - set(cleans))]
    missing += [f"{degraded}/{name}" for name in sorted(set(cleans) - set(inputs))]
    both = sorted(set(inputs) & set(cleans))
    return Found([Group(cleans[name], (inputs[name],)) for name in both], missing)


def _reside(
    root: str, wanted: Callable[[str], list[str]], scenes: Iterable[str], centre: bool = False
) -> Found:
    """Hazy pictures SCENE_…, several for each clear picture SCENE; `wanted`: its variants."""
    parts = [name for name in _folders(root) if re.fullmatch(r"part\d", name.lower())]
    degraded, targets = _sides(root, parts[0] if parts else None)
    cleans = _by(stem, pictures(root, targets))
    hazy = defaultdict(list)
    # OTS comes in part1 to part4, which lie in a folder of hazy pictures or beside the clear ones.
    for path in sorted(path for part in {degraded, *parts} for path in pictures(root, part)):
        hazy[stem(path).split("_", 1)[0]].append(path)
    missing = [f"{targets}/{scene}.*" for scene in sorted(set(hazy) - set(cleans))]
    for scene in sorted(set(scenes) | set(hazy)):
        there = {stem(path) for path in hazy.get(scene, [])}
        every = [f"{scene}_{variant}" for variant in wanted(scene)]
        missing += [name for name in every if not _has_variant(there, name)]
    groups = [
        Group(cleans[scene], tuple(hazy[scene]), centre=centre)
        for scene in sorted(hazy)
        if scene in cleans
    ]
    return Found(groups, missing)


def _has_variant(there: set[str], wanted: str) -> bool:
    """`1_2_0.97842` is variant `1_2_*`, and so is `1_2`; others are named in full."""
    if not wanted.endswith("_*"):
        return wanted in there
    return wanted[:-2] in there or any(name.startswith(wanted[:-1]) for name in there)


def ots(root: str) -> Found:
    """RESIDE OTS (the version with β in the name): 35 hazy pictures for each of 2,061 scenes."""
    variants = [
        f"{light}_{beta}"
        for light in ("0.8", "0.85", "0.9", "0.95", "1")
        for beta in ("0.04", "0.06", "0.08", "0.1", "0.12", "0.16", "0.2")
    ]
    found = _reside(root, lambda _: variants, ())
    scenes = [(stem(group.target), len(group.inputs)) for group in found.groups]
    leaks = [
        f"{scene}: {count} pictures of a scene number that SOTS outdoor tests"
        for scene, count in scenes
        if scene in names.SOTS_OUTDOOR
    ]
    return found._replace(leaks=leaks)


def its(root: str) -> Found:
    """RESIDE ITS: ten hazy pictures for each of 1,399 scenes."""
    scenes = [str(scene) for scene in range(1, 1400)]
    variants = [f"{number}_*" for number in range(1, 11)]
    return _reside(root, lambda _: variants, scenes)


def sots_outdoor(root: str) -> Found:
    """SOTS outdoor: 500 hazy pictures of 492 scenes."""
    return _inside(root, "outdoor", lambda base: _reside(base, lambda _: ["*"], names.SOTS_OUTDOOR))


def sots_indoor(root: str) -> Found:
    """SOTS indoor: ten hazy pictures (620x460) for each of 50 scenes (640x480: their centre
    counts)."""
    scenes = [str(scene) for scene in range(1400, 1450)]
    variants = [f"{number}_*" for number in range(1, 11)]
    return _inside(root, "indoor", lambda base: _reside(base, lambda _: variants, scenes, True))


def _rain(root: str, count: int) -> Found:
    """Rain100L/H: `rain-N` with `norain-N` (training), or `N`, `norain-001` and the like (test)."""
    if any(name.lower() in INPUT_FOLDERS for name in _folders(root)):
        degraded, targets = _sides(root)
        inputs, cleans = pictures(root, degraded), pictures(root, targets)
    else:
        inputs = [path for path in pictures(root) if stem(path).startswith("rain")]
        cleans = [path for path in pictures(root) if stem(path).startswith("norain")]
    rainy, dry = _by(_number, inputs), _by(_number, cleans)
    wanted = [str(number) for number in range(1, count + 1)]
    missing = [f"rain-{n}" for n in wanted if n not in rainy]
    missing += [f"norain-{n}" for n in wanted if n not in dry]
    both = sorted(set(rainy) & set(dry), key=_natural)
    return Found([Group(dry[name], (rainy[name],)) for name in both], missing)


def _number(path: str) -> str:
    """`rain-7`, `norain-007`, `rain-007x2` and `7` are picture 7."""
    found = re.fullmatch(r"(?:no)?rain-?0*(\d+)(?:x2)?|0*(\d+)", stem(path))
    return (found[1] or found[2]) if found else stem(path)


def bsd400_wed(root: str) -> Found:
    """400 pictures of BSDS500 (named with or without an 'a') and the 4,744 of the Waterloo set."""
    wed = {f"{number:05d}" for number in range(1, 4745)}
    there, ignored = {}, []
    for path in pictures(root):
        name = stem(path).removeprefix("a")
        if name in names.BSD400 or name in wed:
            there[name] = path
        else:
            ignored.append(path)
    missing = [f"a{name}.jpg" for name in sorted(names.BSD400 - set(there), key=_natural)]
    missing += [f"{name}.bmp" for name in sorted(wed - set(there))]
    return Found([Group(there[name]) for name in sorted(there, key=_natural)], missing, [], ignored)


def _listed(root: str, wanted: Iterable[str]) -> Found:
    """Clean pictures whose names are known."""
    there = _by(stem, pictures(root))
    wanted = sorted(wanted, key=_natural)
    groups = [Group(there[name]) for name in wanted if name in there]
    missing = [name for name in wanted if name not in there]
    return Found(groups, missing, [], sorted(set(there) - set(wanted)))


def cbsd68(root: str) -> Found:
    """The field's 68 colour test pictures."""
    return _listed(root, names.CBSD68)


def kodak24(root: str) -> Found:
    """kodim01 to kodim24."""
    return _listed(root, [f"kodim{number:02d}" for number in range(1, 25)])


def _gopro(base: str) -> Found:
    """GoPro_Large: SEQUENCE/{blur,sharp}/NNNNNN.png, or flattened; `blur_gamma` is never read."""
    nested = [name for name in _folders(base) if "blur" in _folders(os.path.join(base, name))]
    if not nested:
        return paired(base)
    groups, missing = [], []
    for sequence in nested:
        blurred = _by(stem, pictures(base, f"{sequence}/blur"))
        sharp = _by(stem, pictures(base, f"{sequence}/sharp"))
        groups += [Group(sharp[n], (blurred[n],)) for n in sorted(set(blurred) & set(sharp))]
        missing += [f"{sequence}/sharp/{n}" for n in sorted(set(blurred) - set(sharp))]
        missing += [f"{sequence}/blur/{n}" for n in sorted(set(sharp) - set(blurred))]
    return Found(groups, missing)


def _lol(root: str, part: str) -> Found:
    """LOL-v1: `low` and `high` (or `gt`), by number."""
    found = _inside(root, part, paired)
    numbers = {stem(group.target) for group in found.groups}
    missing, leaks = list(found.missing), []
    if part == "eval15":
        missing += [f"low/{n}.png" for n in sorted(names.LOL_EVAL15 - numbers, key=_natural)]
    else:
        tested = sorted(numbers & names.LOL_EVAL15, key=_natural)
        leaks = [f"{number} is a test picture of LOL eval15" for number in tested]
    return found._replace(missing=missing, leaks=leaks)


def _inside(root: str, part: str, find: Callable[[str], Found]) -> Found:
    """What is found in `root/part` where there is such a folder, else in the root itself."""
    folder = next((name for name in _folders(root) if name.lower() == part), None)
    if folder is None:
        return find(root)
    found = find(os.path.join(root, folder))
    groups = [
        group._replace(
            target=f"{folder}/{group.target}", inputs=tuple(f"{folder}/{p}" for p in group.inputs)
        )
        for group in found.groups
    ]
    return found._replace(groups=groups)


def _folders(root: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def _sides(root: str, degraded: str | None = None) -> tuple[str, str]:
    """Names of the folders of degraded and of clean pictures; the former unless it is given."""
    there = {name.lower(): name for name in _folders(root)}
    degraded = next((there[name] for name in INPUT_FOLDERS if name in there), degraded)
    targets = next((there[name] for name in TARGET_FOLDERS if name in there), None)
    if degraded is None or targets is None:
        raise ValueError(
            f"{root} holds the folders {', '.join(there.values()) or '(none)'}; it needs one of "
            "degraded "
            f"pictures ({'|'.join(INPUT_FOLDERS)}) and one of clean ones "
            f"({'|'.join(TARGET_FOLDERS)})"
        )
    return degraded, targets


def _by(key: Callable[[str], str], paths: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        name = key(path)
        if name in found:
            raise ValueError(
                f"{found[name]} and {path} are the same picture {name}; keep one of them"
            )
        found[name] = path
    return found


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.isdigit() else 0, name)


LAYOUTS: dict[str, Layout] = {
    "clean": Layout(clean, "denoise", 0, "any folder of pictures"),
    "paired": Layout(
        paired, None, 0, "input|low|hazy|…/ and target|gt|clean|…/ with the same names"
    ),
    "reside-ots": Layout(ots, "dehaze", 72_135, "hazy|part1…4/0025_0.8_0.04.jpg, clear/0025.jpg"),
    "reside-its": Layout(its, "dehaze", 13_990, "hazy/1_1_0.90179.png, clear/1.png"),
    "sots-outdoor": Layout(
        sots_outdoor, "dehaze", 500, "[outdoor/]hazy/0001_0.8_0.2.jpg, gt/0001.png"
    ),
    "sots-indoor": Layout(
        sots_indoor, "dehaze", 500, "[indoor/]hazy/1400_1.png, gt/1400.png (centre)"
    ),
    "rain100l-train": Layout(
        lambda r: _rain(r, 200), "derain", 200, "rainy/rain-1.png, gt/norain-1.png"
    ),
    "rain100l-test": Layout(lambda r: _rain(r, 100), "derain", 100, "input/1.png, target/1.png"),
    "rain100h-train": Layout(lambda r: _rain(r, 1800), "derain", 1800, "as rain100l-train"),
    "rain100h-test": Layout(lambda r: _rain(r, 100), "derain", 100, "as rain100l-test"),
    "bsd400-wed": Layout(
        bsd400_wed, "denoise", 5144, "[a]117025.jpg and 00001.bmp, in any folders"
    ),
    "cbsd68": Layout(cbsd68, "denoise", 68, "101085.png"),
    "kodak24": Layout(kodak24, "denoise", 24, "kodim01.png"),
    "gopro-train": Layout(
        lambda r: _inside(r, "train", _gopro),
        "deblur",
        2103,
        "[train/]SEQUENCE/{blur,sharp}/000001.png, or flat",
    ),
    "gopro-test": Layout(
        lambda r: _inside(r, "test", _gopro), "deblur", 1111, "[test/]…, as gopro-train"
    ),
    "lol-our485": Layout(
        lambda r: _lol(r, "our485"), "lowlight", 485, "[our485/]low/2.png, high|gt/2.png"
    ),
    "lol-eval15": Layout(
        lambda r: _lol(r, "eval15"), "lowlight", 15, "[eval15/]low/1.png, high|gt/1.png"
    ),
}
"""Name on the command line -> how it is read."""


def check_name(layout: str) -> None:
    """ValueError where there is no such layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is not a layout; known: {', '.join(LAYOUTS)}")


def find(layout: str, root: str) -> Found:
    """What a layout finds in a folder; ValueError where layout or folder are wrong or nothing is
    found.

    Paths of the groups are relative to `root`, also where the benchmark lies in a part of it.
    """
    check_name(layout)
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder; give the folder that holds the pictures")
    found = LAYOUTS[layout].find(root)
    if not found.groups and pictures(root):
        raise ValueError(
            f"{root} has pictures, but none as {layout} has them ({LAYOUTS[layout].shape}; missing "
            f"{', '.join(found.missing[:3])} …); give another folder or layout"
        )
    if not found.groups:
        raise ValueError(
            f"{root} holds no pictures; give the folder that does, as in "
            f"`python -m shards.pack {layout} FOLDER OUT` ({LAYOUTS[layout].shape})"
        )
    return found


def shortfall(layout: str, found: Found) -> str | None:
    """One line where a benchmark is not whole, else None."""
    expected = LAYOUTS[layout].expected
    if found.samples == (expected or found.samples) and not found.missing:
        return None
    if expected and found.samples > expected:
        return f"found {found.samples:,}, but {layout} has {expected:,}: is it another version?"
    line = f"found {found.samples:,}" + (f" of {expected:,}" if expected else "")
    if found.missing:
        more = " …" if len(found.missing) > 3 else ""
        line += f"; missing {', '.join(found.missing[:3])}{more}"
    return line
