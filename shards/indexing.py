"""Indexes WebDataset tars that another program wrote, so that training reads them in place.

Each tar is read once, from its beginning to its end: headers and pictures are checked, and sizes,
places and checksums are noted. The tars are not changed. The manifest is written last, so an
interrupted indexing leaves the folder as it was.
"""

import hashlib
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from shards import execution, manifest, storage, tars
from shards.decode import DecodeError, decode
from shards.manifest import WEBDATASET, Index, Manifest, TaskEntry
from shards.packing import locked
from shards.patience import retrying
from shards.reader import split_member_name
from shards.table import Shard, ShardTable
from shards.tars import Member
from shards.tasks import TASKS
from shards.wording import counted
from shards.writer import signature

_SHOWN = 5
"""Most corrupt samples that an error message lists."""


class _Tar(NamedTuple):
    """A tar to index."""

    uri: str
    name: str
    task: str
    clean: str
    degraded: str | None


class _Indexed(NamedTuple):
    """What was found in a tar."""

    shard: Shard
    data: bytes
    """Its index file."""
    keys: dict[str, int]
    """Key -> first byte of its first member."""
    corrupt: list[str]
    """Samples that cannot be used, with the reasons."""
    fields: Counter[str]
    """Field -> members."""


class _Field(NamedTuple):
    """A member that belongs to a sample."""

    key: str
    field: str
    number: int
    """Of the member in the tar."""
    member: Member


class _CorruptError(Exception):
    """A sample that cannot be used."""


