"""Packs source folders into shards.

One process writes one shard: to a temporary file, which is renamed when it is complete. Then the
shard is recorded in `OUT/.packing`. A packing that was killed continues with the shards that are
missing, and gives the same bytes as one that was not killed. The manifest is written last: a folder
without it does not count as packed.
"""

import contextlib
import difflib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock, Timeout

from shards import degrade, layouts, manifest, storage
from shards.execution import run_jobs
from shards.layouts import LAYOUTS, Group, Listing
from shards.manifest import Manifest, TaskEntry
from shards.table import Shard, ShardTable
from shards.tasks import TASKS
from shards.writer import WORK, Job

_PACKED = re.compile(rf"({'|'.join(TASKS)})-\d{{6}}\.(tar|idx)")
"""Names of the files that packing writes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that change the bytes of the shards; written to the manifest."""

    seed: int = 0
    """Seed of what is synthesised."""
    shard_mib: float = 256
    """Approximate size of a shard in MiB, estimated from the source files."""
    tiles: int = 0
    """Side in pixels of the tiles (QOI) that PNG and other lossless pictures are cut into; 0 keeps
    the original files."""
    severity: Mapping[str, float] = field(default_factory=dict)
    """Degradation -> factor on the strength of what is synthesised, in (0, 1]; 1 where it is not
    named."""

    def __post_init__(self) -> None:
        """ValueError for values out of range."""
        if self.shard_mib <= 0:
            raise ValueError(f"--shard-mib is {self.shard_mib}, but must be above 0")
        if self.tiles and not 16 <= self.tiles <= 4096:
            raise ValueError(f"--tiles is {self.tiles}, but must be 0, or 16 to 4096")
        for name, factor in self.severity.items():
            if not 0 < factor <= 1:
                raise ValueError(
                    f"--severity gives {name} {factor}, but must be above 0 and at most 1"
                )


def _split(
    root: str, groups: list[Group], limit: int, chain: tuple[str, ...]
) -> Iterator[tuple[int, tuple[Group, ...]]]:
    """Cuts the groups into shards of about `limit` bytes, estimated from the source files."""
    first, size = 0, 0
    for number, group in enumerate(groups):
        files = (group.target, *group.inputs)
        weight = sum(os.path.getsize(os.path.join(root, path)) for path in files)
        weight *= 3 if chain else 1
        if size and size + weight > limit:
            yield first, tuple(groups[first:number])
            first, size = number, 0
        size += weight
    yield first, tuple(groups[first:])


def pack(
    layout: str,
    root: str,
    out: str,
    *,
    task: str | None = None,
    synthesise: Iterable[str] = (),
    seed: int = 0,
    shard_mib: float = 256,
    tiles: int = 0,
    severity: Mapping[str, float] | None = None,
    allow_missing: bool = False,
    repair: bool = False,
    workers: int | None = None,
    ray: bool = False,
    progress: bool = False,
) -> Manifest:
    """Packs a source folder into OUT, beside the tasks that OUT already has.

    Args:
        layout: one of `LAYOUTS`.
        root: the source folder.
        out: folder or store for the shards.
        task: of a `paired` folder.
        synthesise: tasks whose degraded pictures are made from clean ones; `dehaze+lowlight`
            makes a chain of two or three, which is packed as the task `mixed`.
        seed: of what is synthesised.
        shard_mib: approximate size of a shard, in MiB.
        tiles: side of the tiles that lossless pictures are cut into; 0 keeps the original files.
        severity: degradation -> factor on the strength of what is synthesised, in (0, 1].
        allow_missing: pack an incomplete benchmark too.
        repair: pack missing or damaged shards again, with the options in the manifest.
        workers: processes; None for one per core.
        ray: pack on the Ray cluster of RAY_ADDRESS; ROOT and OUT must be reachable from each of
            its nodes.
        progress: show a bar.

    Returns:
        The manifest of OUT.

    Raises:
        ValueError, OSError: with one line that says what to do.
    """
    out = storage.checked(out)
    options = Options(seed=seed, shard_mib=shard_mib, tiles=tiles, severity=severity or {})
    layouts.check_name(layout)
    chains = {} if repair else _chains(layout, task, synthesise)
    _check_severity(options, chains, repair)
    listing = layouts.find(layout, root)
    with locked(out) as was_killed:
        if repair:
            return _repair(layout, task, root, out, listing, workers, ray, progress)
        before = _manifest_before(out, list(chains), was_killed)
        _check_complete(layout, listing, out, next(iter(chains)), allow_missing)
        jobs = [
            job
            for name, chain in chains.items()
            for job in _jobs(name, chain, root, out, listing, options)
        ]
        rows = run_jobs(jobs, workers, ray, progress)
        result = before
        for name, chain in chains.items():
            shards = [row for row in rows if row.task == name]
            result = result.with_task(name, _entry(layout, chain, listing, options, shards), shards)
        storage.remove_unfinished(out)
        manifest.write(result, out)
        _clean_up(out, result)
    return result


