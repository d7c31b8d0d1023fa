"""Folders of benchmarks: with real pictures if available, else with empty files for the counts."""

from pathlib import Path

import pytest

from shards import benchmarks, layouts, manifest
from shards.config import DataConfig
from shards.packing import pack
from shards.stream import open_reader


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def ots(root: Path, scenes: list[str]) -> Path:
    for number, scene in enumerate(scenes):
        for light in ("0.8", "0.85", "0.9", "0.95", "1"):
            for beta in ("0.04", "0.06", "0.08", "0.1", "0.12", "0.16", "0.2"):
                touch(root, f"part{number % 4 + 1}/{scene}_{light}_{beta}.jpg")
        touch(root, f"clear/{scene}.jpg")
    return root


def test_ots_groups_35_hazy_pictures_with_their_clear_one(tmp_path: Path) -> None:
    root = ots(tmp_path, ["0025", "0039", "2100"])
    found = layouts.find("reside-ots", str(root))
    assert found.samples == 105
    assert [group.target for group in found.groups] == [
        f"clear/{n}.jpg" for n in ("0025", "0039", "2100")
    ]
    assert {len(group.inputs) for group in found.groups} == {35}
    # Scene numbers that SOTS outdoor tests are told; 2100 is not one.
    assert [line.split(":")[0] for line in found.leaks] == ["0025", "0039"]
    (root / "part1/0025_0.9_0.16.jpg").unlink()
    (root / "clear/0039.jpg").unlink()
    found = layouts.find("reside-ots", str(root))
    assert found.samples == 34 + 35
    assert list(found.missing) == ["clear/0039.*", "0025_0.9_0.16"]
    assert layouts.shortfall("reside-ots", found) == (
        "found 69 of 72,135; missing clear/0039.*, 0025_0.9_0.16"
    )


def test_ots_may_lie_in_a_folder_of_hazy_pictures_with_png_targets(tmp_path: Path) -> None:
    root = touch(tmp_path, "hazy/part2/0025_0.8_0.04.jpg", "original/0025.png")
    found = layouts.find("reside-ots", str(root))
    assert found.groups == [layouts.Group("original/0025.png", ("hazy/part2/0025_0.8_0.04.jpg",))]


def test_its_and_sots_whole(tmp_path: Path) -> None:
    its = tmp_path / "its"
    for scene in range(1, 1400):
        touch(its, f"clear/{scene}.png", *(f"hazy/{scene}_{n}_0.9.png" for n in range(1, 11)))
    found = layouts.find("reside-its", str(its))
    assert found.samples == 13_990
    assert layouts.shortfall("reside-its", found) is None

    sots = tmp_path / "sots"
    for scene in range(1400, 1450):
        touch(
            sots, f"indoor/gt/{scene}.png", *(f"indoor/hazy/{scene}_{n}.png" for n in range(1, 11))
        )
    for scene in benchmarks.SOTS_OUTDOOR:
        touch(sots, f"outdoor/gt/{scene}.png", f"outdoor/hazy/{scene}_0.8_0.2.jpg")
    for scene in sorted(benchmarks.SOTS_OUTDOOR)[:8]:
        touch(sots, f"outdoor/hazy/{scene}_1_0.16.jpg")
    for layout in ("sots-indoor", "sots-outdoor"):
        found = layouts.find(layout, str(sots))
        assert found.samples == 500
        assert layouts.shortfall(layout, found) is None, layout
    indoor = layouts.find("sots-indoor", str(sots))
    assert indoor.groups[0].target == "indoor/gt/1400.png"
    assert indoor.groups[0].centre


@pytest.mark.parametrize(
    ("layout", "rainy", "dry", "count"),
    [
        ("rain100l-train", "rainy/rain-{}.png", "gt/norain-{}.png", 200),
        ("rain100l-train", "rain-{}.png", "norain-{}.png", 200),
        ("rain100l-test", "input/{}.png", "target/{}.png", 100),
        ("rain100l-test", "rainy/rain-{:03d}.png", "gt/norain-{:03d}.png", 100),
        ("rain100h-test", "rain/rain-{:03d}.png", "norain/norain-{:03d}.png", 100),
        ("rain100h-train", "rain/norain-{}x2.png", "norain/norain-{}.png", 1800),
    ],
)
def test_rain(tmp_path: Path, layout: str, rainy: str, dry: str, count: int) -> None:
    for number in range(1, count + 1):
        touch(tmp_path, rainy.format(number), dry.format(number))
    found = layouts.find(layout, str(tmp_path))
    assert layouts.shortfall(layout, found) is None
    # In the order of the numbers, each with its own counterpart.
    assert found.groups[8] == layouts.Group(dry.format(9), (rainy.format(9),))
    assert found.groups[9] == layouts.Group(dry.format(10), (rainy.format(10),))
    (tmp_path / dry.format(7)).unlink()
    found = layouts.find(layout, str(tmp_path))
    assert layouts.shortfall(layout, found) == (
        f"found {count - 1:,} of {count:,}; missing norain-7"
    )


