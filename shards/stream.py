"""Shards -> batches for training, and whole pictures for evaluation.

What a sample is follows from its position alone: the plan says which one, and a generator keyed by
(seed, epoch, position) draws its crop, its flips and its noise. Processes and ranks change nothing
but who computes it.
"""

import contextlib
import ctypes
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards import degrade, manifest, storage
from shards import order as ordering
from shards.cache import Cache
from shards.config import DataConfig, parse_levels
from shards.decode import UPRIGHT, Box, Turn, as_bytes, as_floats, turned
from shards.order import Plan
from shards.reader import DamagedError, Place, Reader
from shards.tasks import DEGRADATIONS, TASKS

_NAMES = tuple(DEGRADATIONS)
_DRAWS = 1024
"""Positions whose draws are computed at a time."""
_LayOut = Callable[[list[np.ndarray], list[Turn]], np.ndarray]
_SUBSTITUTES = 32
"""How many other samples are tried in the place of a damaged one."""


class Sample(NamedTuple):
    """One training sample."""

    degraded: np.ndarray
    """(c, c, 3) uint8."""
    clean: np.ndarray
    """(c, c, 3) uint8."""
    degradation: int
    """Index into `DEGRADATIONS`."""
    position: int
    key: str
    """`denoise_15/denoise_00000012`."""
    damage: str = ""
    """What was wrong with the sample whose place this one takes; empty where nothing was."""


class _Raw(NamedTuple):
    """A sample before it is turned; fields as in `Sample`."""

    degraded: np.ndarray
    clean: np.ndarray
    degradation: int
    position: int
    key: str
    turn: Turn
    damage: str = ""


class Batch(NamedTuple):
    """One micro-batch of m samples with crops of c pixels."""

    degraded: Tensor
    """(m, 3, c, c) float32 in [0, 1]."""
    clean: Tensor
    """(m, 3, c, c) float32 in [0, 1]."""
    task: Tensor
    """(m,) int64, index into `TASKS`."""
    degradation: Tensor
    """(m,) int64, index into `DEGRADATIONS`."""
    position: Tensor
    """(m,) int64, place in the run's sequence of samples."""
    keys: list[str]
    """Names: degradation/key in the tar."""
    damage: tuple[str, ...] = ()
    """With `on_corrupt: substitute`: what was wrong with the samples that others stand for."""


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
    return Reader(manifest.read(uri), cache)