def _jobs(
    task: str, chain: tuple[str, ...], root: str, out: str, listing: Listing, options: Options
) -> list[Job]:
    split = _split(root, listing.groups, int(options.shard_mib * 2**20), chain)
    return [
        Job(
            name=f"{task}-{number:06d}.tar",
            task=task,
            root=root,
            out=out,
            groups=groups,
            first=first,
            chain=chain,
            seed=options.seed,
            tiles=options.tiles,
            severity=_of_chain(options, chain),
        )
        for number, (first, groups) in enumerate(split)
    ]


def _entry(
    layout: str, chain: tuple[str, ...], listing: Listing, options: Options, shards: list[Shard]
) -> TaskEntry:
    noted: dict[str, Any] = {"shard_mib": options.shard_mib, "tiles": options.tiles}
    if chain:
        noted |= {"seed": options.seed, "chain": list(chain)}
    if factors := _of_chain(options, chain):
        noted["severity"] = factors
    return TaskEntry(
        samples=sum(row.samples for row in shards),
        layout=layout,
        expected=LAYOUTS[layout].expected,
        options=noted,
        missing=list(listing.missing),
        leaks=list(listing.leaks),
    )


def _of_chain(options: Options, chain: tuple[str, ...]) -> dict[str, float]:
    """The factors of a chain's own degradations."""
    return {name: factor for name, factor in options.severity.items() if name in chain}


def _check_severity(options: Options, chains: Mapping[str, tuple[str, ...]], repair: bool) -> None:
    """ValueError where a degradation of `--severity` is not synthesised."""
    if repair and options.severity:
        raise ValueError("--repair takes the severity in the manifest; leave --severity out")
    made = sorted({link for chain in chains.values() for link in chain})
    for name in options.severity:
        if name not in made:
            known = f"names only {', '.join(made)}" if made else "is not given"
            raise ValueError(
                f"--severity names {name!r}, but --synthesise {known}; add it there, or leave "
                f"{name} out"
            )


