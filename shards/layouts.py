"""How each benchmark lies on disk: finds its pictures in a folder and groups them.

A group is one clean picture with its degraded ones. A layout only names files; packing opens
them, compares sizes and writes them. A layout knows how many samples the complete benchmark has,
and names missing files where their names are known. Groups are sorted by name, which numbers the
samples. Suffixes and the case of folder names do not matter.
"""

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from shards import benchmarks

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MAP_SUFFIXES = (".depth.npy", ".depth.png", ".disparity.npy", ".disparity.png")
INPUT_FOLDERS = (
    *("input", "degraded", "low", "hazy", "haze", "synthetic", "rainy", "rain"),
    *("blur", "blurry", "blurred", "lq", "noisy"),
)
TARGET_FOLDERS = (
    *("target", "clean", "high", "gt", "clear", "original", "norain", "sharp", "hq", "normal"),
)


class Group(NamedTuple):
    """One clean picture and its degraded ones; paths relative to the root, with `/`."""

    target: str
    inputs: tuple[str, ...] = ()
    map: str | None = None
    """File of a measured depth or disparity map of the clean picture."""
    centre: bool = False
    """The inputs show only the centre of a larger target."""


class Listing(NamedTuple):
    """What a layout found in a folder."""

    groups: list[Group]
    missing: Sequence[str] = ()
    """Files of the benchmark that are not in the folder, as far as their names are known."""
    leaks: Sequence[str] = ()
    """Pictures that are known to be part of a test set too, one line each."""
    ignored: Sequence[str] = ()
    """Pictures in the folder that are not part of the benchmark; they are not packed."""

    @property
    def samples(self) -> int:
        """Count of pairs, or of clean pictures where no degraded ones are stored."""
        return sum(max(1, len(group.inputs)) for group in self.groups)