class TrainStream:
    """The training samples of a run, by position."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        """Opens manifest and plan; ValueError where they do not fit, or where a local shard is not
        whole."""
        self.data = data
        self.seed = seed
        self.reader = open_reader(data.train, data)
        self.plan = Plan.from_manifest(self.reader.manifest, data.repeats, seed, data.order)
        self._keyed = degrade.Keyed()
        self._drawn: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self.damaged: dict[str, int] = {}
        """With `on_corrupt: substitute`: damage met so far -> how often."""
        if data.on_corrupt == "stop":
            self.reader.check_present()

    def read(self, position: int) -> Sample:
        """The sample at a position of the run's sequence; `DamagedError` with its name where it is
        damaged."""
        raw = self._samples(np.array([position]))[0]
        degraded, clean = (turned(pixels, raw.turn) for pixels in (raw.degraded, raw.clean))
        return Sample(degraded, clean, raw.degradation, raw.position, raw.key, raw.damage)

    def batches(
        self, start: int, stop: int, *, global_batch: int, micro_batch: int, world: int, rank: int
    ) -> Iterator[Batch]:
        """This rank's micro-batches, in order, from `start` to `stop` samples consumed by the whole
        run.

        Both are counted from the beginning of the run and are multiples of the global batch.
        Decodes in `data.loader_workers` processes. ValueError where the sizes do not fit, and at
        damage (see `on_corrupt`).
        """
        if stop % global_batch:
            raise ValueError(
                f"stop is {stop}, but must be a multiple of the global batch {global_batch}"
            )
        # Refuse wrong sizes here, not in the middle of a loader process.
        ordering.positions(start, 0, global_batch, micro_batch, world, rank)
        wanted = _Positions(start, stop, global_batch, micro_batch, world, rank)
        for result in self._load(wanted):
            if isinstance(result, DamagedError):
                raise result
            self._count(result.damage)
            if result.degraded.dtype == torch.uint8:
                result = result._replace(
                    degraded=result.degraded.div(255), clean=result.clean.div(255)
                )
            yield result

    def batch(self, positions: np.ndarray) -> Batch:
        """The samples at (m,) positions as one batch."""
        return self._batch(positions, as_floats)

    def _batch(self, positions: np.ndarray, lay_out: _LayOut) -> Batch:
        samples = self._samples(positions)
        degradations = [sample.degradation for sample in samples]
        turns = [sample.turn for sample in samples]
        return Batch(
            degraded=torch.from_numpy(lay_out([sample.degraded for sample in samples], turns)),
            clean=torch.from_numpy(lay_out([sample.clean for sample in samples], turns)),
            task=torch.tensor([TASKS.index(DEGRADATIONS[_NAMES[d]].task) for d in degradations]),
            degradation=torch.tensor(degradations),
            position=torch.from_numpy(np.array(positions, np.int64)),
            keys=[sample.key for sample in samples],
            damage=tuple(sample.damage for sample in samples if sample.damage),
        )

    def _load(self, wanted: "_Positions") -> Iterator["Batch | DamagedError"]:
        _keep_freed_memory()
        if self.data.loader_workers == 0:
            loads = _Loads(self, as_floats)
            batches = (loads[positions] for positions in wanted)
        else:
            # Bytes between processes: a quarter of what floats would be.
            loader = DataLoader(
                _Loads(self, as_bytes),
                batch_size=None,
                sampler=wanted,
                num_workers=self.data.loader_workers,
                collate_fn=_unchanged,
                prefetch_factor=4,
            )
            batches = iter(loader)  # type: ignore[arg-type]  # batch_size None: yields as they are
        # Its thread starts after the loader's processes are forked: a lock that it held would stay
        # locked.
        with self._prefetching(wanted) as step:
            for batch in batches:
                step()
                yield batch

    @contextlib.contextmanager
    def _prefetching(self, wanted: "_Positions") -> Iterator[Callable[[], None]]:
        """Fetches the shards of the coming micro-batches into the cache; call the yielded one per
        batch."""
        if not self.data.prefetch or not storage.is_remote(self.reader.manifest.uri):
            yield lambda: None
            return
        room = threading.Semaphore(self.data.prefetch)
        ended = threading.Event()
        thread = threading.Thread(target=self._prefetch, args=(wanted, room, ended), daemon=True)
        thread.start()
        try:
            yield room.release
        finally:
            ended.set()
            room.release()
            thread.join()

    def _prefetch(
        self, wanted: "_Positions", room: threading.Semaphore, ended: threading.Event
    ) -> None:
        recent: OrderedDict[str, int] = OrderedDict()
        for positions in wanted:
            room.acquire()
            if ended.is_set():
                return
            draws = self.plan.draws(positions)
            for degradation, sample in zip(draws.degradation, draws.sample, strict=True):
                task = DEGRADATIONS[_NAMES[degradation]].task
                shard = self.reader.shard_of(task, int(sample))
                if shard.name not in recent and not ended.is_set():
                    # Damage and outages are told by whoever needs the sample.
                    with contextlib.suppress(OSError):
                        self.reader.local_path(shard)
                recent[shard.name] = shard.bytes
                recent.move_to_end(shard.name)
            # More would push out what is not read yet.
            while sum(recent.values()) > self.reader.cache.limit // 2 and len(recent) > 1:
                recent.popitem(last=False)

    def _count(self, damage: tuple[str, ...]) -> None:
        for line in damage:
            self.damaged[line] = self.damaged.get(line, 0) + 1
        if sum(self.damaged.values()) > self.data.corrupt_budget:
            raise DamagedError(
                f"more than data.corrupt_budget = {self.data.corrupt_budget} damaged samples, the "
                f"last: {next(reversed(self.damaged))}",
                f"see all damage by `python -m shards.inspect {self.data.train}`",
            )

    def _samples(self, positions: np.ndarray) -> list[_Raw]:
        return [self._sample(position, *self._draw(position)) for position in positions.tolist()]

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

    def _sample(self, position: int, degradation: int, number: int, epoch: int) -> _Raw:
        try:
            return self._make(position, degradation, number, epoch)
        except (DamagedError, OSError) as error:
            if self.data.on_corrupt == "stop":
                raise
            first = error
        task = DEGRADATIONS[_NAMES[degradation]].task
        count = self.reader.manifest.counts[task]
        for attempt in range(_SUBSTITUTES):
            other = int(ordering.key(self.seed, 5, position, attempt)) % count
            try:
                made = self._make(position, degradation, other, epoch)
                return made._replace(damage=getattr(first, "what", str(first)))
            except (DamagedError, OSError):
                continue
        raise DamagedError(
            f"{_SUBSTITUTES} samples of {task} in a row are damaged: {first}",
            f"see all damage by `python -m shards.inspect {self.data.train}`",
        ) from first

    def _make(self, position: int, degradation: int, number: int, epoch: int) -> _Raw:
        name = _NAMES[degradation]
        task, sigma = DEGRADATIONS[name]
        place = self.reader.locate(task, number)
        rng = self._keyed.at(self.seed, epoch, position - epoch * self.plan.epoch_samples)
        # Four words for crop and flips, whatever is made of them; what follows is for the noise.
        words = rng.bit_generator.random_raw(4).tolist()
        box = _crop(place, self.data.crop, words)
        clean = _fit(self.reader.clean(place, box), self.data.crop)
        if sigma is None:
            degraded = _fit(self.reader.degraded(place, box), self.data.crop)
        else:
            sigma = _level(name, sigma, self.data.sigma, rng)
            degraded = degrade.noise(clean, sigma, rng, self.data.noise_rounding)
        turn = _turn(self.data.augment, words[2])
        key = f"{name}/{self.reader.key(place)}"
        return _Raw(degraded, clean, degradation, position, key, turn)


def _level(name: str, fixed: float, levels: dict[str, str], rng: np.random.Generator) -> float:
    """The noise's standard deviation for one sample, in grey levels."""
    if name not in levels:
        return fixed
    is_range, choice = parse_levels(name, levels[name])
    return float(rng.uniform(choice[0], choice[-1]) if is_range else rng.choice(choice))


