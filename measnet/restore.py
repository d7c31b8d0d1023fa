"""Restore picture files of any size, within a limit of memory.

    python -m measnet.restore IN [IN ...] OUT [--weights model.safetensors]

docs/restore.md says what is kept, what is converted and how results are named.
"""

import contextlib
import ctypes
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Annotated, NamedTuple

import psutil
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from measnet import decoding, pictures
from measnet.ensemble import TURNS, self_ensemble
from measnet.errors import first_line
from measnet.hardware import DeviceChoice, card_of, choose_device, this_machine
from measnet.hub import SMALL
from measnet.memory import RESERVE
from measnet.network import MEASNet
from measnet.tiling import (
    OVERLAP,
    FeatureMemory,
    Precision,
    Tiling,
    choose_tiling,
    restore_routed,
)
from measnet.weights import load_weights

SUFFIXES = tuple(pictures.FORMATS)
"""Files with other suffixes in a folder are left out."""
LEAST_MEMORY = 200_000_000
"""Bytes without which no picture is started."""
KEEP_SUFFIX = (".png", ".tif", ".tiff")
"""Results of these keep their name; results of others are PNG."""


class Job(NamedTuple):
    """A picture to restore."""

    source: Path
    target: Path
    """The file to write."""


def result_names(files: Sequence[PurePath]) -> list[PurePath]:
    """Names of the results; each is unique, also on systems that ignore upper and lower case.

    PNG and TIFF keep their name. NAME.jpg becomes NAME.png, or NAME.jpg.png if another file would
    give NAME.png too; if that is taken, a number is added.
    """
    wanted = Counter(_folded(_first_name(file)) for file in files)
    named: dict[int, PurePath] = {}
    taken: set[str] = set()
    for at in sorted(range(len(files)), key=lambda at: files[at].suffix.lower() not in KEEP_SUFFIX):
        file = files[at]
        first = _first_name(file)
        alone = wanted[_folded(first)] == 1 or file.suffix.lower() in KEEP_SUFFIX
        whole = file.with_name(file.name + ".png")
        numbered = (first.with_name(f"{first.stem}-{n}{first.suffix}") for n in count(2))
        candidates = chain([first] if alone else [whole], numbered)
        named[at] = next(name for name in candidates if _folded(name) not in taken)
        taken.add(_folded(named[at]))
    return [named[at] for at in range(len(files))]


def _first_name(file: PurePath) -> PurePath:
    return file if file.suffix.lower() in KEEP_SUFFIX else file.with_suffix(".png")


def _folded(path: PurePath) -> str:
    return str(path).casefold()


def plan(sources: Sequence[Path], target: Path) -> list[Job]:
    """Each picture with its result; a folder keeps its structure.

    Args:
        sources: files, folders and patterns such as `photos/*.jpg`; what is named twice counts
            once.
        target: a folder; for one file also a file.

    Raises:
        ValueError: nothing to restore, or the target does not fit the sources.
    """
    given = list(chain.from_iterable(map(_expand, sources)))
    if len(given) == 1 and given[0].is_file():
        return [Job(given[0], _target_of_file(given[0], target))]
    if target.is_file() or (target.suffix.lower() in SUFFIXES and not target.is_dir()):
        what = f"{given[0]} is a folder" if len(given) == 1 else f"{len(given)} inputs are given"
        raise ValueError(f"{what}, so {target} must be a folder, not a file")
    found: dict[Path, PurePath] = {}
    for source in given:
        pictures_in_it = {source: PurePath(source.name)} if source.is_file() else None
        for path, name in (pictures_in_it or _pictures(source, target)).items():
            if all(not path.samefile(other) for other in found if other.name == path.name):
                found[path] = name
    names = result_names(list(found.values()))
    return [Job(path, target / name) for path, name in zip(found, names, strict=True)]


def _expand(source: Path) -> list[Path]:
    """The file or folder, or what a pattern finds."""
    if source.exists():
        return [source]
    matches = sorted(Path(name) for name in glob(str(source), recursive=True))
    if not matches:
        raise ValueError(f"there is no file or folder {source}")
    return matches


def _pictures(source: Path, target: Path) -> dict[Path, PurePath]:
    """The pictures in a folder, with their names relative to it."""
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{target} is inside {source}, whose pictures are restored: choose a folder outside it"
        )
    inside = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    found = [
        path
        for path in inside
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.parts)
    ]
    if not found:
        raise ValueError(f"{source} holds no pictures ({', '.join(SUFFIXES)})")
    if left := len(inside) - len(found):
        print(
            f"{left} other files in {source} are skipped: hidden, or not a picture by their suffix"
        )
    return {source / path: path for path in found}