def index(
    *places: str,
    task: str,
    clean: str,
    degraded: str | None = None,
    out: str | None = None,
    skip_corrupt: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Manifest:
    """Indexes WebDataset tars as the samples of a task, beside the tasks that OUT already has.

    A key is a member's name up to the first dot of its file name; a field is the rest, in lower
    case, as in WebDataset. Samples are numbered by tar name, then by their order in the tar.

    Args:
        places: folders, tars or patterns, local or remote; see `tars.find`.
        task: one of `TASKS`.
        clean: field of the clean pictures; `jpg;png` takes the first one that a sample has.
        degraded: field of the degraded pictures; None for denoise, whose noise is added while
            loading.
        out: folder or store for the manifest and the indexes; None for the folder of the tars.
        skip_corrupt: leave out samples that cannot be decoded or lack a field, instead of refusing
            the set.
        workers: processes; None for one per core.
        progress: show a bar.

    Returns:
        The manifest of OUT.

    Raises:
        ValueError, OSError: with one line that says what to do.
    """
    _check_options(places, task, degraded)
    found = tars.find(places)
    out = _destination(found, out)
    work = [_Tar(storage.join(found.folder, n), n, task, clean, degraded) for n in found.sizes]
    _check_writable(out)
    with locked(out):
        before = _manifest_before(out, task, work)
        indexed = _read_all(work, sum(found.sizes.values()), workers, progress)
        _check_fields(indexed, clean, degraded)
        _check_keys(indexed)
        corrupt = [line for one in indexed for line in one.corrupt]
        if corrupt and not skip_corrupt:
            raise _refusal(corrupt, found.folder)
        kept = [one for one in indexed if one.shard.samples]
        if not kept:
            raise ValueError(f"{found.folder} has no sample left without the corrupt ones")
        fields = {"clean": clean, "degraded": degraded}
        entry = TaskEntry(
            samples=sum(one.shard.samples for one in kept),
            layout=WEBDATASET,
            options={"tars": found.patterns, **fields, "skip_corrupt": skip_corrupt},
            source="" if tars.absolute(out) == found.folder else found.folder,
            missing=corrupt,
        )
        return _write(before, task, entry, kept)


def _write(before: Manifest, task: str, entry: TaskEntry, kept: list[_Indexed]) -> Manifest:
    """Writes the indexes, then the manifest, then removes indexes that it no longer names."""
    result = before.with_task(task, entry, [one.shard for one in kept])
    for one in kept:
        storage.write(storage.join(result.uri, one.shard.index_name), one.data)
    manifest.write(result, result.uri)
    named = {shard.index_name for shard in result.shards}
    for shard in before.shards:
        if shard.index_name not in named:
            storage.remove(storage.join(result.uri, shard.index_name))
    return result


def _check_options(places: tuple[str, ...], task: str, degraded: str | None) -> None:
    if not places:
        raise ValueError("no tars were named; give a folder, tars, or a pattern such as '*.tar'")
    if task not in TASKS:
        raise ValueError(f"--task is {task!r}, but must be one of {', '.join(TASKS)}")
    if task == "denoise" and degraded:
        raise ValueError(
            f"--degraded is {degraded!r}, but denoise has clean pictures only: noise is added "
            "while loading; leave --degraded out"
        )
    if task != "denoise" and not degraded:
        raise ValueError(
            f"--task {task} needs pairs; name the field of the degraded pictures by --degraded "
            "FIELD, such as --clean gt.png --degraded lq.png"
        )


def _destination(found: tars.Tars, out: str | None) -> str:
    if out is not None:
        return storage.checked(out)
    if len({tars.fixed_part(pattern) for pattern in found.patterns}) > 1:
        raise ValueError(
            "the tars are in several folders; say where to write manifest and indexes by --out, "
            f"such as --out {found.folder}"
        )
    if found.folder.startswith(("http://", "https://")):
        raise ValueError(
            f"{found.folder} cannot be written to; name a folder for manifest and indexes by --out"
        )
    return found.folder


def _manifest_before(out: str, task: str, work: list[_Tar]) -> Manifest:
    """The manifest in OUT, or an empty one; ValueError where its task has tars that still exist,
    but are not in this work."""
    if not storage.exists(storage.join(out, manifest.NAME)):
        return Manifest(tasks={}, shards=ShardTable.of([]), uri=out)
    before = manifest.read(out)
    if task not in before.tasks:
        return before
    entry = before.tasks[task]
    if entry.layout != WEBDATASET:
        raise ValueError(
            f"{out} already has {task}, packed from {entry.layout}; name another folder by --out"
        )
    now = {tar.uri for tar in work}
    folder = tars.absolute(entry.source or out)
    then = [storage.join(folder, shard.name) for shard in before.shards_of(task)]
    left_out = next((uri for uri in then if uri not in now and storage.exists(uri)), None)
    if left_out is not None:
        raise ValueError(
            f"{out} already has {task} from {left_out}, which this command leaves out; name all "
            "tars of a task in one command, or name another folder by --out"
        )
    return before


def _check_writable(out: str) -> None:
    """Refuses a place that cannot be written to now, not after hours of reading."""
    probe = storage.join(out, ".index-probe")
    try:
        storage.write(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written to ({error.strerror or error}); name another folder for "
            "manifest and indexes by --out"
        ) from error


def _read_all(work: list[_Tar], total: int, workers: int | None, progress: bool) -> list[_Indexed]:
    workers = min(workers or os.cpu_count() or 1, len(work))
    with execution.progress_bar(total // 10**6, 0, progress, "indexing", "MB") as show:
        return execution.run(_read, work, workers, lambda count: show(count // 10**6))


def _read(tar: _Tar, advance: Callable[[int], None]) -> _Indexed:
    return retrying("reading", tar.uri, lambda: _read_once(tar, advance))


def _read_once(tar: _Tar, advance: Callable[[int], None]) -> _Indexed:
    table: list[tuple[int, int, int]] = []
    samples: list[tuple[Any, ...]] = []
    keys: dict[str, int] = {}
    corrupt: list[str] = []
    fields: Counter[str] = Counter()
    with storage.open_binary(tar.uri) as file:
        stream = tars.Stream(file, advance)
        for key, group in itertools.groupby(_fields(stream, tar, table), lambda one: one.key):
            sample = _sample(tar, key, group, keys)
            fields.update(sample.keys())
            try:
                samples.append(_row(tar, key, sample, len(samples)))
            except _CorruptError as error:
                corrupt.append(f"{tar.name}: {error}")
    data = Index(np.array(table, manifest.MEMBER), np.array(samples, manifest.SAMPLE), 0).to_bytes()
    digests = (stream.sha256.hexdigest(), hashlib.sha256(data).hexdigest())
    shard = Shard(tar.name, tar.task, len(samples), stream.size, *digests)
    return _Indexed(shard, data, keys, corrupt, fields)


def _fields(stream: tars.Stream, tar: _Tar, table: list[tuple[int, int, int]]) -> Iterator[_Field]:
    """The members that belong to samples; all members are added to the table.

    Names without a dot, and hidden files (`._0001.png` of macOS), belong to none.
    """
    for number, member in enumerate(tars.members(stream, tar.uri)):
        table.append((member.offset, len(member.data), zlib.crc32(member.data)))
        key, field = split_member_name(member.name)
        if field and key and not key.endswith("/"):
            yield _Field(key, field, number, member)


def _sample(
    tar: _Tar, key: str, group: Iterable[_Field], keys: dict[str, int]
) -> dict[str, _Field]:
    """Field -> member of a sample; ValueError where WebDataset's rules are broken."""
    sample: dict[str, _Field] = {}
    for one in group:
        where = f"{tar.uri}: {one.member.name} at byte {one.member.offset}"
        if key in keys and not sample:
            raise ValueError(
                f"{where}: the key {key!r} was at byte {keys[key]} already, with other keys "
                "between; a key may be in a set once, and WebDataset needs its members next to "
                "each other; write the tar again (`tar --sort=name` sorts it), then run the same "
                "command again"
            )
        if one.field in sample:
            first = sample[one.field].member
            raise ValueError(
                f"{where}: the sample {key!r} has the field {one.field!r} twice (first "
                f"{first.name} at byte {first.offset}); write the tar again without one of them, "
                "then run the same command again"
            )
        keys.setdefault(key, one.member.offset)
        sample[one.field] = one
    return sample


def _row(tar: _Tar, key: str, sample: dict[str, _Field], number: int) -> tuple[Any, ...]:
    """The sample's row of the index; `_CorruptError` where it cannot be used."""
    target, clean = _picture(tar.clean, key, sample)
    height, width = clean.shape[:2]
    source = manifest.NONE
    if tar.degraded:
        source, degraded = _picture(tar.degraded, key, sample)
        if degraded.shape != clean.shape:
            raise _CorruptError(
                f"{key}: the degraded picture is {degraded.shape[1]}x{degraded.shape[0]}, but the "
                f"clean one is {width}x{height}"
            )
    mark = signature(clean)
    return (source, target, manifest.NONE, number, 0, height, width, 0, 0, 0, mark)


def _picture(choices: str, key: str, sample: dict[str, _Field]) -> tuple[int, np.ndarray]:
    """Number of the member, and the pixels, of the first of several fields that the sample has."""
    found = [sample[field] for field in _alternatives(choices) if field in sample]
    if not found:
        first = next(iter(sample.values())).member
        raise _CorruptError(f"{key} at byte {first.offset} has no field {choices!r}")
    member = found[0].member
    try:
        return found[0].number, decode(member.data)
    except DecodeError as error:
        raise _CorruptError(
            f"{member.name} at byte {member.offset} cannot be decoded ({error})"
        ) from error


def _alternatives(choices: str) -> list[str]:
    """`JPG;png` -> jpg, png."""
    return [field.strip().lower() for field in choices.split(";")]


def _check_fields(indexed: list[_Indexed], clean: str, degraded: str | None) -> None:
    """ValueError where no sample of the whole set has a field."""
    present = sum((one.fields for one in indexed), Counter[str]())
    for option, choices in (("--clean", clean), ("--degraded", degraded)):
        if choices and not present.keys() & set(_alternatives(choices)):
            listed = ", ".join(f"{field} ({count:,})" for field, count in present.most_common(8))
            raise ValueError(
                f"{option} is {choices!r}, but no member has this field; the tars have "
                f"{listed or 'none'}; a field is what follows the first dot of a file name"
            )


def _check_keys(indexed: list[_Indexed]) -> None:
    """ValueError where two tars have the same key."""
    seen: dict[str, _Indexed] = {}
    for one in indexed:
        for key, offset in one.keys.items():
            if key in seen:
                other = seen[key]
                raise ValueError(
                    f"the key {key!r} is in the set twice: in {other.shard.name} at byte "
                    f"{other.keys[key]} and in {one.shard.name} at byte {offset}; if these are the "
                    "same samples, name the tars without one of the two, else write one again "
                    "with other keys"
                )
            seen[key] = one


def _refusal(corrupt: list[str], folder: str) -> ValueError:
    listed = "; ".join(corrupt[:_SHOWN])
    more = f"; and {len(corrupt) - _SHOWN} more" if len(corrupt) > _SHOWN else ""
    return ValueError(
        f"{counted(len(corrupt), 'sample')} of {folder} cannot be used: {listed}{more}; write "
        "the tars again without them, or leave them out by --skip-corrupt"
    )