@pytest.mark.parametrize("prefix", ["a", ""])
def test_bsd400_with_and_without_the_a(tmp_path: Path, prefix: str) -> None:
    touch(tmp_path, *(f"BSD/{prefix}{name}.jpg" for name in benchmarks.BSD400))
    touch(tmp_path, *(f"WED/{number:05d}.bmp" for number in range(1, 4745)))
    touch(tmp_path, "BSD/105025.jpg")  # of CBSD68: not trained on
    found = layouts.find("bsd400-wed", str(tmp_path))
    assert found.samples == 5144
    assert layouts.shortfall("bsd400-wed", found) is None
    assert found.ignored == ["BSD/105025.jpg"]
    (tmp_path / f"BSD/{prefix}117025.jpg").unlink()
    found = layouts.find("bsd400-wed", str(tmp_path))
    assert layouts.shortfall("bsd400-wed", found) == "found 5,143 of 5,144; missing a117025.jpg"


def test_bsd_lists_are_what_their_names_say() -> None:
    assert len(benchmarks.BSD400) == 400
    assert len(benchmarks.CBSD68) == 68
    assert len(benchmarks.SOTS_OUTDOOR) == 492
    assert len(benchmarks.LOL_EVAL15) == 15
    assert not benchmarks.BSD400 & benchmarks.CBSD68


def test_gopro_nested_and_flat_never_reads_blur_gamma(tmp_path: Path) -> None:
    nested, flat = tmp_path / "nested", tmp_path / "flat"
    for sequence in ("GOPR0372_07_00", "GOPR0372_07_01"):
        for frame in ("000047", "000048"):
            for kind in ("blur", "blur_gamma", "sharp"):
                touch(nested, f"train/{sequence}/{kind}/{frame}.png")
            for kind in ("blur", "sharp"):
                touch(flat, f"{kind}/{sequence}_{frame}.png")
    found = layouts.find("gopro-train", str(nested))
    assert found.samples == 4
    assert found.groups[0] == layouts.Group(
        "train/GOPR0372_07_00/sharp/000047.png", ("train/GOPR0372_07_00/blur/000047.png",)
    )
    assert layouts.find("gopro-train", str(flat)).samples == 4
    assert layouts.shortfall("gopro-train", found) == (
        "found 4 of 2,103; missing GOPR0374_11_00 (the whole sequence), GOPR0374_11_01 (the whole "
        "sequence), GOPR0374_11_02 (the whole sequence) …"
    )
    assert len(found.missing) == 20


@pytest.mark.parametrize("nested", [True, False])
def test_gopro_packs_only_pictures_of_its_own_sequences(tmp_path: Path, nested: bool) -> None:
    for sequence in ("GOPR0384_11_00", "GOPR0372_07_00"):  # of the test set, of the training set
        for side in ("blur", "sharp"):
            at = f"{sequence}/{side}/000001" if nested else f"{side}/{sequence}-000001"
            touch(tmp_path, f"test/{at}.png")
    if not nested:
        touch(tmp_path, "test/blur/Flower1.png", "test/sharp/Flower1.png")
    found = layouts.find("gopro-test", str(tmp_path))
    assert [group.target.count("GOPR0384_11_00") for group in found.groups] == [1]
    assert any("GOPR0372_07_00" in path for path in found.ignored)
    assert all((tmp_path / path).exists() for path in found.ignored)
    assert len(found.ignored) == (2 if nested else 4)
    line = layouts.not_part_of_it("gopro-test", found)
    assert line and line.startswith("not packed, because they are not part of gopro-test: test/")
    assert layouts.not_part_of_it("gopro-test", found._replace(ignored=[])) is None


def test_where_only_the_count_is_known_no_list_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for side in ("low", "high"):
        (tmp_path / "lol" / side).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "lol" / side / "2.png")
    root, out = str(tmp_path / "lol"), str(tmp_path / "out")
    with pytest.raises(ValueError) as refused:
        pack("lol-our485", root, out, workers=1)
    assert str(refused.value) == (
        "found 1 of 485; which ones are missing is not known, only the count; "
        "add them, or pack without them by --allow-missing"
    )
    pack("lol-our485", root, out, workers=1, allow_missing=True)
    assert "full list" not in capsys.readouterr().err
    # Where names are known, the list that is promised is there.
    root = str(tmp_path / "cbsd")
    Path(root).mkdir()
    Image.new("RGB", (20, 20)).save(f"{root}/101085.png")
    with pytest.raises(ValueError, match=r"full list in .*missing-denoise\.txt") as listed:
        pack("cbsd68", root, str(tmp_path / "out2"), workers=1)
    listing = Path(str(listed.value).split("full list in ")[1].split(")")[0])
    assert len(listing.read_text().split()) == 67
    pack("cbsd68", root, str(tmp_path / "out2"), workers=1, allow_missing=True)
    assert f"full list in {tmp_path / 'out2'}/manifest.json" in capsys.readouterr().err
    assert len(manifest.read(str(tmp_path / "out2")).tasks["denoise"].missing) == 67


