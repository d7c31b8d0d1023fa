"""Batches and pictures out of packed shards."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.exchange import Upload
from shards import degrade, reader
from shards.config import DataConfig
from shards.packing import pack
from shards.stream import Batch, TrainStream, pictures
from shards.tasks import DEGRADATIONS, TASKS


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine cuts of photographs, some smaller than a crop, in several shards of three tasks."""
    import skimage.data

    root = tmp_path_factory.mktemp("stream")
    (root / "photos").mkdir()
    for number, size in enumerate([90, 96, 40, 100, 96, 30, 80, 96, 120]):
        picture = (skimage.data.astronaut(), skimage.data.coffee())[number % 2]
        cut = picture[20 * number : 20 * number + size, 30 * number : 30 * number + 90]
        Image.fromarray(cut).save(root / "photos" / f"{number}.png")
    tasks = ["derain", "lowlight"]
    out = str(root / "shards")
    pack("clean", str(root / "photos"), out, synthesise=tasks, workers=1, shard_mib=0.08)
    return root / "shards"


def config(packed: Path, **changes: object) -> DataConfig:
    repeats = {"denoise_15": 2, "denoise_50": 1, "derain": 3, "lowlight": 1}
    base = DataConfig(train=str(packed), repeats=repeats, crop=48, loader_workers=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def run(data: DataConfig, world: int, start: int = 0, stop: int = 96) -> list[Batch]:
    """The batches of a whole run in the order of their positions."""
    found: list[Batch] = []
    for rank in range(world):
        stream = TrainStream(data, 11)
        sizes = {"global_batch": 24, "micro_batch": 4, "world": world, "rank": rank}
        found += stream.batches(start, stop, **sizes)
    return sorted(found, key=lambda batch: int(batch.position[0]))


class Crop(NamedTuple):
    """One sample of a batch, as bytes again."""

    degraded: np.ndarray
    clean: np.ndarray
    key: str


def crops(stream: TrainStream, count: int) -> list[Crop]:
    """The first samples of a run, in order."""
    found = []
    for batch in stream.batches(0, count, global_batch=1, micro_batch=1, world=1, rank=0):
        pixels = [
            (tensor[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            for tensor in (batch.degraded, batch.clean)
        ]
        found.append(Crop(*pixels, batch.keys[0]))
    return found


def equal(one: list[Batch], other: list[Batch]) -> bool:
    same = [
        all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True)) and a.keys == b.keys
        for a, b in zip(one, other, strict=True)
    ]
    return all(same)


def test_worlds_loader_processes_and_restarts_give_the_same_batches(packed: Path) -> None:
    data = config(packed)
    alone = run(data, 1)
    assert len(alone) == 24
    assert torch.cat([batch.position for batch in alone]).tolist() == list(range(96))
    assert equal(alone, run(data, 3))
    for workers in (1, 2, 4):
        assert equal(alone, run(dataclasses.replace(data, loader_workers=workers), 2)), workers
    assert equal(alone, run(data, 2, 0, 48) + run(data, 6, 48, 96))


def test_crops_change_their_side_at_a_place_of_the_run(packed: Path) -> None:
    data = config(packed)
    later = dataclasses.replace(data, later_crops="24:64,72:32")
    before, changed = run(data, 1), run(later, 1)
    sides = {int(batch.position[0]): batch.clean.shape[-1] for batch in changed}
    expected = {at: 48 if at < 24 else 64 if at < 72 else 32 for at in range(0, 96, 4)}
    assert sides == expected
    assert [batch.keys for batch in before] == [batch.keys for batch in changed]
    assert equal(before[:6], changed[:6])
    assert equal(changed, run(later, 2, 0, 48) + run(later, 3, 48, 96))
    assert later.crop_stages(100) == [(24, later.crop), (48, 64), (28, 32)]
    assert later.crop_stages(72) == [(24, later.crop), (48, 64)]


@pytest.mark.parametrize("order", ["uniform", "local"])
def test_an_epoch_holds_each_sample_as_often_as_said(packed: Path, order: str) -> None:
    stream = TrainStream(config(packed, order=order), 3)
    n = stream.plan.epoch_samples
    assert n == 9 * (2 + 1 + 3 + 1)
    keys = [crop.key for crop in crops(stream, n)]
    counts = {key: keys.count(key) for key in keys}
    wanted = {"denoise_15": 2, "denoise_50": 1, "derain": 3, "lowlight": 1}
    assert len(counts) == 9 * 4
    assert all(count == wanted[key.split("/")[0]] for key, count in counts.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_batch_holds(packed: Path, workers: int) -> None:
    for batch in run(config(packed, loader_workers=workers), 1, 0, 48):
        assert batch.degraded.shape == batch.clean.shape == (4, 3, 48, 48)
        assert batch.degraded.dtype == batch.clean.dtype == torch.float32
        assert batch.degraded.is_contiguous() and batch.clean.is_contiguous()
        assert batch.degraded.min() >= 0 and batch.degraded.max() <= 1
        names = [list(DEGRADATIONS)[d] for d in batch.degradation]
        assert [key.split("/")[0] for key in batch.keys] == names
        assert [TASKS[t] for t in batch.task] == [DEGRADATIONS[name].task for name in names]


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_are_what_the_floats_are_made_of(packed: Path, workers: int) -> None:
    stream = TrainStream(config(packed, loader_workers=workers), 3)
    sizes = {"global_batch": 24, "micro_batch": 4, "world": 1, "rank": 0}
    pairs = [stream.batches(0, 24, **sizes, floats=floats) for floats in (True, False)]
    upload = Upload(torch.device("cpu"))
    for floats, given in zip(*pairs, strict=True):
        assert given.degraded.dtype == given.clean.dtype == torch.uint8
        assert floats.keys == given.keys
        assert torch.equal(upload(given.degraded), floats.degraded)
        assert torch.equal(upload(given.clean), floats.clean)


def test_crop_and_flips_are_the_same_in_both_pictures_and_cut_from_the_source(packed: Path) -> None:
    stream = TrainStream(config(packed, repeats={"denoise_15": 1}, augment="dihedral"), 5)
    turned = set()
    for sample in crops(stream, 60):
        number = int(sample.key.rsplit("_", 1)[1])
        source = np.array(Image.open(packed.parent / "photos" / f"{number}.png"))
        source = np.pad(
            source, [(0, max(0, 48 - n)) for n in source.shape[:2]] + [(0, 0)], mode="reflect"
        )
        found = [t for t in range(8) if _is_cut(source, _turn_back(sample.clean, t))]
        assert found, sample.key
        turned.add(found[0])
        difference = sample.degraded.astype(int) - sample.clean
        inside = (sample.clean > 60) & (sample.clean < 195)
        if inside.sum() > 2000:
            assert difference[inside].std() == pytest.approx(15, rel=0.1)
    assert turned == set(range(8))


def _turn_back(picture: np.ndarray, turn: int) -> np.ndarray:
    flipped = picture[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]
    return flipped.transpose(1, 0, 2) if turn & 4 else flipped


def _is_cut(source: np.ndarray, cut: np.ndarray) -> bool:
    rows, columns = source.shape[0] - 47, source.shape[1] - 47
    corner = (source[:rows, :columns] == cut[0, 0]).all(-1)
    return any(
        np.array_equal(source[y : y + 48, x : x + 48], cut)
        for y, x in zip(*np.nonzero(corner), strict=True)
    )


def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(packed: Path) -> None:
    stream = TrainStream(config(packed), 0)
    with pytest.raises(ValueError, match="must be a multiple of"):
        next(stream.batches(0, 24, global_batch=24, micro_batch=4, world=5, rank=0))
    with pytest.raises(ValueError, match="stop is 25"):
        next(stream.batches(0, 25, global_batch=24, micro_batch=4, world=2, rank=0))


def test_a_task_that_is_not_packed_is_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"repeats\.dehaze is 1, .* no samples of dehaze"):
        TrainStream(config(packed, repeats={"dehaze": 1}), 0)


def test_whole_pictures_come_in_a_fixed_order_with_fixed_noise(packed: Path) -> None:
    first = list(pictures(str(packed), limit=4))
    assert [p.degradation for p in first[::4]] == [
        "denoise_15",
        "denoise_25",
        "denoise_50",
        "derain",
        "lowlight",
    ]
    assert [p.name for p in first[:4]] == ["0.png", "1.png", "2.png", "3.png"]
    assert first[0].degraded.shape == first[0].clean.shape == (3, 90, 90)
    only = list(pictures(str(packed), degradations=["denoise_50"]))
    assert len(only) == 9
    for alone, among in zip(only, first[8:12], strict=False):
        assert torch.equal(alone.degraded, among.degraded)
    with pytest.raises(ValueError, match="holds no dehaze"):
        next(pictures(str(packed), degradations=["dehaze"]))


@pytest.mark.parametrize(("world", "limit"), [(2, 2), (3, 0), (16, 1)])
def test_each_rank_decodes_its_own_pictures_only(
    packed: Path, monkeypatch: pytest.MonkeyPatch, world: int, limit: int
) -> None:
    alone = list(pictures(str(packed), limit=limit))
    assert [picture.position for picture in alone] == list(range(len(alone)))
    decoded = []
    decode = reader.decode

    def counted(*given: object) -> np.ndarray:
        decoded.append(1)
        return decode(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "decode", counted)
    together = []
    for rank in range(world):
        decoded.clear()
        own = list(pictures(str(packed), limit=limit, rank=rank, world=world))
        # The noise of denoise is made, so only its clean picture is decoded.
        assert len(decoded) == sum(1 if p.task == "denoise" else 2 for p in own)
        together += own
    together.sort(key=lambda picture: picture.position)
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert (one.position, one.degradation, one.name) == (
            *(other.position, other.degradation, other.name),
        )
        assert torch.equal(one.degraded, other.degraded) and torch.equal(one.clean, other.clean)


def test_noise_is_the_fields(packed: Path) -> None:
    picture = np.full((300, 300, 3), 128, np.uint8)
    cut = degrade.noise(picture, 25.0, degrade.generator(1)).astype(float) - 128
    rounded = degrade.noise(picture, 25.0, degrade.generator(1), "round").astype(float) - 128
    assert cut.std() == pytest.approx(25, rel=0.01)
    assert cut.mean() - rounded.mean() == pytest.approx(-0.5, abs=0.01)
    edge = degrade.noise(np.full((50, 50, 3), 250, np.uint8), 50.0, degrade.generator(1))
    assert edge.max() == 255  # clipped, not wrapped


def test_noise_levels_may_be_drawn_from_a_range_or_a_list(packed: Path) -> None:
    def levels(choice: str) -> np.ndarray:
        data = config(packed, repeats={"denoise_25": 4}, sigma={"denoise_25": choice})
        stream = TrainStream(data, 2)
        found = []
        for sample in crops(stream, 36):
            middle = (sample.clean > 100) & (sample.clean < 156)
            if middle.sum() > 1500:
                found.append((sample.degraded.astype(float) - sample.clean)[middle].std())
        return np.array(found)

    listed, ranged = levels("10,40"), levels("10..40")
    near = np.minimum(abs(listed - 10), abs(listed - 40))
    assert near.max() < 3 and (listed < 20).any() and (listed > 30).any()
    assert ranged.min() > 8 and ranged.max() < 43
    assert ((ranged > 15) & (ranged < 35)).sum() >= 3


@pytest.mark.parametrize("choice", ["", "5..", "50..5", "0,3", "5..400", "a,b", "1..2..3"])
def test_noise_levels_that_make_no_sense_are_refused(choice: str) -> None:
    with pytest.raises(ValueError, match=r"data\.sigma\.denoise_25 is"):
        DataConfig(sigma={"denoise_25": choice})
    with pytest.raises(ValueError, match="is not a noise degradation"):
        DataConfig(sigma={"derain": "5..50"})


def test_chains_are_trained_on_and_evaluated_as_mixed(packed: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "mixed")
    pack("clean", str(packed.parent / "photos"), out, synthesise=["derain+lowlight"], workers=1)
    stream = TrainStream(config(Path(out), repeats={"mixed": 2}), 0)
    assert stream.plan.epoch_samples == 18
    batch = next(stream.batches(0, 4, global_batch=4, micro_batch=4, world=1, rank=0))
    assert {TASKS[task] for task in batch.task} == {"mixed"}
    assert batch.degraded.mean() < 0.7 * batch.clean.mean()  # dark
    assert [p.degradation for p in pictures(out, degradations=["mixed"])] == ["mixed"] * 9


def test_the_samples_of_today_are_those_of_tomorrow(packed: Path) -> None:
    """A run resumed after an update of this program must read the same samples."""
    stream = TrainStream(config(packed), 1234)
    drawn = stream.plan.draws(np.array([0, 1, 2, 62, 63, 1000, 10**9]))
    assert drawn.degradation.tolist() == [6, 3, 0, 0, 0, 2, 0]
    assert drawn.sample.tolist() == [7, 2, 1, 2, 6, 2, 0]
    rng = degrade.KeyedGenerator().at(1, 2, 3)
    assert rng.bit_generator.random_raw(3).tolist() == [
        4895842857741926726,
        176895602379161741,
        8114574854211248503,
    ]


def test_keys_of_generators_differ(packed: Path) -> None:
    keyed = degrade.KeyedGenerator()
    starts = [
        tuple(keyed.at(seed, epoch, place).bit_generator.random_raw(2).tolist())
        for seed in (0, 1, -1, 2**40)
        for epoch in range(5)
        for place in range(50)
    ]
    assert len(set(starts)) == 1000
    first = keyed.at(7, 0, 0).standard_normal(20_000)
    second = keyed.at(7, 0, 1).standard_normal(20_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert first.mean() == pytest.approx(0, abs=0.03)
    assert first.std() == pytest.approx(1, abs=0.03)
    # A number half used by the sample before leaves no trace.
    keyed.at(1, 1, 1).integers(0, 10, dtype=np.int32)
    assert keyed.at(7, 0, 0).standard_normal() == first[0]


def test_noise_of_the_field_is_one_stream_through_all_pictures(packed: Path) -> None:
    """As test programs of the field draw it: one seed, then picture after picture."""
    names = ["denoise_15", "denoise_25", "denoise_50"]
    found = list(pictures(str(packed), degradations=names, noise="field", multiple=16))
    np.random.seed(0)
    for picture in found:
        assert all(side % 16 == 0 for side in picture.clean.shape[1:])
        clean = (picture.clean * 255).round().byte().permute(1, 2, 0).numpy()
        sigma = int(picture.degradation.split("_")[1])
        noise = np.random.randn(*clean.shape)
        noisy = np.clip(clean + noise * sigma, 0, 255).astype(np.uint8)
        own = (picture.degraded * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(own, noisy)
    whole = next(pictures(str(packed), degradations=["derain"]))
    cut = next(pictures(str(packed), degradations=["derain"], multiple=16))
    assert torch.equal(cut.degraded, whole.degraded[:, 5:85, 5:85])
    for rank in range(3):
        part = pictures(
            str(packed), degradations=names, noise="field", multiple=16, rank=rank, world=3
        )
        for own, expected in zip(part, found[rank::3], strict=True):
            assert torch.equal(own.degraded, expected.degraded)