class _Positions:
    """The positions of a rank's micro-batches, one array (micro_batch,) after the other; re-
    iterable."""

    def __init__(
        self, start: int, stop: int, global_batch: int, micro_batch: int, world: int, rank: int
    ) -> None:
        self.start, self.stop, self.global_batch = start, stop, global_batch
        self.rest = (global_batch, micro_batch, world, rank)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.start, self.stop, self.global_batch):
            yield from ordering.positions(step, 1, *self.rest)[0]


class _Loads(Dataset["Batch | DamagedError"]):
    """Positions -> batch, in a loader process. Damage is handed over as a value: it keeps its plain
    message."""

    def __init__(self, stream: TrainStream, lay_out: _LayOut) -> None:
        self.stream, self.lay_out = stream, lay_out

    def __getitem__(self, positions: np.ndarray) -> "Batch | DamagedError":
        try:
            return self.stream._batch(positions, self.lay_out)
        except DamagedError as error:
            return error
        except OSError as error:
            return DamagedError(str(error), "see that the store can be read")


@functools.cache
def _keep_freed_memory() -> None:
    """Asks glibc to keep up to 256 MiB that are freed: else each batch's memory is asked from the
    kernel anew, page by page, which costs as much as decoding a sample does."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def _unchanged(batch: Any) -> Any:
    return batch


def _crop(place: Place, side: int, words: list[int]) -> Box:
    """A random square; the whole height or width where the picture has less."""
    height, width = place.size
    tall, wide = min(side, height), min(side, width)
    return Box(words[0] % (height - tall + 1), words[1] % (width - wide + 1), tall, wide)


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture smaller than the crop is continued by reflection at its lower and right edge."""
    down, right = side - pixels.shape[0], side - pixels.shape[1]
    if down <= 0 and right <= 0:
        return pixels
    return np.pad(pixels, ((0, down), (0, right), (0, 0)), mode="reflect")


def _turn(augment: str, word: int) -> Turn:
    """Three random bits, as far as they are wanted."""
    if augment == "none":
        return Turn(False, False, False)
    return Turn(bool(word & 1), bool(word & 2), bool(word & 4) and augment == "dihedral")


def pictures(
    uri: str,
    *,
    limit: int = 0,
    degradations: Iterable[str] | None = None,
    data: DataConfig | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Picture]:
    """Whole pictures of a packed set in a fixed order: by degradation as in `DEGRADATIONS`, then as
    packed.

    Noise (8 bit, truncated, as the field tests) is keyed by the clean picture's bytes: the same
    picture always gets the same noise pattern, scaled by σ.

    Args:
        uri: packed shards.
        limit: at most so many per degradation, 0 for all.
        degradations: only these; by default all that the set holds.
        data: gives the cache for remote sets.
        rank: gets every `world`-th picture of the order; only these are read and decoded.
        world: number of ranks that share the pictures.

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
    try:
        for position in range(rank, len(order), world):
            yield _picture(reader, *order[position], position)
    finally:
        reader.close()


def _limited(count: int, limit: int) -> int:
    return min(count, limit) if limit else count


def _picture(reader: Reader, name: str, number: int, position: int) -> Picture:
    task, sigma = DEGRADATIONS[name]
    place = reader.locate(task, number)
    clean = reader.clean(place)
    about = reader.about(place)
    if sigma is None:
        degraded = reader.degraded(place)
        sources = about.get("inputs") or [about["target"]]
        source = sources[int(place.row["part"])] if about.get("inputs") else sources[0]
    else:
        rng = degrade.generator("evaluation", reader.checksum(place))
        degraded = degrade.noise(clean, sigma, rng)
        source = about["target"]
    degraded, clean = (as_floats([pixels], [UPRIGHT])[0] for pixels in (degraded, clean))
    return Picture(
        name, task, source, torch.from_numpy(degraded), torch.from_numpy(clean), position
    )