class Layout(NamedTuple):
    """One kind of source folder."""

    find: Callable[[str], Listing]
    task: str | None
    """None where the user names it."""
    expected: int
    """Samples of the complete benchmark; 0 where any count is right."""
    shape: str
    """How it lies on disk, in one line."""


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture, not of a depth map or a hidden file."""
    lower = name.lower()
    if name.startswith(".") or lower.endswith(MAP_SUFFIXES):
        return False
    return lower.endswith(SUFFIXES)


def pictures(root: str, folder: str = "") -> list[str]:
    """Sorted paths of the pictures below `root/folder`, relative to the root.

    Folders named `depth` or `disparity` hold maps and are left out, and so are hidden ones.

    Raises:
        ValueError: a name that is not UTF-8, which a tar of ours cannot hold.
    """
    paths = []
    for where, folders, files in os.walk(os.path.join(root, folder)):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in ("depth", "disparity")
        ]
        relative = os.path.relpath(where, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        paths += [prefix + name for name in files if is_picture(name)]
    for path in paths:
        if shown(path) != path:
            raise ValueError(
                f"{shown(os.path.join(root, path))}: the name is not UTF-8; rename the file"
            )
    return sorted(paths)


def shown(path: str) -> str:
    """A path that can be printed: bytes that are not UTF-8 become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def stem(path: str) -> str:
    """Name without folder and suffix."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def clean(root: str) -> Listing:
    """Any folder of clean pictures, with subfolders, and depth or disparity maps if there are some.

    A map is beside its picture (`NAME.depth.npy`, `NAME.depth.png` with 16 bit, or
    `NAME.disparity.…`) or in `ROOT/depth/NAME.npy|png`, `ROOT/disparity/NAME.npy|png`.
    """
    groups = [Group(path, map=_map_of(root, path)) for path in pictures(root)]
    tested = {stem(group.target).removeprefix("a") for group in groups} & benchmarks.CBSD68
    return Listing(groups, leaks=[f"{name} is a test picture of CBSD68" for name in sorted(tested)])


def _map_of(root: str, path: str) -> str | None:
    bare = path.rsplit(".", 1)[0]
    beside = [bare + suffix for suffix in MAP_SUFFIXES]
    kinds = [(kind, form) for kind in ("depth", "disparity") for form in ("npy", "png")]
    apart = [f"{kind}/{stem(path)}.{form}" for kind, form in kinds]
    return next((one for one in beside + apart if os.path.exists(os.path.join(root, one))), None)


def paired(root: str) -> Listing:
    """Two folders, degraded and clean, whose pictures have the same names."""
    degraded, targets = _sides(root)
    inputs = _by_name(_inside_name, pictures(root, degraded))
    cleans = _by_name(_inside_name, pictures(root, targets))
    missing = [f"{targets}/{name}" for name in sorted(set(inputs) - set(cleans))]
    missing += [f"{degraded}/{name}" for name in sorted(set(cleans) - set(inputs))]
    both = sorted(set(inputs) & set(cleans))
    return Listing([Group(cleans[name], (inputs[name],)) for name in both], missing)


def _inside_name(path: str) -> str:
    """Path below the first folder, without suffix."""
    return path.split("/", 1)[1].rsplit(".", 1)[0]


def _reside(
    root: str, wanted: Callable[[str], list[str]], scenes: Iterable[str], centre: bool = False
) -> Listing:
    """Hazy pictures SCENE_VARIANT, several per clear picture SCENE; `wanted` names the variants."""
    parts = [name for name in _folders(root) if re.fullmatch(r"part\d", name.lower())]
    degraded, targets = _sides(root, parts[0] if parts else None)
    cleans = _by_name(stem, pictures(root, targets))
    hazy = defaultdict(list)
    # OTS comes as part1 to part4, inside the folder of hazy pictures or beside the clear ones.
    for path in sorted(path for part in {degraded, *parts} for path in pictures(root, part)):
        hazy[stem(path).split("_", 1)[0]].append(path)
    missing = [f"{targets}/{scene}.*" for scene in sorted(set(hazy) - set(cleans))]
    for scene in sorted(set(scenes) | set(hazy)):
        present = {stem(path) for path in hazy.get(scene, [])}
        every = [f"{scene}_{variant}" for variant in wanted(scene)]
        missing += [name for name in every if not _has_variant(present, name)]
    groups = [
        Group(cleans[scene], tuple(hazy[scene]), centre=centre)
        for scene in sorted(hazy)
        if scene in cleans
    ]
    return Listing(groups, missing)


def _has_variant(present: set[str], wanted: str) -> bool:
    """Whether a variant is present. `1_2_*` is any of `1_2`, `1_2_0.97842`, …."""
    if not wanted.endswith("_*"):
        return wanted in present
    return wanted[:-2] in present or any(name.startswith(wanted[:-1]) for name in present)


def ots(root: str) -> Listing:
    """RESIDE OTS (the version with β in the names): 35 hazy pictures for each of 2,061 scenes."""
    variants = [
        f"{light}_{beta}"
        for light in ("0.8", "0.85", "0.9", "0.95", "1")
        for beta in ("0.04", "0.06", "0.08", "0.1", "0.12", "0.16", "0.2")
    ]
    listing = _reside(root, lambda _: variants, ())
    scenes = [(stem(group.target), len(group.inputs)) for group in listing.groups]
    leaks = [
        f"{scene}: {count} pictures of a scene number that is in SOTS outdoor too"
        for scene, count in scenes
        if scene in benchmarks.SOTS_OUTDOOR
    ]
    return listing._replace(leaks=leaks)


def its(root: str) -> Listing:
    """RESIDE ITS: ten hazy pictures for each of 1,399 scenes."""
    scenes = [str(scene) for scene in range(1, 1400)]
    variants = [f"{number}_*" for number in range(1, 11)]
    return _reside(root, lambda _: variants, scenes)


def sots_outdoor(root: str) -> Listing:
    """SOTS outdoor: 500 hazy pictures of 492 scenes."""
    scenes = benchmarks.SOTS_OUTDOOR
    return _inside(root, "outdoor", lambda base: _reside(base, lambda _: ["*"], scenes))


def sots_indoor(root: str) -> Listing:
    """SOTS indoor: ten hazy pictures (620x460) of the centre of each of 50 scenes (640x480)."""
    scenes = [str(scene) for scene in range(1400, 1450)]
    variants = [f"{number}_*" for number in range(1, 11)]
    return _inside(root, "indoor", lambda base: _reside(base, lambda _: variants, scenes, True))


def _rain(root: str, count: int) -> Listing:
    """Rain100L/H: `rain-N` with `norain-N` (training), or `N`, `norain-001` and the like (test)."""
    if any(name.lower() in INPUT_FOLDERS for name in _folders(root)):
        degraded, targets = _sides(root)
        inputs, cleans = pictures(root, degraded), pictures(root, targets)
    else:
        inputs = [path for path in pictures(root) if stem(path).startswith("rain")]
        cleans = [path for path in pictures(root) if stem(path).startswith("norain")]
    rainy, dry = _by_name(_number, inputs), _by_name(_number, cleans)
    wanted = [str(number) for number in range(1, count + 1)]
    missing = [f"rain-{n}" for n in wanted if n not in rainy]
    missing += [f"norain-{n}" for n in wanted if n not in dry]
    both = sorted(set(rainy) & set(dry), key=_natural)
    return Listing([Group(dry[name], (rainy[name],)) for name in both], missing)


def _number(path: str) -> str:
    """`rain-7`, `norain-007`, `rain-007x2` and `7` are picture 7."""
    match = re.fullmatch(r"(?:no)?rain-?0*(\d+)(?:x2)?|0*(\d+)", stem(path))
    return (match[1] or match[2]) if match else stem(path)


def bsd400_wed(root: str) -> Listing:
    """400 pictures of BSDS500 (names with or without an 'a') and the 4,744 of the Waterloo set."""
    wed = {f"{number:05d}" for number in range(1, 4745)}
    known, ignored = {}, []
    for path in pictures(root):
        name = stem(path).removeprefix("a")
        if name in benchmarks.BSD400 or name in wed:
            known[name] = path
        else:
            ignored.append(path)
    missing = [f"a{name}.jpg" for name in sorted(benchmarks.BSD400 - set(known), key=_natural)]
    missing += [f"{name}.bmp" for name in sorted(wed - set(known))]
    groups = [Group(known[name]) for name in sorted(known, key=_natural)]
    return Listing(groups, missing, [], ignored)


def _listed(root: str, wanted: Iterable[str]) -> Listing:
    """Clean pictures whose names are known."""
    present = _by_name(stem, pictures(root))
    wanted = sorted(wanted, key=_natural)
    groups = [Group(present[name]) for name in wanted if name in present]
    missing = [name for name in wanted if name not in present]
    ignored = [path for name, path in sorted(present.items()) if name not in set(wanted)]
    return Listing(groups, missing, [], ignored)


def cbsd68(root: str) -> Listing:
    """The field's 68 colour test pictures."""
    return _listed(root, benchmarks.CBSD68)


