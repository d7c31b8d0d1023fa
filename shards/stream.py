"""Shards -> batches for training, and whole pictures for evaluation.

The position alone determines a sample: the plan says which sample it is, and a generator keyed by
(seed, epoch, position) draws its crop, its flips and its noise. The numbers of processes and ranks
only change who computes it.
"""

import contextlib
import ctypes
import functools
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards import degrade, manifest, storage
from shards import order as ordering
from shards.cache import Cache
from shards.config import DataConfig, parse_levels
from shards.decode import NO_FLIP, Box, Flip, as_bytes, as_floats
from shards.order import Plan
from shards.patience import StoreError
from shards.reader import Damage, DamagedError, Location, Reader
from shards.table import Shard
from shards.tasks import DEGRADATIONS, TASKS

_NAMES = tuple(DEGRADATIONS)
_DRAWS = 1024
"""Positions whose draws are computed at a time."""
_Convert = Callable[[list[np.ndarray], list[Flip]], np.ndarray]
_SUBSTITUTES = 32
"""How many other samples are tried in place of a corrupt one."""


class _Sample(NamedTuple):
    """One training sample, before it is flipped."""

    degraded: np.ndarray
    """(c, c, 3) uint8."""
    clean: np.ndarray
    """(c, c, 3) uint8."""
    degradation: int
    """Index into `DEGRADATIONS`."""
    key: str
    """`denoise_15/denoise_00000012`."""
    flip: Flip
    damage: str = ""
    """Why the sample that belongs here was replaced; empty where it was not."""


class Batch(NamedTuple):
    """One micro-batch of m samples with crops of c pixels."""

    degraded: Tensor
    """(m, 3, c, c) float32 in [0, 1], or uint8; see `TrainStream.batches`."""
    clean: Tensor
    """The same."""
    task: Tensor
    """(m,) int64, index into `TASKS`."""
    degradation: Tensor
    """(m,) int64, index into `DEGRADATIONS`."""
    position: Tensor
    """(m,) int64, place in the run's sequence of samples."""
    keys: list[str]
    """Names: degradation/key in the tar."""
    damage: tuple[str, ...] = ()
    """With `on_corrupt: substitute`: one line for each corrupt sample that was replaced."""


class Picture(NamedTuple):
    """One whole picture for evaluation."""

    degradation: str
    task: str
    name: str
    """Source file of the degraded picture (of the clean one for noise)."""
    degraded: Tensor
    """(3, H, W) float32 in [0, 1]."""
    clean: Tensor
    """(3, H, W) float32 in [0, 1]."""
    position: int
    """Place in the fixed order of all pictures that were asked for."""


def open_reader(uri: str, data: DataConfig) -> Reader:
    """The samples of a folder or store, with the node's cache for remote ones."""
    cache = Cache(folder=data.cache_dir, limit=int(data.cache_gib * 2**30))
    return Reader(manifest.read(uri, cache.folder), cache)


