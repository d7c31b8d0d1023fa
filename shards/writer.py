"""Writes one shard: source pictures in, a tar with its index out."""

import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from shards import degrade, manifest, storage
from shards.decode import DecodeError, decode, encode_tile, turned
from shards.layouts import Group
from shards.manifest import Index
from shards.table import Shard

WORK = ".packing"
"""Folder inside OUT that records finished shards while packing is not finished."""
LOSSLESS = ("png", "bmp", "tif", "tiff", "ppm")
"""Suffixes of pictures that can be cut into tiles. Others (JPEG) keep their bytes, which are
smaller."""


class Job(NamedTuple):
    """One shard to write: everything that its bytes depend on, and where it goes."""

    name: str
    task: str
    root: str
    out: str
    groups: tuple[Group, ...]
    first: int
    """Number of the first group within the task."""
    chain: tuple[str, ...]
    """Degradations to synthesise, one after the other; empty where the inputs are files."""
    seed: int
    tiles: int
    """Side of the tiles that lossless pictures are cut into, 0 for none."""
    severity: Mapping[str, float]
    """Degradation of `chain` -> factor in (0, 1] on its strength; 1 where it is not named."""
    wanted: Shard | None = None
    """The row that must come out; another shard is not written."""

    def digest(self) -> str:
        """A hash that changes with the options and with any of the source files."""
        files = []
        for group in self.groups:
            for path in (group.target, *group.inputs, *([group.map] if group.map else [])):
                status = os.stat(os.path.join(self.root, path))
                files.append((path, status.st_size, status.st_mtime_ns))
        own = (self.name, self.first, self.chain, self.seed, self.tiles, dict(self.severity))
        return manifest.digest([*own, files])