def kodak24(root: str) -> Listing:
    """kodim01 to kodim24."""
    return _listed(root, [f"kodim{number:02d}" for number in range(1, 25)])


def _gopro(base: str, sequences: frozenset[str]) -> Listing:
    """GoPro_Large: SEQUENCE/{blur,sharp}/NNNNNN.png, or all in two folders as SEQUENCE-NNNNNN.png.

    `blur_gamma` is never read. Pictures of other sequences are listed as ignored. The names of
    missing sequences are known, those of missing pictures are not.
    """
    nested = [name for name in _folders(base) if "blur" in _folders(os.path.join(base, name))]
    listing = _gopro_nested(base, nested) if nested else paired(base)
    groups, ignored = [], []
    present = set()
    for group in listing.groups:
        match = re.search(r"GOPR\d{4}_\d\d_\d\d", group.target)
        if match and match[0] in sequences:
            groups.append(group)
            present.add(match[0])
        else:
            ignored += [*group.inputs, group.target]
    missing = [f"{name} (the whole sequence)" for name in sorted(sequences - present)]
    return Listing(groups, [*listing.missing, *missing], [], ignored)


def _gopro_nested(base: str, folders: list[str]) -> Listing:
    groups, missing = [], []
    for sequence in folders:
        blurred = _by_name(stem, pictures(base, f"{sequence}/blur"))
        sharp = _by_name(stem, pictures(base, f"{sequence}/sharp"))
        groups += [Group(sharp[n], (blurred[n],)) for n in sorted(set(blurred) & set(sharp))]
        missing += [f"{sequence}/sharp/{n}" for n in sorted(set(blurred) - set(sharp))]
        missing += [f"{sequence}/blur/{n}" for n in sorted(set(sharp) - set(blurred))]
    return Listing(groups, missing)


def _lol(root: str, part: str) -> Listing:
    """LOL-v1: `low` and `high` (or `gt`), by number."""
    listing = _inside(root, part, paired)
    numbers = {stem(group.target) for group in listing.groups}
    missing, leaks = list(listing.missing), []
    if part == "eval15":
        missing += [f"low/{n}.png" for n in sorted(benchmarks.LOL_EVAL15 - numbers, key=_natural)]
    else:
        tested = sorted(numbers & benchmarks.LOL_EVAL15, key=_natural)
        leaks = [f"{number} is a test picture of LOL eval15" for number in tested]
    return listing._replace(missing=missing, leaks=leaks)