class TrainStream:
    """The training samples of a run, by position."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        """Opens the manifest and makes the plan.

        Raises:
            ValueError: the data lacks a task of `data.repeats`, or a local shard is missing or has
                the wrong size.
        """
        self.data = data
        self.seed = seed
        self.reader = open_reader(data.train, data)
        self.plan = Plan.from_manifest(self.reader.manifest, data.repeats, seed, data.order)
        self._generator = degrade.KeyedGenerator()
        self._drawn: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self._replaced = 0
        if data.on_corrupt == "stop":
            self.reader.check_present()

    def batches(
        self,
        start: int,
        stop: int,
        *,
        global_batch: int,
        micro_batch: int,
        world: int,
        rank: int,
        floats: bool = True,
    ) -> Iterator[Batch]:
        """This rank's micro-batches, in order.

        Decodes in `data.loader_workers` processes.

        Args:
            start: samples that the whole run has consumed, a multiple of the global batch.
            stop: samples that it will have consumed at the end, likewise.
            global_batch: samples of one optimizer step, over all ranks.
            micro_batch: samples of one batch.
            world: number of ranks.
            rank: this rank.
            floats: pictures as float32 in [0, 1]; False: as the uint8 that they are made of.

        Raises:
            ValueError: the sizes do not divide.
            DamagedError: a sample is corrupt; see `data.on_corrupt`.
        """
        if stop % global_batch:
            raise ValueError(
                f"stop is {stop}, but must be a multiple of the global batch {global_batch}"
            )
        # Refuse wrong sizes here, not in the middle of a loader process.
        ordering.positions(start, 0, global_batch, micro_batch, world, rank)
        sampler = _PositionSampler(start, stop, global_batch, micro_batch, world, rank)
        for result in self._load(sampler, floats):
            if isinstance(result, DamagedError):
                raise result
            self._count_replaced(result.damage)
            if floats and result.degraded.dtype == torch.uint8:
                result = result._replace(
                    degraded=result.degraded.div(255), clean=result.clean.div(255)
                )
            yield result

    def batch(self, positions: np.ndarray, convert: _Convert = as_floats) -> Batch:
        """The samples at (m,) positions as one batch; `convert` makes floats or bytes of them."""
        samples = [self._sample(p, *self._draw(p)) for p in positions.tolist()]
        degradations = [sample.degradation for sample in samples]
        flips = [sample.flip for sample in samples]
        return Batch(
            degraded=torch.from_numpy(convert([sample.degraded for sample in samples], flips)),
            clean=torch.from_numpy(convert([sample.clean for sample in samples], flips)),
            task=torch.tensor([TASKS.index(DEGRADATIONS[_NAMES[d]].task) for d in degradations]),
            degradation=torch.tensor(degradations),
            position=torch.from_numpy(np.array(positions, np.int64)),
            keys=[sample.key for sample in samples],
            damage=tuple(sample.damage for sample in samples if sample.damage),
        )

    def _load(self, sampler: "_PositionSampler", floats: bool) -> Iterator["Batch | DamagedError"]:
        _keep_freed_memory()
        if self.data.loader_workers == 0:
            dataset = _BatchDataset(self, as_floats if floats else as_bytes)
            batches = (dataset[positions] for positions in sampler)
        else:
            # Processes exchange bytes: a quarter of what floats would be.
            loader = DataLoader(
                _BatchDataset(self, as_bytes),
                batch_size=None,
                sampler=sampler,
                num_workers=self.data.loader_workers,
                collate_fn=_unchanged,
                prefetch_factor=4,
            )
            batches = iter(loader)  # type: ignore[arg-type]  # batch_size None: yields as they are
        # The prefetching thread starts after the loader's processes were forked. A lock that it
        # held while they are forked would stay locked in them.
        with self._prefetching(sampler) as batch_done:
            for batch in batches:
                batch_done()
                yield batch

    @contextlib.contextmanager
    def _prefetching(self, sampler: "_PositionSampler") -> Iterator[Callable[[], None]]:
        """Fetches the shards of the next micro-batches into the cache, in a thread.

        Yields a function to call after each batch.
        """
        source = self.reader.manifest
        remote = any(storage.is_remote(source.folder(task)) for task in source.tasks)
        if not self.data.prefetch or not remote:
            yield lambda: None
            return
        ahead = threading.Semaphore(self.data.prefetch)
        ended = threading.Event()
        thread = threading.Thread(target=self._prefetch, args=(sampler, ahead, ended), daemon=True)
        thread.start()
        try:
            yield ahead.release
        finally:
            ended.set()
            ahead.release()
            thread.join()

    def _prefetch(
        self, sampler: "_PositionSampler", ahead: threading.Semaphore, ended: threading.Event
    ) -> None:
        recent: OrderedDict[Shard, int] = OrderedDict()
        for positions in sampler:
            ahead.acquire()
            if ended.is_set():
                return
            draws = self.plan.draws(positions)
            for degradation, sample in zip(draws.degradation, draws.sample, strict=True):
                task = DEGRADATIONS[_NAMES[degradation]].task
                shard = self.reader.shard_of(task, int(sample))
                if shard not in recent and not ended.is_set():
                    # Whoever needs the sample fetches again and reports what is wrong.
                    with contextlib.suppress(OSError, DamagedError):
                        self.reader.local_path(shard)
                recent[shard] = shard.bytes
                recent.move_to_end(shard)
            # Fetching more would evict shards that have not been read yet.
            while sum(recent.values()) > self.reader.cache.limit // 2 and len(recent) > 1:
                recent.popitem(last=False)

    def _count_replaced(self, damage: tuple[str, ...]) -> None:
        self._replaced += len(damage)
        if self._replaced > self.data.corrupt_budget:
            raise DamagedError(
                f"replaced {self._replaced} corrupt samples, more than data.corrupt_budget = "
                f"{self.data.corrupt_budget}; the last: {damage[-1]}",
                f"find all damage by `python -m shards.inspect {shlex.quote(self.data.train)}`",
            )

    def _draw(self, position: int) -> tuple[int, int, int]:
        """Degradation, sample and epoch at a position; computed for many positions at once."""
        block, within = divmod(position, _DRAWS)
        if block not in self._drawn:
            while len(self._drawn) > 1:
                del self._drawn[next(iter(self._drawn))]
            draws = self.plan.draws(np.arange(block * _DRAWS, (block + 1) * _DRAWS))
            columns = (draws.degradation.tolist(), draws.sample.tolist(), draws.epoch.tolist())
            self._drawn[block] = columns
        degradations, samples, epochs = self._drawn[block]
        return degradations[within], samples[within], epochs[within]

    def _sample(self, position: int, degradation: int, number: int, epoch: int) -> _Sample:
        """The sample at a position, or another one of its task where it is corrupt.

        Not where the store of the shards fails: that must not change what is trained on.
        """
        try:
            return self._read_sample(position, degradation, number, epoch)
        except StoreError:
            raise
        except (DamagedError, OSError) as error:
            if self.data.on_corrupt == "stop":
                raise
            first = error
        task = DEGRADATIONS[_NAMES[degradation]].task
        count = self.reader.manifest.counts[task]
        problem = first.problem if isinstance(first, DamagedError) else str(first)
        for attempt in range(_SUBSTITUTES):
            other = int(ordering.key(self.seed, 5, position, attempt)) % count
            try:
                sample = self._read_sample(position, degradation, other, epoch)
                return sample._replace(damage=problem)
            except StoreError:
                raise
            except (DamagedError, OSError):
                continue
        raise DamagedError(
            f"{_SUBSTITUTES} samples of {task} in a row are corrupt: {problem}",
            f"find all damage by `python -m shards.inspect {shlex.quote(self.data.train)}`",
        ) from first

    def _read_sample(self, position: int, degradation: int, number: int, epoch: int) -> _Sample:
        name = _NAMES[degradation]
        task, sigma = DEGRADATIONS[name]
        location = self.reader.locate(task, number)
        rng = self._generator.at(self.seed, epoch, position - epoch * self.plan.epoch_samples)
        # Always four words for crop and flips, so that they do not shift the noise that follows.
        words = rng.bit_generator.random_raw(4).tolist()
        side = self.data.crop_at(position)
        box = _crop(location, side, words)
        clean = _pad(self.reader.clean(location, box), side)
        if sigma is None:
            degraded = _pad(self.reader.degraded(location, box), side)
        else:
            sigma = _level(name, sigma, self.data.sigma, rng)
            degraded = degrade.noise(clean, sigma, rng, self.data.noise_rounding)
        key = f"{name}/{self.reader.key(location)}"
        return _Sample(degraded, clean, degradation, key, _flip(self.data.augment, words[2]))


def _level(name: str, fixed: float, levels: dict[str, str], rng: np.random.Generator) -> float:
    """The noise's standard deviation for one sample, in grey levels."""
    if name not in levels:
        return fixed
    is_range, choice = parse_levels(name, levels[name])
    return float(rng.uniform(choice[0], choice[-1]) if is_range else rng.choice(choice))


