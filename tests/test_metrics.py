import numpy as np
import pytest
import torch
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from measnet.metrics import FIELD, Protocol, psnr, quality, ssim


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    clean = (data.chelsea() / 255.0).astype(np.float32)  # 300 x 451: no side is a multiple of 16
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    return (clean + noise).astype(np.float32), clean


def test_field_protocol_is_that_of_scikit_image_on_clipped_rgb(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    noisy, clean = pair
    clipped = noisy.clip(0, 1)
    assert psnr(noisy, clean) == pytest.approx(
        peak_signal_noise_ratio(clean, clipped, data_range=1), abs=1e-4
    )
    reference = structural_similarity(clean, clipped, data_range=1, channel_axis=-1)
    assert ssim(noisy, clean) == pytest.approx(reference, abs=1e-5)


def test_psnr_of_a_known_error() -> None:
    clean = np.full((8, 8, 3), 0.5)
    assert psnr(clean + 0.1, clean) == pytest.approx(20.0)
    assert psnr(clean, clean) == float("inf")
    assert ssim(clean, clean) == pytest.approx(1.0)


def test_ssim_is_the_mean_over_channels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    noisy, clean = (p.clip(0, 1).astype(np.float64) for p in pair)
    channels = [
        structural_similarity(clean[..., c], noisy[..., c], data_range=1, win_size=7)
        for c in range(3)
    ]
    assert ssim(noisy, clean) == pytest.approx(np.mean(channels), abs=1e-12)


def test_values_outside_the_range_are_clipped() -> None:
    clean = np.ones((8, 8, 3))
    assert psnr(clean * 5, clean) == float("inf")


def test_y_channel_is_bt601(pair: tuple[np.ndarray, np.ndarray]) -> None:
    noisy, clean = pair
    luma = [color.rgb2ycbcr(p.clip(0, 1).astype(np.float64))[..., 0] / 255 for p in pair]
    expected = peak_signal_noise_ratio(luma[1], luma[0], data_range=1)
    assert psnr(noisy, clean, Protocol(colour="y")) == pytest.approx(expected, abs=1e-6)
    assert ssim(noisy, clean, Protocol(colour="y")) == pytest.approx(
        structural_similarity(luma[1], luma[0], data_range=1), abs=1e-6
    )


def test_crop16_compares_the_centre(pair: tuple[np.ndarray, np.ndarray]) -> None:
    noisy, clean = pair
    by_hand = (slice(6, 294), slice(1, 449))  # 300 = 6 + 288 + 6; 451 = 1 + 448 + 2
    assert psnr(noisy, clean, Protocol(crop16=True)) == psnr(noisy[by_hand], clean[by_hand])


def test_border_is_cut_on_each_side(pair: tuple[np.ndarray, np.ndarray]) -> None:
    noisy, clean = pair
    assert ssim(noisy, clean, Protocol(border=4)) == ssim(noisy[4:-4, 4:-4], clean[4:-4, 4:-4])


def test_refusals(pair: tuple[np.ndarray, np.ndarray]) -> None:
    noisy, clean = pair
    with pytest.raises(ValueError, match="two pictures"):
        psnr(noisy[:-1], clean)
    with pytest.raises(ValueError, match="two pictures"):
        psnr(noisy[..., :1], clean[..., :1])
    with pytest.raises(ValueError, match="no pixels of 300x451"):
        psnr(noisy, clean, Protocol(border=150))
    with pytest.raises(ValueError, match="SSIM needs at least 7x7 pixels, got 6x9"):
        ssim(noisy[:6, :9], clean[:6, :9])
    with pytest.raises(ValueError, match="border is -1"):
        Protocol(border=-1)


def test_a_network_that_diverged_scores_nan_and_raises_nothing() -> None:
    clean = np.full((8, 8, 3), 0.5)
    broken = clean.copy()
    broken[3, 3, 0] = np.nan
    assert np.isnan(psnr(broken, clean)) and np.isnan(ssim(broken, clean))


def test_each_choice_is_named_in_the_description() -> None:
    assert "RGB in [0,1]" in FIELD.describe() and "whole picture" in FIELD.describe()
    other = Protocol(colour="y", border=3, crop16=True).describe()
    assert "BT.601" in other and "border 3 px" in other and "multiples of 16" in other
    assert FIELD.as_dict()["description"] == FIELD.describe()


def test_a_batch_is_compared_picture_by_picture_to_the_last_digits() -> None:
    pictures = [data.chelsea(), data.coffee(), data.rocket()]
    clean = np.stack([one[:200, :301] / 255.0 for one in pictures])
    noisy = clean + np.random.default_rng(1).normal(0, 0.1, clean.shape)
    sides = (torch.from_numpy(side).permute(0, 3, 1, 2) for side in (noisy, clean))
    found = quality(*sides)
    for at, (a, b) in enumerate(zip(noisy.clip(0, 1), clean, strict=True)):
        reference = structural_similarity(b, a, data_range=1, channel_axis=-1)
        assert found.ssim[at].item() == pytest.approx(reference, abs=1e-9)
        expected = peak_signal_noise_ratio(b, a, data_range=1)
        assert found.psnr[at].item() == pytest.approx(expected, abs=1e-9)


def test_the_digest_tells_protocols_apart_and_stays() -> None:
    others = [Protocol(colour="y"), Protocol(border=1), Protocol(crop16=True)]
    digests = {one.digest for one in (FIELD, *others, Protocol(noise="field"))}
    assert len(digests) == 5
    assert FIELD.digest == "a2c467713495"  # a change needs a new version
    assert FIELD.digest in FIELD.describe() and FIELD.as_dict()["digest"] == FIELD.digest