def _target_of_file(source: Path, target: Path) -> Path:
    if target.is_dir() or not target.suffix:
        (name,) = result_names([PurePath(source.name)])
        return target / name
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{target} has the unknown suffix {target.suffix}; known are {', '.join(SUFFIXES)}. "
            "If it should be a folder, create it first"
        )
    return target


def check_overwriting(
    jobs: Sequence[Job], *, force: bool = False, skip_existing: bool = False
) -> list[Job]:
    """The jobs whose result is to be written.

    Raises:
        ValueError: a result would overwrite an input (under any path), or an existing file
            without `force`.
    """
    inputs = {_identity(job.source): job.source for job in jobs}
    existing = [job for job in jobs if job.target.exists()]
    for job in existing:
        if (taken := inputs.get(_identity(job.target))) is not None:
            raise ValueError(
                f"the result {job.target} would overwrite the input {taken}: choose another OUT"
            )
    if skip_existing:
        return [job for job in jobs if job not in existing]
    if existing and not force:
        raise ValueError(
            f"{existing[0].target} exists already ({len(existing)} of {len(jobs)} results do): "
            "--force overwrites existing results, --skip-existing restores only the others"
        )
    return list(jobs)


def _identity(path: Path) -> tuple[int, int]:
    """Equal for all paths to one file."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Restore pictures of any size: files, folders, or patterns such as "photos/*.jpg".

    8 and 16 bits, floats, grey, transparency, ICC profile and EXIF are kept; docs/restore.md says
    how. The exit code is 0 if all pictures were restored, 1 if some failed (the others are
    written), 2 if nothing was started.
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IN [IN ...] OUT")
    ]
    """IN: pictures (PNG, JPEG, TIFF, WebP, BMP), or folders of pictures with any subfolders. OUT:
    folder to write to; for one picture also a file, whose suffix gives the format."""
    weights: Path = Path(SMALL)
    """A .safetensors file, a checkpoint of the authors' program, a run folder (runs/demo), or
    `small`: a tiny network that comes with the program (measnet/pretrained/README.md)."""
    memory: float = 0.0
    """GB of RAM (10⁹ bytes) that the program may take; larger pictures are restored in tiles, and
    what does not fit is kept in a file beside the result. 0: 90 % of the free memory."""
    tile: int = 0
    """Larger pictures are restored in tiles of this side, in pixels; 0: chosen by memory."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share and blend; only for weights of variant official, whose
    tiles differ a little from the whole picture."""
    self_ensemble: bool = False
    """Mean over the eight mirrored and turned pictures: a little better, eight times as long."""
    device: DeviceChoice = "auto"
    """Device for restoring; `auto`: the GPU if there is one."""
    precision: Precision = "fp32"
    """`bf16` computes with 16 bits, on GPUs that have it; the results differ a little."""
    force: bool = False
    """Overwrite existing results. Inputs are never overwritten."""
    skip_existing: bool = False
    """Restore only pictures whose result does not exist yet."""
    megapixels: Annotated[int, tyro.conf.arg(name="max-megapixels")] = decoding.MEGAPIXELS
    """Larger pictures are refused, because a small file can claim any size."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """All IN."""
        return self.paths[:-1]

    @property
    def target(self) -> Path:
        """OUT."""
        return self.paths[-1]

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: with the flag, its value and the limit.
        """
        if len(self.paths) < 2:
            raise ValueError("give at least one IN and the OUT: python -m measnet.restore IN OUT")
        for flag, value, least in (
            ("memory", self.memory, 0),
            ("tile", self.tile, 0),
            ("overlap", self.overlap, 0),
            ("max-megapixels", self.megapixels, 1),
        ):
            if value < least:
                raise ValueError(f"--{flag} is {value}, but must be {least} or more")
        if self.force and self.skip_existing:
            raise ValueError("--force and --skip-existing exclude each other: use one of them")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is that of `Arguments`."""
    given = tyro.cli(Arguments, args=argv, prog="python -m measnet.restore")
    if given.memory:
        return_freed_memory()
    try:
        given.check()
        device = choose_device(given.device, this_machine())
        check_precision(given.precision, device.choice)
        planned = plan(given.sources, given.target)
        jobs = check_overwriting(planned, force=given.force, skip_existing=given.skip_existing)
        if skipped := len(planned) - len(jobs):
            print(f"{skipped} results exist already and are skipped")
        model = load_weights(given.weights).to(device.choice)
        tiling = choose_tiling(
            model,
            tile=given.tile or None,
            overlap=given.overlap,
            memory=memory_left(given.memory) if given.memory else None,
        )
        for folder in {job.target.parent for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass  # test that it is writable before the work starts
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"device {device}\n{tiling.decision}")
    return _restore_all(model, jobs, tiling, given)


def check_precision(precision: Precision, device: str) -> None:
    """Refuse bf16 on devices that do not have it.

    Raises:
        ValueError: the device has no bf16, and what it is.
    """
    if precision == "fp32":
        return
    card = card_of(torch.device(device))
    if card is None or not card.has_bf16:
        raise ValueError(
            f"--precision bf16 needs a GPU of compute capability 8.0 or more; this device is "
            f"{card.name if card else 'a CPU'}: use --precision fp32"
        )


def _restore_all(model: MEASNet, jobs: Sequence[Job], tiling: Tiling, given: Arguments) -> int:
    """Restore the pictures one by one; a failed one does not stop the others."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    failed: list[str] = []
    done = 0
    begin = time.perf_counter()
    try:
        for number, job in enumerate(jobs, 1):
            start = time.perf_counter()
            label = f"[{number}/{len(jobs)}] {_shown(job.source)}"
            try:
                with Progress(
                    *columns, TimeRemainingColumn(), console=console, transient=True
                ) as bar:
                    show = partial(_show, bar, bar.add_task(label, total=None))
                    picture = _restore_file(model, job, tiling, given, show)
            except (OSError, ValueError, MemoryError, RuntimeError) as error:
                failed.append(_failure(job, error))
                print(f"error: {failed[-1]}", file=sys.stderr)
                continue
            done += 1
            height, width = picture.colour.shape[:2]
            seconds = time.perf_counter() - start
            size = f"{width}x{height}"
            console.print(f"{label} {size} -> {_shown(job.target)} {seconds:.1f} s")
            for note in picture.notes:
                console.print(f"    note: {note}")
    except KeyboardInterrupt:
        left = "give the pictures that are left" if given.force else "add --skip-existing"
        failed.append(f"interrupted; to continue, run the same command again, and {left}")
    seconds = time.perf_counter() - begin
    console.print(f"restored {done} of {len(jobs)} pictures to {given.target} in {seconds:.1f} s")
    if failed:
        print("\n  ".join([f"{len(jobs) - done} not restored:", *failed]), file=sys.stderr)
    return 1 if failed else 0