class _PositionSampler:
    """The positions of a rank's micro-batches, one array (micro_batch,) after the other.

    It can be iterated several times.
    """

    def __init__(
        self, start: int, stop: int, global_batch: int, micro_batch: int, world: int, rank: int
    ) -> None:
        self.start, self.stop, self.global_batch = start, stop, global_batch
        self.rest = (global_batch, micro_batch, world, rank)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.start, self.stop, self.global_batch):
            yield from ordering.positions(step, 1, *self.rest)[0]


class _BatchDataset(Dataset["Batch | DamagedError"]):
    """Positions -> batch, in a loader process.

    Damage is returned as a value: an exception from a loader process would arrive with its
    traceback in place of its message.
    """

    def __init__(self, stream: TrainStream, convert: _Convert) -> None:
        self.stream, self.convert = stream, convert

    def __getitem__(self, positions: np.ndarray) -> "Batch | DamagedError":
        try:
            return self.stream.batch(positions, self.convert)
        except DamagedError as error:
            return error
        except OSError as error:
            return DamagedError(str(error), "check that the store can be read", Damage.OTHER)


@functools.cache
def _keep_freed_memory() -> None:
    """Tells glibc to keep up to 256 MiB of freed memory.

    Otherwise it returns the memory of each batch to the kernel and asks for it again, page by page,
    which costs as much as decoding a sample.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def _unchanged(batch: Any) -> Any:
    return batch


def _crop(location: Location, side: int, words: list[int]) -> Box:
    """A random square; the whole height or width where the picture is smaller."""
    height, width = location.size
    tall, wide = min(side, height), min(side, width)
    return Box(words[0] % (height - tall + 1), words[1] % (width - wide + 1), tall, wide)


def _pad(pixels: np.ndarray, side: int) -> np.ndarray:
    """Reflects a picture smaller than the crop at its lower and right edge."""
    down, right = side - pixels.shape[0], side - pixels.shape[1]
    if down <= 0 and right <= 0:
        return pixels
    return np.pad(pixels, ((0, down), (0, right), (0, 0)), mode="reflect")


def _flip(augment: str, word: int) -> Flip:
    """The flips that three random bits choose."""
    if augment == "none":
        return NO_FLIP
    return Flip(bool(word & 1), bool(word & 2), bool(word & 4) and augment == "dihedral")


def pictures(
    uri: str,
    *,
    limit: int = 0,
    degradations: Iterable[str] | None = None,
    data: DataConfig | None = None,
    rank: int = 0,
    world: int = 1,
    noise: Literal["picture", "field"] = "picture",
    multiple: int = 1,
) -> Iterator[Picture]:
    """Whole pictures of a packed set in a fixed order: by degradation as in `DEGRADATIONS`, then as
    packed.

    Noise is 8 bit and truncated, as the field tests.

    Args:
        uri: packed shards.
        limit: at most so many per degradation, 0 for all.
        degradations: only these; by default all that the set holds.
        data: gives the cache for remote sets.
        rank: gets every `world`-th picture of the order; only these are read and decoded.
        world: number of ranks that share the pictures.
        noise: `picture`: keyed by the clean picture's bytes, so the same picture always gets the
            same noise pattern, scaled by sigma. `field`: from numpy's RandomState(0), through all
            pictures in their order; it depends on `limit` and `degradations`.
        multiple: pictures are cropped to the centre whose sides are multiples of this.

    Raises:
        ValueError: a degradation that the set does not hold, or a corrupt sample.
    """
    reader = open_reader(uri, data or DataConfig())
    counts = reader.manifest.counts
    names = list(_NAMES) if degradations is None else list(degradations)
    for name in names:
        if name not in DEGRADATIONS:
            raise ValueError(f"{name!r} is not a degradation; known: {', '.join(_NAMES)}")
        if degradations is not None and DEGRADATIONS[name].task not in counts:
            raise ValueError(f"{uri} holds no {name}; it holds {', '.join(counts)}")
    order = [
        (name, number)
        for name in names
        for number in range(_limited(counts.get(DEGRADATIONS[name].task, 0), limit))
    ]
    state = np.random.RandomState(0) if noise == "field" else None
    try:
        for position, (name, number) in enumerate(order):
            if position % world == rank:
                yield _picture(reader, name, number, position, state, multiple)
            elif state is not None and DEGRADATIONS[name].sigma is not None:
                size = reader.locate(DEGRADATIONS[name].task, number).size
                height, width = (side // multiple * multiple for side in size)
                state.randn(height, width, 3)  # another rank's noise
    finally:
        reader.close()


def _centre(picture: np.ndarray, multiple: int) -> np.ndarray:
    height, width = picture.shape[:2]
    top, left = height % multiple // 2, width % multiple // 2
    rows, columns = height // multiple * multiple, width // multiple * multiple
    return picture[top : top + rows, left : left + columns]


def _limited(count: int, limit: int) -> int:
    return min(count, limit) if limit else count


def _picture(
    reader: Reader,
    name: str,
    number: int,
    position: int,
    state: np.random.RandomState | None,
    multiple: int,
) -> Picture:
    task, sigma = DEGRADATIONS[name]
    place = reader.locate(task, number)
    clean = _centre(reader.clean(place), multiple)
    about = reader.about(place)
    if sigma is None:
        degraded = _centre(reader.degraded(place), multiple)
        sources = about.get("inputs") or [about["target"]]
        source = sources[int(place.row["part"])] if about.get("inputs") else sources[0]
    else:
        if state is None:
            rng = degrade.generator("evaluation", reader.checksum(place))
            degraded = degrade.noise(clean, sigma, rng)
        else:
            degraded = degrade.field_noise(clean, sigma, state)
        source = about["target"]
    degraded, clean = (as_floats([pixels], [NO_FLIP])[0] for pixels in (degraded, clean))
    return Picture(
        name, task, source, torch.from_numpy(degraded), torch.from_numpy(clean), position
    )