class _Tar:
    """Writes a plain USTAR archive, member by member, and notes where each one is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.members: list[tuple[int, int, int]] = []

    def add(self, name: str, data: bytes) -> int:
        """Writes one member; returns its number."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self.members.append((self.size, len(data), zlib.crc32(data)))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return len(self.members) - 1

    def close(self) -> None:
        """Writes the end of the archive and waits for the disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def write_shard(job: Job, picture_done: Callable[[int], None] | None = None) -> Shard:
    """Writes one shard, its index and its record in `WORK`; returns its row of the manifest.

    Args:
        job: what to write.
        picture_done: called with 1 after each group of pictures; what it raises stops the work.

    Raises:
        OSError, ValueError: in one clear line. No incomplete file keeps the shard's name, and none
            but the wanted one, if there is one.
    """
    target = storage.join(job.out, job.name)
    if storage.is_remote(job.out):
        with tempfile.TemporaryDirectory(prefix="measnet-pack-") as folder:
            path = os.path.join(folder, job.name)
            shard, index = _write_tar(job, path, picture_done)
            _check_wanted(job, shard)
            storage.upload(path, target)
    else:
        with storage.atomic_path(target) as path:
            shard, index = _write_tar(job, path, picture_done)
            _check_wanted(job, shard)
    storage.write(storage.join(job.out, shard.index_name), index)
    record = {"job": job.digest(), "row": shard._asdict()}
    storage.write(record_path(job), json.dumps(record).encode())
    return shard


def _check_wanted(job: Job, shard: Shard) -> None:
    """ValueError where another shard is wanted."""
    if job.wanted not in (None, shard):
        raise ValueError(
            f"{job.root} is not what {job.name} was packed from; find the old pictures, or pack "
            "into another folder"
        )


def record_path(job: Job) -> str:
    """Where it is recorded that a shard is finished."""
    return storage.join(job.out, f"{WORK}/{job.name}.json")


def finished(job: Job) -> Shard | None:
    """The row of a shard that an earlier run wrote from the same files, else None."""
    try:
        record = json.loads(storage.read(record_path(job)))
        row = Shard(**record["row"])
        same = record["job"] == job.digest()
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    files = (job.name, row.index_name)
    return row if same and all(storage.exists(f"{job.out}/{name}") for name in files) else None


def _write_tar(
    job: Job, path: str, picture_done: Callable[[int], None] | None
) -> tuple[Shard, bytes]:
    """Writes the tar to a local path; its row, and the bytes of its index."""
    samples: list[tuple[Any, ...]] = []
    with open(path, "wb") as file:
        tar = _Tar(file)
        for number, group in enumerate(job.groups, start=job.first):
            samples += _add_group(tar, job, group, number)
            if picture_done is not None:
                picture_done(1)
        tar.close()
    index = Index(
        np.array(tar.members, manifest.MEMBER), np.array(samples, manifest.SAMPLE), job.tiles
    ).to_bytes()
    sha256 = tar.sha256.hexdigest()
    index_sha256 = hashlib.sha256(index).hexdigest()
    return Shard(job.name, job.task, len(samples), tar.size, sha256, index_sha256), index


class _Image(NamedTuple):
    """A picture as it is stored."""

    suffix: str
    data: bytes
    pixels: np.ndarray


def _add_group(tar: _Tar, job: Job, group: Group, number: int) -> list[tuple[Any, ...]]:
    """Writes a clean picture and its degraded ones; returns their rows of the index."""
    key = f"{job.task}_{number:08d}"
    clean = _open(job.root, group.target)
    about: dict[str, Any] = {"target": group.target}
    if job.chain:
        degraded, about["chain"] = _synthesise(job, group, clean.pixels)
        inputs = [_Image("png", b"" if job.tiles else _png(degraded), degraded)]
    else:
        inputs = [_open(job.root, path) for path in group.inputs]
        about["inputs"] = list(group.inputs)
    corners = [_corner(job.root, group, part, image, clean) for part, image in enumerate(inputs)]
    members = []
    for part, image in enumerate(inputs):
        field = "input" if len(inputs) == 1 else f"input{part:02d}"
        members.append(_add_image(tar, job, f"{key}.{field}", image))
    target, tiled = _add_image(tar, job, f"{key}.target", clean)
    height, width = (inputs[0] if inputs else clean).pixels.shape[:2]
    about |= {"height": height, "width": width, **({"tiles": job.tiles} if tiled else {})}
    text = json.dumps(about, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    meta = tar.add(f"{key}.json", text.encode())
    mark = signature(clean.pixels)
    flags = manifest.TILED_TARGET * tiled + manifest.SEVERAL * (len(inputs) > 1)
    if not inputs:
        return [(manifest.NONE, target, meta, number, 0, height, width, 0, 0, flags, mark)]
    rows = []
    for part, (member, cut) in enumerate(members):
        size = inputs[part].pixels.shape[:2]
        own = flags + manifest.TILED_INPUT * cut
        rows.append((member, target, meta, number, part, *size, *corners[part], own, mark))
    return rows


def _add_image(tar: _Tar, job: Job, name: str, image: _Image) -> tuple[int, bool]:
    """Writes a picture; returns its (first) member, and whether it is in tiles."""
    if not job.tiles or image.suffix not in LOSSLESS:
        return tar.add(f"{name}.{image.suffix}", image.data), False
    height, width = image.pixels.shape[:2]
    members = []
    for row, top in enumerate(range(0, height, job.tiles)):
        for column, left in enumerate(range(0, width, job.tiles)):
            tile = image.pixels[top : top + job.tiles, left : left + job.tiles]
            members.append(tar.add(f"{name}.{row:03d}_{column:03d}.qoi", encode_tile(tile)))
    return members[0], True


def _open(root: str, path: str) -> _Image:
    full = os.path.join(root, path)
    try:
        with open(full, "rb") as file:
            data = file.read()
        upright = turned(data)
        if upright is not None:  # nobody applies the orientation later
            return _Image("png", _png(upright), upright)
        return _Image(path.rsplit(".", 1)[-1].lower(), data, decode(data))
    except DecodeError as error:
        raise ValueError(
            f"{full} is not a complete picture ({error}); replace or remove it, then run the same "
            "command again"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{full} was removed meanwhile; run the same command again") from error


def _corner(root: str, group: Group, part: int, image: _Image, clean: _Image) -> tuple[int, int]:
    """Top and left of a degraded picture in its clean one; ValueError where the sizes differ."""
    down = clean.pixels.shape[0] - image.pixels.shape[0]
    right = clean.pixels.shape[1] - image.pixels.shape[1]
    if group.centre and down >= 0 and right >= 0 and down % 2 == right % 2 == 0:
        return down // 2, right // 2
    if down == right == 0:
        return 0, 0
    sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.pixels.shape, clean.pixels.shape)]
    raise ValueError(
        f"{os.path.join(root, group.inputs[part])} is {sizes[0]}, but its clean picture "
        f"{group.target} is {sizes[1]}; replace or remove the pair, then run the same command again"
    )


def _synthesise(job: Job, group: Group, clean: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    rng = degrade.generator(job.seed, "+".join(job.chain), group.target)
    depth = None
    if group.map and "dehaze" in job.chain:
        depth = read_map(os.path.join(job.root, group.map))
        if depth.shape != clean.shape[:2]:
            raise ValueError(
                f"{os.path.join(job.root, group.map)} is {depth.shape[1]}x{depth.shape[0]}, but "
                f"its picture is {clean.shape[1]}x{clean.shape[0]}; replace or remove the map"
            )
    return degrade.synthesise(clean, job.chain, rng, depth, job.severity)


def read_map(path: str) -> np.ndarray:
    """Relative depth (H, W) in [0, 1] from a `.npy` or 16-bit `.png` file.

    The name of the file or of its folder says whether it holds depth or disparity.
    """
    try:
        if path.endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.asarray(image)
    except (ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable map ({error})") from error
    if values.ndim != 2:
        raise ValueError(f"{path} has shape {values.shape}, but a map has two dimensions")
    name, folder = os.path.basename(path), os.path.basename(os.path.dirname(path))
    disparity = ".disparity." in name or folder == "disparity"
    return degrade.depth_from_map(values, "disparity" if disparity else "depth")


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def signature(pixels: np.ndarray) -> bytes:
    """128 bits that hardly change when a picture is scaled, cropped by a pixel or encoded again.

    They are the signs of the brightness differences between neighbours of a 9x9 thumbnail, across
    and down.
    """
    grey = Image.fromarray(pixels).convert("L").resize((9, 9), Image.Resampling.BOX)
    levels = np.asarray(grey, np.int16)
    across = levels[:8, 1:] > levels[:8, :-1]
    down = levels[1:, :8] > levels[:-1, :8]
    return np.packbits(np.concatenate([across.ravel(), down.ravel()])).tobytes()
