"""Speed of the loader: samples per CPU-second of training crops, compared with other ways.

Run `python bench/stream.py [--json]`. Everything is measured in one process, in rounds of all ways
in turn, so that a busy machine slows all of them; the figures are medians over the rounds of ratios
within a round. CPU-seconds are user plus system time of the process. One sample is a pair, cropped
to 128x128, flipped and put into a batch of float tensors. The pictures have the sizes and formats
of the benchmarks; they are made from photographs of scikit-image, or of `--pictures DIR`.

The ways:
    ours       shards.stream.TrainStream over packed shards, in this process
    decode     only the decoding of the same crops by the same decoder: the limit
    folder     files read and decoded whole by Pillow, as in the field's Dataset classes
    webdataset webdataset's own pipeline over the same tars (decode("rgb8"), crop, flip)
    tiles      ours over shards packed with --tiles 128
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import tyro
import webdataset
from PIL import Image

from shards import degrade
from shards.config import DataConfig
from shards.decode import decode
from shards.order import Plan
from shards.packing import pack
from shards.stream import TrainStream, _crop

CROP = 128
BATCH = 8
KINDS = {"jpeg": (550, 413, "jpg"), "png": (481, 321, "png"), "png720": (1280, 720, "png")}
TASK = "derain"


def photographs(folder: Path | None) -> list[np.ndarray]:
    """Photographs to cut the test pictures from."""
    if folder is not None:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".bmp"))
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths[:24]]
    import skimage.data as data

    return [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        data.stereo_motorcycle()[0],
    ]


def mosaic(sources: list[np.ndarray], width: int, height: int, seed: int) -> Image.Image:
    """A picture of the wanted size, of real photographs beside each other."""
    rng = np.random.default_rng(seed)
    canvas = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 240):
        for left in range(0, width, 320):
            source = sources[int(rng.integers(len(sources)))]
            y = int(rng.integers(0, source.shape[0] - 240 + 1))
            x = int(rng.integers(0, source.shape[1] - 320 + 1))
            part = source[y : y + 240, x : x + 320]
            place = canvas[top : top + 240, left : left + 320]
            place[:] = part[: place.shape[0], : place.shape[1]]
    return Image.fromarray(canvas)


def make_pairs(root: Path, kind: str, count: int, sources: list[np.ndarray]) -> None:
    """`count` pairs of one kind in input/ and target/: hazy JPEG, rainy PNG, blurred large PNG."""
    width, height, suffix = KINDS[kind]
    damage = {"jpeg": "dehaze", "png": "derain", "png720": "deblur"}[kind]
    for side in ("input", "target"):
        (root / side).mkdir(parents=True)
    for number in range(count):
        clean = mosaic(sources, width, height, number)
        rng = degrade.generator(kind, number)
        degraded, _ = degrade.synthesise(np.asarray(clean), (damage,), rng)
        for side, picture in (("input", Image.fromarray(degraded)), ("target", clean)):
            options = {"quality": 95} if suffix == "jpg" else {}
            picture.save(root / side / f"{number:04d}.{suffix}", **options)


def as_batch(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float tensors of the crops: what every contender ends with."""
    sides = [np.stack([pair[side] for pair in pairs]) for side in (0, 1)]
    first, second = (
        torch.from_numpy(s.transpose(0, 3, 1, 2).copy()).float().div_(255) for s in sides
    )
    return first, second


def augment(pixels: np.ndarray, down: bool, right: bool) -> np.ndarray:
    """Flips."""
    return pixels[:: -1 if down else 1, :: -1 if right else 1]