def _inside(root: str, part: str, find: Callable[[str], Listing]) -> Listing:
    """The listing of `root/part` where there is such a folder, else of the root itself."""
    folder = next((name for name in _folders(root) if name.lower() == part), None)
    if folder is None:
        return find(root)
    listing = find(os.path.join(root, folder))
    groups = [
        group._replace(
            target=f"{folder}/{group.target}", inputs=tuple(f"{folder}/{p}" for p in group.inputs)
        )
        for group in listing.groups
    ]
    return listing._replace(groups=groups, ignored=[f"{folder}/{p}" for p in listing.ignored])


def _folders(root: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def _sides(root: str, degraded: str | None = None) -> tuple[str, str]:
    """Names of the folders of degraded and of clean pictures.

    `degraded` is taken where no folder has a usual name for degraded pictures.
    """
    folders = {name.lower(): name for name in _folders(root)}
    degraded = next((folders[name] for name in INPUT_FOLDERS if name in folders), degraded)
    targets = next((folders[name] for name in TARGET_FOLDERS if name in folders), None)
    if degraded is None or targets is None:
        raise ValueError(
            f"{root} has the folders {', '.join(folders.values()) or '(none)'}; it needs one of "
            f"degraded pictures ({'|'.join(INPUT_FOLDERS)}) and one of clean ones "
            f"({'|'.join(TARGET_FOLDERS)})"
        )
    return degraded, targets


def _by_name(name_of: Callable[[str], str], paths: Iterable[str]) -> dict[str, str]:
    """Name -> path; ValueError where two paths have the same name."""
    named: dict[str, str] = {}
    for path in paths:
        name = name_of(path)
        if name in named:
            raise ValueError(
                f"{named[name]} and {path} are the same picture {name}; keep one of them"
            )
        named[name] = path
    return named


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.isdigit() else 0, name)


LAYOUTS: dict[str, Layout] = {
    "clean": Layout(clean, "denoise", 0, "any folder of pictures"),
    "paired": Layout(
        paired, None, 0, "input|low|hazy|…/ and target|gt|clean|…/, same names; needs --task"
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
        lambda r: _inside(r, "train", lambda base: _gopro(base, benchmarks.GOPRO_TRAIN)),
        "deblur",
        2103,
        "[train/]SEQUENCE/{blur,sharp}/000001.png, or flat",
    ),
    "gopro-test": Layout(
        lambda r: _inside(r, "test", lambda base: _gopro(base, benchmarks.GOPRO_TEST)),
        "deblur",
        1111,
        "[test/]…, as gopro-train",
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
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{layout!r} is not a layout; {hint}known: {', '.join(LAYOUTS)}")


def find(layout: str, root: str) -> Listing:
    """What a layout finds in a folder.

    Paths of the groups are relative to `root`, also where the benchmark is in a subfolder.

    Raises:
        ValueError: layout or folder are wrong, or there is nothing of this layout.
    """
    check_name(layout)
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder; give the folder that has the pictures")
    shape = LAYOUTS[layout].shape
    listing = LAYOUTS[layout].find(root)
    if listing.groups:
        return listing
    if pictures(root):
        missing = f"; missing {_some(listing.missing)}" if listing.missing else ""
        raise ValueError(
            f"{root} has pictures, but none that belong to {layout} ({shape}{missing}); "
            "give another folder or layout"
        )
    raise ValueError(
        f"{root} has no pictures; give the folder that has them, as in "
        f"`python -m shards.pack {layout} FOLDER OUT` ({shape})"
    )


def shortfall(layout: str, listing: Listing) -> str | None:
    """One line where a benchmark is not complete, else None."""
    expected = LAYOUTS[layout].expected
    if listing.samples == (expected or listing.samples) and not listing.missing:
        return None
    if expected and listing.samples > expected:
        return f"found {listing.samples:,}, but {layout} has {expected:,}: is it another version?"
    line = f"found {listing.samples:,}" + (f" of {expected:,}" if expected else "")
    if listing.missing:
        return f"{line}; missing {_some(listing.missing)}"
    return f"{line}; which ones are missing is not known, only the count"


def not_part_of_it(layout: str, listing: Listing) -> str | None:
    """One line that names pictures which are not packed, else None."""
    if not listing.ignored:
        return None
    return (
        f"not packed, because they are not part of {layout}: {_some(listing.ignored)} "
        f"({len(listing.ignored)} in all)"
    )


def _some(items: Sequence[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (" …" if len(items) > most else "")