def _chains(layout: str, task: str | None, synthesise: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Task -> degradations to synthesise for it; () where the pictures are files."""
    own = LAYOUTS[layout].task
    if own is None and task not in TASKS:
        near = _did_you_mean(str(task), TASKS)
        raise ValueError(f"--task is {task}, but {layout} needs one of {', '.join(TASKS)}{near}")
    if own is not None and task not in (None, own):
        raise ValueError(f"--task is {task}, but {layout} is always {own}; leave --task out")
    chains: dict[str, tuple[str, ...]] = {own or str(task): ()}
    for wish in synthesise:
        chain = tuple(wish.split("+"))
        _check_chain(wish, chain)
        name = chain[0] if len(chain) == 1 else "mixed"
        if name in chains:
            raise ValueError(
                f"--synthesise gives {name} twice; pack one of them into another folder"
            )
        chains[name] = chain
    if len(chains) > 1 and own != "denoise":
        raise ValueError(
            f"--synthesise needs clean pictures, but {layout} has pairs; use the layout `clean`"
        )
    return chains


def _check_chain(wish: str, chain: tuple[str, ...]) -> None:
    """ValueError where a wish of `--synthesise` cannot be packed."""
    if chain == ("denoise",):
        raise ValueError(
            "--synthesise names 'denoise', but noise is added while loading: leave it out; clean "
            "pictures are always packed for denoise. In a chain it is possible, as in "
            "dehaze+denoise"
        )
    unknown = [link for link in chain if link not in degrade.SYNTHESISED]
    if unknown:
        near = _did_you_mean(unknown[0], degrade.SYNTHESISED)
        raise ValueError(
            f"--synthesise names {wish!r}, but {unknown[0]!r} cannot be synthesised{near}; known: "
            f"{', '.join(degrade.SYNTHESISED)}, and chains such as dehaze+lowlight"
        )
    if len(chain) > 3:
        raise ValueError(
            f"--synthesise names {wish!r}, a chain of {len(chain)}; a chain has two or three links"
        )


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_complete(
    layout: str, listing: Listing, out: str, task: str, allow_missing: bool
) -> None:
    """ValueError where the benchmark is not complete and that is not allowed."""
    ignored = layouts.not_part_of_it(layout, listing)
    if ignored is not None:
        print(f"warning: {ignored}", file=sys.stderr)
    line = layouts.shortfall(layout, listing)
    if line is None:
        return
    if allow_missing:
        where = f" (full list in {out}/{manifest.NAME})" if listing.missing else ""
        print(f"warning: {line}{where}", file=sys.stderr)
        return
    if listing.missing:
        line += f" (full list in {_write_list(listing, out, task)})"
    raise ValueError(f"{line}; add them, or pack without them by --allow-missing")


def _write_list(listing: Listing, out: str, task: str) -> str:
    """Writes the names of missing files; the path of the list."""
    text = "\n".join(listing.missing) + "\n"
    if storage.is_remote(out):
        with tempfile.NamedTemporaryFile("w", delete=False, suffix=f"-missing-{task}.txt") as file:
            file.write(text)
        return file.name
    path = f"{out}/{WORK}/missing-{task}.txt"
    storage.write(path, text.encode())
    return path


def _repair(
    layout: str,
    task: str | None,
    root: str,
    out: str,
    listing: Listing,
    workers: int | None,
    ray: bool,
    progress: bool,
) -> Manifest:
    """Packs the damaged shards of a layout again; ValueError where the pictures have changed."""
    present = manifest.read(out)
    jobs = []
    for name, entry in present.tasks.items():
        if entry.layout == layout and task in (None, name):
            noted = dict(entry.options)
            chain = tuple(noted.pop("chain", ()))
            jobs += _jobs(name, chain, root, out, listing, Options(**noted))
    if not jobs:
        held = ", ".join(f"{name} from {entry.layout}" for name, entry in present.tasks.items())
        raise ValueError(f"{out} has nothing packed from {layout}; it has {held}")
    wanted = {shard.name: shard for shard in present.shards}
    unknown = [job.name for job in jobs if job.name not in wanted]
    if unknown:
        raise ValueError(
            f"{root} is not what {out} was packed from: it makes {unknown[0]}, which the manifest "
            "does not name; find the old pictures, or pack into another folder"
        )
    jobs = [
        job._replace(wanted=wanted[job.name])
        for job in jobs
        if not _is_intact(out, wanted[job.name])
    ]
    rows = run_jobs(jobs, workers, ray, progress) if jobs else []
    _clean_up(out, present)
    print(f"packed {len(rows)} of {len(present.shards)} shards again", file=sys.stderr)
    return present


def _is_intact(out: str, shard: Shard) -> bool:
    wanted = {shard.name: shard.sha256, shard.index_name: shard.index_sha256}
    try:
        return all(storage.size_and_sha256(f"{out}/{n}")[1] == sha for n, sha in wanted.items())
    except FileNotFoundError:
        return False


def _manifest_before(out: str, tasks: list[str], was_killed: bool) -> Manifest:
    """The manifest in OUT, or an empty one.

    ValueError where OUT has other files, or has the tasks already.
    """
    names = [name for name in storage.list_names(out) if not name.startswith(".")]
    if manifest.NAME not in names:
        foreign = [name for name in names if not _PACKED.fullmatch(name)]
        # Between the first shard and its record, only the folder of records shows it.
        unfinished = was_killed or any(
            name.endswith(".json") for name in storage.list_names(f"{out}/{WORK}")
        )
        if foreign or (names and not unfinished):
            raise ValueError(
                f"{out} is not empty and has no {manifest.NAME} (but {(foreign or names)[0]}); "
                "give another folder, or empty it"
            )
        return Manifest(tasks={}, shards=ShardTable.of([]), uri=out)
    before = manifest.read(out)
    again = [name for name in tasks if name in before.tasks]
    if again:
        raise ValueError(
            f"{out} already has {', '.join(again)}; give another folder, or remove this one and "
            "pack again (--repair packs only damaged shards again)"
        )
    return before


@contextlib.contextmanager
def locked(out: str) -> Iterator[bool]:
    """Refuses to pack or index twice into the same local folder at the same time.

    Yields whether an earlier packing into it was killed.
    """
    if storage.is_remote(out):
        yield False
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file; give a folder for the shards")
    was_killed = os.path.isdir(f"{out}/{WORK}")
    another = False
    try:
        os.makedirs(f"{out}/{WORK}", exist_ok=True)
        with FileLock(f"{out}/{WORK}/running.lock", timeout=0):
            yield was_killed
    except Timeout as error:
        another = True
        raise ValueError(
            f"another packing or indexing into {out} is running; wait until it ends"
        ) from error
    finally:
        # If nothing was written, no empty folder stays.
        if not another and storage.list_names(f"{out}/{WORK}") in ([], ["running.lock"]):
            shutil.rmtree(f"{out}/{WORK}", ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(out)


def _clean_up(out: str, result: Manifest) -> None:
    """Removes the records, and the shards of an unfinished packing with other options."""
    wanted = {shard.name for shard in result.shards}
    for name in storage.list_names(f"{out}/{WORK}"):
        shard = name.removesuffix(".json")
        if shard.endswith(".tar") and shard not in wanted:
            storage.remove(f"{out}/{shard}")
            storage.remove(f"{out}/{shard.removesuffix('.tar')}.idx")
        if not name.endswith(".lock"):
            storage.remove(f"{out}/{WORK}/{name}")