def test_lol_with_high_or_gt(tmp_path: Path) -> None:
    root = touch(
        tmp_path, "our485/low/2.png", "our485/gt/2.png", "our485/low/22.png", "our485/gt/22.png"
    )
    touch(root, *(f"eval15/low/{n}.png" for n in benchmarks.LOL_EVAL15))
    touch(root, *(f"eval15/high/{n}.png" for n in benchmarks.LOL_EVAL15))
    found = layouts.find("lol-our485", str(root))
    assert found.samples == 2
    assert found.leaks == ["22 is a test picture of LOL eval15"]
    evaluation = layouts.find("lol-eval15", str(root))
    assert layouts.shortfall("lol-eval15", evaluation) is None


def test_a_pair_without_its_counterpart_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "low/1.png", "low/2.png", "high/2.png", "high/3.png")
    found = layouts.find("paired", str(tmp_path))
    assert list(found.missing) == ["high/1", "low/3"]
    assert layouts.shortfall("paired", found) == "found 1; missing high/1, low/3"


def test_wrong_folders_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        layouts.find("clean", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no pictures"):
        layouts.find("clean", str(tmp_path))
    touch(tmp_path, "low/1.png")
    with pytest.raises(ValueError, match="it needs one of degraded pictures"):
        layouts.find("paired", str(tmp_path))
    with pytest.raises(
        ValueError,
        match="'cleen' is not a layout; did you mean clean\\? known: clean, paired, reside",
    ):
        layouts.find("cleen", str(tmp_path))


@pytest.mark.parametrize(
    ("layout", "folder", "task", "samples"),
    [
        ("reside-its", "dehaze/ITS", "dehaze", 2),
        ("sots-outdoor", "dehaze/SOTS", "dehaze", 1),
        ("sots-indoor", "dehaze/SOTS/indoor", "dehaze", 3),
        ("rain100l-test", "derain/Rain100L", "derain", 15),
        ("cbsd68", "denoise/CBSD68", "denoise", 10),
        ("kodak24", "denoise/Kodak24", "denoise", 5),
        ("gopro-test", "deblur/GoPro", "deblur", 1),
        ("lol-our485", "lowlight/LOL", "lowlight", 15),
    ],
)
def test_genuine_pictures_keep_their_bytes(
    real_pictures: Path, tmp_path: Path, layout: str, folder: str, task: str, samples: int
) -> None:
    root, out = real_pictures / folder, tmp_path / "out"
    with pytest.raises(ValueError, match=rf"found {samples} of .*--allow-missing"):
        pack(layout, str(root), str(out), workers=1)
    made = pack(layout, str(root), str(out), workers=1, allow_missing=True)
    assert made.counts == {task: samples}
    found = layouts.find(layout, str(root))
    assert manifest.read(str(out)).tasks[task].missing == list(found.missing)
    reader = open_reader(str(out), DataConfig())
    number = 0
    for group in found.groups:
        for path in group.inputs or (group.target,):
            place = reader.locate(task, number)
            number += 1
            about = reader.about(place)
            assert about["target"] == group.target
            kept = reader.stored(place, "target")
            assert kept == (root / group.target).read_bytes()
            if group.inputs:
                assert about["inputs"][int(place.row["part"])] == path
                assert reader.stored(place, "input") == (root / path).read_bytes()
                assert reader.degraded(place).shape == reader.clean(place).shape
    assert number == samples


def test_the_hazy_indoor_picture_is_the_centre_of_its_clear_one(
    real_pictures: Path, tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    root = real_pictures / "dehaze/SOTS"
    pack("sots-indoor", str(root), str(tmp_path / "out"), workers=1, allow_missing=True)
    reader = open_reader(str(tmp_path / "out"), DataConfig())
    place = reader.locate("dehaze", 0)
    whole = np.asarray(Image.open(root / "indoor/gt/1400.png"))
    assert whole.shape == (480, 640, 3)
    assert np.array_equal(reader.clean(place), whole[10:-10, 10:-10])
    # The centre fits best: haze changes brightness smoothly, so gradients correlate where they
    # coincide.
    hazy = np.asarray(Image.open(root / "indoor/hazy/1400_1.png")).astype(float)

    def agreement(top: int, left: int) -> float:
        clear = whole[top : top + 460, left : left + 620].astype(float)
        one, other = np.diff(hazy, axis=1).ravel(), np.diff(clear, axis=1).ravel()
        return float(np.corrcoef(one, other)[0, 1])

    best = max((agreement(top, left), top, left) for top in (8, 10, 12) for left in (8, 10, 12))
    assert best[1:] == (10, 10)