def cut(degraded: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same random crop and flips of two whole pictures, as the field's loaders do it."""
    top = random.randint(0, degraded.shape[0] - CROP)
    left = random.randint(0, degraded.shape[1] - CROP)
    flips = random.random() < 0.5, random.random() < 0.5
    place = np.s_[top : top + CROP, left : left + CROP]
    return augment(degraded[place], *flips), augment(clean[place], *flips)


def ours(packed: Path) -> Callable[[int], None]:
    """Our loader, in this process."""
    data = DataConfig(train=str(packed), repeats={TASK: 1}, crop=CROP, loader_workers=0)
    stream = TrainStream(data, 0)
    state = {"at": 0}

    def run(samples: int) -> None:
        sizes = {"global_batch": BATCH, "micro_batch": BATCH, "world": 1, "rank": 0}
        for _ in stream.batches(state["at"], state["at"] + samples, **sizes):
            pass
        state["at"] += samples

    return run


def decode_only(packed: Path) -> Callable[[int], None]:
    """Decoding of random crops by our decoder, from memory; no reading, checking, batching."""
    data = DataConfig(train=str(packed), repeats={TASK: 1}, crop=CROP, loader_workers=0)
    reader = TrainStream(data, 0).reader
    rng = np.random.default_rng(0)
    places = [reader.locate(TASK, n) for n in range(reader.manifest.counts[TASK])]
    stored = [(reader.stored(place, "input"), reader.stored(place, "target")) for place in places]

    def run(samples: int) -> None:
        for number in range(samples):
            place, pair = places[number % len(places)], stored[number % len(places)]
            box = _crop(place, CROP, rng.bit_generator.random_raw(2).tolist())
            for encoded in pair:
                decode(encoded, box)

    return run


def folder(root: Path) -> Callable[[int], None]:
    """Two files a sample, decoded whole by Pillow."""
    names = sorted(path.name for path in (root / "input").iterdir())
    state = {"at": 0}

    def run(samples: int) -> None:
        for _ in range(samples // BATCH):
            pairs = []
            for _ in range(BATCH):
                name = names[state["at"] % len(names)]
                state["at"] += 1
                sides = [
                    np.array(Image.open(root / s / name).convert("RGB"))
                    for s in ("input", "target")
                ]
                pairs.append(cut(sides[0], sides[1]))
            as_batch(pairs)

    return run


def by_webdataset(packed: Path) -> Callable[[int], None]:
    """webdataset's pipeline over the same tars."""
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]

    def to_pair(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        sides = {}
        for field, value in sample.items():
            if field.startswith(("input.", "target.")):
                sides[field.split(".")[0]] = np.array(Image.open(BytesIO(value)).convert("RGB"))
        return cut(sides["input"], sides["target"])

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            data = webdataset.WebDataset(urls, shardshuffle=False).shuffle(100).map(to_pair)
            yield from data.batched(BATCH, collation_fn=as_batch, partial=False)

    stream = endless()

    def run(samples: int) -> None:
        for _ in range(samples // BATCH):
            next(stream)

    return run


def measure(
    contenders: dict[str, Callable[[int], None]], samples: int, rounds: int
) -> dict[str, list[float]]:
    """Samples per CPU-second of each contender in each round; they take turns."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(BATCH)
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run(samples)
            speeds[name].append(samples / (time.process_time() - start))
    return speeds


def bench_kind(kind: str, root: Path, sources: list[np.ndarray], rounds: int) -> dict[str, float]:
    """All contenders on one kind of picture."""
    count, samples = (24, 24) if kind == "png720" else (48, 96)
    make_pairs(root / "pairs", kind, count, sources)
    options = {"task": TASK, "workers": 1, "shard_mib": 32}
    pack("paired", str(root / "pairs"), str(root / "packed"), **options)
    contenders = {
        "ours": ours(root / "packed"),
        "decode": decode_only(root / "packed"),
        "folder": folder(root / "pairs"),
        "webdataset": by_webdataset(root / "packed"),
    }
    if kind != "jpeg":
        pack("paired", str(root / "pairs"), str(root / "tiled"), tiles=128, **options)
        contenders["tiles"] = ours(root / "tiled")
    speeds = measure(contenders, samples, rounds)
    figures = {f"{name}_per_cpu_s": round(statistics.median(s), 1) for name, s in speeds.items()}
    pairs = {
        "vs_decode": ("ours", "decode"),
        "vs_folder": ("ours", "folder"),
        "vs_webdataset": ("ours", "webdataset"),
    }
    if "tiles" in speeds:
        pairs |= {
            "tiles_vs_folder": ("tiles", "folder"),
            "tiles_vs_webdataset": ("tiles", "webdataset"),
        }
    for name, (one, other) in pairs.items():
        ratios = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        figures[name] = round(statistics.median(ratios), 3)
    return figures


def peak_mib() -> float:
    """Most memory that this process has held, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_plan() -> dict[str, float]:
    """Planning at the size of a billion samples in a million shards."""
    before = peak_mib()
    figures: dict[str, float] = {}
    sizes = np.full(1_000_000, 1000)
    for order in ("uniform", "local"):
        start = time.process_time()
        plan = Plan(
            degradations=(3,),
            samples=(10**9,),
            repeats=(1,),
            seed=1,
            order=order,
            shard_sizes=(sizes,),
        )
        plan.draws(np.arange(123_456_789, 123_456_789 + 64))
        figures[f"{order}_cold_start_s"] = round(time.process_time() - start, 4)
        start, block = time.process_time(), np.arange(1 << 20) + 987_654_321
        plan.draws(block)
        figures[f"{order}_us_per_sample"] = round(
            (time.process_time() - start) / len(block) * 1e6, 3
        )
    figures["memory_mib"] = round(peak_mib() - before, 1)
    return figures


def shuffle_quality() -> dict[str, dict[str, float]]:
    """How well the two orders mix: one million samples in a thousand shards, batches of 64.

    `shards_per_batch`: distinct shards among a batch's samples (64 would be the most).
    `same_shard`: share of a batch's pairs of samples that come from one shard, against what chance
    gives. `open_shards`: distinct shards among 4,096 consecutive samples.
    """
    figures = {}
    sizes = np.full(1000, 1000)
    for order in ("uniform", "local"):
        plan = Plan(
            degradations=(3,),
            samples=(10**6,),
            repeats=(1,),
            seed=1,
            order=order,
            shard_sizes=(sizes,),
        )
        shard = plan.draws(np.arange(400_000, 400_000 + 64 * 640)).sample // 1000
        batches = shard.reshape(-1, 64)
        distinct = np.array([len(set(batch)) for batch in batches.tolist()])
        same = np.array(
            [(np.bincount(b) * (np.bincount(b) - 1)).sum() / (64 * 63) for b in batches]
        )
        windows = shard.reshape(-1, 4096)
        figures[order] = {
            "shards_per_batch": round(float(distinct.mean()), 1),
            "same_shard": round(float(same.mean()), 4),
            "open_shards": round(float(np.mean([len(set(w)) for w in windows.tolist()])), 1),
        }
    return figures


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Samples per CPU-second from shards, compared with other ways of reading them."""

    json: bool = False
    """Print JSON only."""
    pictures: Path | None = None
    """Folder of photographs to cut from; default: photographs of scikit-image."""
    rounds: int = 5
    """Timed rounds of each case."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = tyro.cli(Arguments, args=argv, prog="python bench/stream.py")
    torch.set_num_threads(1)
    random.seed(0)
    sources = photographs(options.pictures)
    result: dict[str, object] = {"plan": bench_plan(), "shuffle": shuffle_quality()}
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as root:
        for kind in KINDS:
            result[kind] = bench_kind(kind, Path(root) / kind, sources, options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for name, row in result.items():
            print(name)
            for key, value in dict(row).items():  # type: ignore[call-overload]
                print(f"  {key:28} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
