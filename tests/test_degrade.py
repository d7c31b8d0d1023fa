"""The synthetic degradations follow their models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import degrade


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    import skimage.data

    return np.ascontiguousarray(skimage.data.astronaut()[:200, :240])


@pytest.mark.parametrize("task", degrade.SYNTHESISED)
@pytest.mark.parametrize("size", [(200, 240), (40, 33), (1, 7)])
def test_any_size_and_the_same_key_give_the_same_picture(
    picture: np.ndarray, task: str, size: tuple[int, int]
) -> None:
    small = picture[: size[0], : size[1]]
    one, chain = degrade.synthesise(small, (task,), degrade.generator(3, task))
    again, _ = degrade.synthesise(small, (task,), degrade.generator(3, task))
    other, _ = degrade.synthesise(small, (task,), degrade.generator(4, task))
    assert one.shape == small.shape and one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert size == (1, 7) or not np.array_equal(one, other)
    assert chain[0]["degradation"] == task


def test_haze_is_the_scattering_model(picture: np.ndarray) -> None:
    depth = np.tile(np.linspace(0, 1, 240, dtype=np.float32), (200, 1))
    hazy, told = degrade.haze(picture, degrade.generator(1), depth=depth)
    airlight, beta = np.array(told["airlight"]), told["beta"]
    transmission = np.exp(-beta * depth)[..., None]
    expected = picture / 255 * transmission + airlight * (1 - transmission)
    assert np.abs(hazy / 255 - np.clip(expected, 0, 1)).max() < 0.5 / 255 + 1e-4
    assert np.array_equal(hazy[:, 0], picture[:, 0])  # nothing between lens and object
    assert 0.09 < np.exp(-beta) < 0.46


def test_depth_maps_fill_gaps_and_turn_disparity_around() -> None:
    disparity = np.array([[8.0, 4.0, np.inf, 0.0], [8.0, 4.0, np.nan, 2.0]])
    depth = degrade.depth_from_map(disparity, "disparity")
    assert depth[0, 0] == pytest.approx(0.25, rel=0.05)
    assert depth[0, 1] == pytest.approx(0.5, rel=0.05)
    assert depth[1, 3] == pytest.approx(1)
    assert depth[0, 2] == pytest.approx(0.5, rel=0.05)  # the nearest measurement
    assert np.isfinite(depth).all()
    assert degrade.depth_from_map(np.array([[1.0, 2.0]]), "depth")[0].tolist() == pytest.approx(
        [0.5, 1], rel=0.05
    )
    with pytest.raises(ValueError, match="no value above 0"):
        degrade.depth_from_map(np.zeros((3, 3)), "depth")


def test_synthetic_depth_is_smooth_and_far_above(picture: np.ndarray) -> None:
    for seed in range(5):
        depth = degrade.depth_from_picture(picture, degrade.generator(seed))
        assert depth.shape == (200, 240) and depth.min() > 0 and depth.max() <= 1
        assert depth[:40].mean() > depth[-40:].mean() + 0.2
        assert np.abs(np.diff(depth, axis=0)).mean() < 0.02


def test_rain_only_adds_light_in_streaks(picture: np.ndarray) -> None:
    grey = np.full((240, 240, 3), 90, np.uint8)
    for seed in range(5):
        rainy, told = degrade.rain(grey, degrade.generator(seed))
        streaks = rainy.astype(int) - 90
        assert streaks.min() == 0
        assert 0.02 < (streaks > 10).mean() < 0.5
        assert (streaks[..., 0] == streaks[..., 2]).all()
        # Longer along the fall than across it: the brightness agrees further down than sideways.
        line = streaks[..., 0] - streaks[..., 0].mean()
        slope = np.tan(np.deg2rad(told["angle"]))
        along = (line[:-6, 6:-6] * np.roll(line, -round(6 * slope), 1)[6:, 6:-6]).mean()
        across = (line[:, :-6] * line[:, 6:]).mean()
        assert along > 2 * across


def test_blur_spreads_light_and_keeps_its_sum(picture: np.ndarray) -> None:
    dark = np.zeros((201, 201, 3), np.uint8)
    dark[100, 100] = 255
    for seed in range(4):
        blurred, told = degrade.blur(dark, degrade.generator(seed))
        light = degrade.to_linear(blurred)[..., 0]
        assert light.sum() == pytest.approx(1, abs=0.15)  # but for rounding to 8 bit
        spread = np.argwhere(light > 0)
        assert (np.ptp(spread, axis=0) < told["kernel"]).all()
        assert np.ptp(spread, axis=0).max() >= 0.5 * told["reach"]
    flat = np.full((64, 64, 3), 77, np.uint8)
    assert np.array_equal(degrade.blur(flat, degrade.generator(1))[0], flat)


def test_linear_light_and_back_is_exact() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(degrade.to_display(degrade.to_linear(levels)), levels)
    assert degrade.to_linear(np.full((1, 1, 3), 188, np.uint8))[0, 0, 0] == pytest.approx(
        0.5, abs=0.01
    )


def test_low_light_is_a_shorter_exposure_with_noise(picture: np.ndarray) -> None:
    for seed in range(4):
        dark, told = degrade.low_light(picture, degrade.generator(seed))
        ratio = degrade.to_linear(dark).mean() / degrade.to_linear(picture).mean()
        assert ratio == pytest.approx(told["exposure"], rel=0.5)
        flat = np.full((100, 100, 3), 200, np.uint8)
        noisy, _ = degrade.low_light(flat, degrade.generator(seed))
        assert noisy.std() > 0.3


def test_a_chain_applies_its_links_in_their_order(picture: np.ndarray) -> None:
    rng = degrade.generator(5)
    first, second = degrade.severities(2, rng)
    hazy, _ = degrade.haze(picture, rng, first)
    expected, _ = degrade.low_light(hazy, rng, second)
    made, chain = degrade.synthesise(picture, ("dehaze", "lowlight"), degrade.generator(5))
    assert np.array_equal(made, expected)
    assert [link["degradation"] for link in chain] == ["dehaze", "lowlight"]
    assert [link["severity"] for link in chain] == pytest.approx([first, second], abs=1e-5)


def test_a_weaker_link_is_noted_and_the_others_stay(picture: np.ndarray) -> None:
    weak = {"deblur": 0.5}
    full, told = degrade.synthesise(picture, ("deblur",), degrade.generator(5))
    half, noted = degrade.synthesise(picture, ("deblur",), degrade.generator(5), severity=weak)
    assert "severity" not in told[0] and noted[0]["severity"] == 0.5
    assert noted[0]["reach"] == pytest.approx(told[0]["reach"] / 2, abs=1e-4)
    assert not np.array_equal(half, full)
    dark, _ = degrade.synthesise(picture, ("lowlight",), degrade.generator(5), severity=weak)
    assert np.array_equal(dark, degrade.synthesise(picture, ("lowlight",), degrade.generator(5))[0])


def test_the_links_of_a_chain_share_their_strength() -> None:
    assert degrade.severities(1, degrade.generator(1)) == [1]
    for links, most in ((2, 1.25), (3, 1.5)):
        drawn = np.array([degrade.severities(links, degrade.generator(i)) for i in range(200)])
        assert drawn.min() >= 0.2 and drawn.max() <= 1
        assert drawn.sum(1).mean() == pytest.approx(most, abs=0.05)
        assert np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1] < -0.2


@pytest.mark.parametrize("task", degrade.SYNTHESISED)
def test_less_severity_leaves_the_picture_closer_to_the_clean_one(
    picture: np.ndarray, task: str
) -> None:
    def error(severity: float) -> float:
        made, _ = degrade.SYNTHESISED[task](picture, degrade.generator(2, task), severity)
        return float(np.abs(made.astype(float) - picture).mean())

    assert error(0.3) < 0.8 * error(1)


def test_an_object_has_one_depth() -> None:
    scene = np.full((160, 200, 3), (120, 160, 220), np.uint8)
    scene[80:] = (110, 100, 60)
    scene[50:120, 80:110] = (20, 40, 20)  # a tree on the ground, before the sky
    for seed in range(4):
        depth = degrade.depth_from_picture(scene, degrade.generator(seed))
        tree = depth[60:110, 88:102]
        assert tree.mean() < depth[55:75, 20:60].mean() - 0.15  # nearer than the sky beside it
        assert np.ptp(tree.mean(1)) < 0.6 * np.ptp(depth[60:110, 20:60].mean(1))


def test_synthetic_rain_is_as_strong_as_rain100l(real_pictures: Path) -> None:
    pairs = real_pictures / "derain" / "Rain100L"
    real, synthetic = [], []
    for number, path in enumerate(sorted((pairs / "target").glob("*.png"))):
        clean = np.asarray(Image.open(path).convert("RGB"), np.float32)
        rainy = np.asarray(Image.open(pairs / "input" / path.name).convert("RGB"), np.float32)
        made, _ = degrade.rain(clean.astype(np.uint8), degrade.generator(number))
        real.append(_streaks(rainy - clean))
        synthetic.append(_streaks(made - clean))
    for name, ours, theirs in zip(
        ("PSNR", "mean", "share of rainy pixels", "99 %"),
        np.mean(synthetic, 0),
        np.mean(real, 0),
        strict=True,
    ):
        assert ours == pytest.approx(theirs, rel=0.3), name


def _streaks(streaks: np.ndarray) -> tuple[float, float, float, float]:
    grey = streaks.mean(2)
    psnr = 20 * np.log10(255) - 10 * np.log10(np.square(streaks).mean())
    return (
        float(psnr),
        float(grey.mean()),
        float((grey > 10).mean()),
        float(np.percentile(grey, 99)),
    )


def test_an_interrupt_waits_until_a_module_is_imported() -> None:
    """A module of C would turn it into an ImportError."""
    script = """
import os, signal, sys
import numpy as np
from shards import degrade, interrupt

class Sends:
    def find_spec(self, name, *_):
        if name == "scipy.signal":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Sends())
blur = lambda: degrade.blur(np.zeros((32, 32, 3)), np.random.default_rng(0), 1.0)
print(interrupt.run_command(blur), "scipy.signal" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("130 True\n", "stopped\n")