def _show(bar: Progress, task: TaskID, done: float) -> None:
    bar.update(task, completed=done, total=1.0)


def _restore_file(
    model: MEASNet,
    job: Job,
    tiling: Tiling,
    given: Arguments,
    report: Callable[[float], None],
) -> pictures.Picture:
    """Restore one picture; returns the original, with notes on how the result was written."""
    picture = decoding.read(job.source, megapixels=given.megapixels)
    fitting = pictures.fit(picture, job.target)  # may refuse it, so before the restoring
    tensor = picture.tensor()
    tile = tiling.side(*tensor.shape[-2:])
    folder = job.target.parent
    turns = TURNS if given.self_ensemble else 1

    def restore_turned(image: Tensor, turn: int) -> Tensor:
        memory = FeatureMemory(memory_left(given.memory) if given.memory else None, folder)
        return restore_routed(
            model,
            image,
            tile=tile,
            overlap=tiling.overlap,
            precision=given.precision,
            memory=memory,
            progress=lambda done: report((turn + done) / turns),
        ).image

    whole = self_ensemble(restore_turned, tensor) if turns > 1 else restore_turned(tensor, 0)
    pictures.write(picture.with_colour(whole), job.target)
    return fitting


def return_freed_memory() -> None:
    """Tell glibc to return freed tensors to the kernel at once.

    Otherwise it keeps some of them, which count against the limit: a third more in measurements.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def memory_left(gigabytes: float) -> int:
    """Bytes that this process can still allocate below the limit of `--memory`.

    A tenth of the limit is not used: the allocator keeps some of what was freed.

    Raises:
        ValueError: the limit is below what the process has already.
    """
    taken = psutil.Process().memory_info().rss
    left = int(RESERVE * gigabytes * 1e9) - taken
    if left <= LEAST_MEMORY:
        least = (taken + LEAST_MEMORY) / (RESERVE * 1e9)
        raise ValueError(
            f"--memory is {gigabytes:g} GB, but the program needs at least {least:.1f} GB here"
        )
    return left


def _failure(job: Job, error: Exception) -> str:
    """Which file failed and why, in one line."""
    if isinstance(error, pictures.PictureError):
        return _shown(str(error))
    reason = first_line(error)
    if isinstance(error, MemoryError | RuntimeError):  # torch raises the latter on a CPU
        reason = f"{reason}; if memory ran out, use a smaller --tile"
    return _shown(f"{job.source} could not be restored: {reason}")


def _shown(path: Path | str) -> str:
    """As it can be printed: bytes of a name that are not UTF-8 become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
