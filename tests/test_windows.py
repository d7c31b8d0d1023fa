"""Exact tiles give what restoring whole gives; their memory is bounded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from measnet import config as configs
from measnet.config import ABLATION, ModelConfig, replace_dotted
from measnet.features import Store
from measnet.network import MEASNet
from measnet.ops.whole import Incomplete, Totals, pixel_mean, total
from measnet.tiling import restore
from measnet.windows import restore_in_windows, spans, window

CPU = torch.device("cpu")
SMALL = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1}


def trained(config: ModelConfig) -> MEASNet:
    """Weights and running statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    model = MEASNet(config)
    model(torch.rand(2, 3, 64, 64))
    return model.eval()


def store(folder: Path, in_ram: int) -> Store:
    return Store(CPU, on_device=0, in_ram=in_ram, folder=folder)


def check(model: MEASNet, image: Tensor, tiled: Tensor) -> None:
    """Equal within 1e-5 of the range, except where two experts are equally probable for a pixel.

    There rounding decides which of them is used, also between two devices.
    """
    whole = restore(model, image)
    error = (whole - tiled).abs().amax(0)
    assert error.shape == image.shape[-2:]
    assert (error > 1e-5).double().mean() < 1e-3
    assert error.max() < 1e-2


@pytest.mark.parametrize("name", ABLATION)
@pytest.mark.parametrize("in_ram", [10**9, 0])
def test_all_networks_at_odd_sizes(name: str, in_ram: int, tmp_path: Path) -> None:
    """In RAM and in files; `picture-experts` and others have parts switched off."""
    model = trained(replace_dotted(ABLATION[name](), SMALL))
    for height, width in ((75, 131), (16, 50), (9, 7)):
        image = torch.rand(3, height, width)
        used = store(tmp_path, in_ram)
        done: list[float] = []
        with torch.no_grad():
            tiled = restore_in_windows(model, image, side=32, store=used, progress=done.append)
            expected = model(image[None]).routing
        check(model, image, tiled.image)
        assert tiled.routing.keys() == expected.keys()
        for library, shares in tiled.routing.items():
            torch.testing.assert_close(shares, expected[library], rtol=0, atol=1e-3)
        assert done == sorted(done) and done[-1] == pytest.approx(1)
        assert (used.in_files > 0) == (in_ram == 0)
    assert not list(tmp_path.iterdir())


def test_no_seams_at_256_pixels_in_a_photo(real_pictures: Path) -> None:
    path = sorted((real_pictures / "denoise").rglob("*.jpg"))[0]
    with Image.open(path) as photo:
        pixels = np.asarray(photo.convert("RGB"))[:301, :473]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    model = trained(configs.tiny())
    check(model, image, restore(model, image, tile=256))


def test_routing_options_work_in_tiles() -> None:
    changes = {"routing.renormalise": True, "routing.temperature": 0.5}
    model = trained(replace_dotted(configs.tiny(), {**SMALL, **changes}))
    image = torch.rand(3, 70, 90)
    check(model, image, restore(model, image, tile=32))


def test_the_official_variant_has_no_exact_tiles(tmp_path: Path) -> None:
    model = MEASNet(replace_dotted(configs.tiny(), {"variant": "official"})).eval()
    with pytest.raises(ValueError, match="official"):
        restore_in_windows(model, torch.rand(3, 64, 64), side=32, store=store(tmp_path, 0))


# --- Sums over a picture that is seen in parts ---


def test_a_block_gets_its_sums_one_by_one() -> None:
    x = torch.rand(1, 6, 4, 3)
    totals, outs, runs = Totals(), [], 0
    complete = False
    while not complete:
        runs += 1
        for top, bottom in spans(6, 2):
            start = max(0, top - 1)
            try:
                with totals.part(slice(top - start, bottom - start), slice(0, 4)):
                    mean = pixel_mean(x[:, start : min(6, bottom + 1)])
                    (count,) = total(torch.ones(()))
                    outs.append((mean, count))
            except Incomplete:
                continue
        complete = totals.complete()
    assert runs == 3 and len(outs) == 3
    for mean, count in outs:
        torch.testing.assert_close(mean, x.mean((1, 2)))
        assert count == 3
    torch.testing.assert_close(pixel_mean(x), x.mean((1, 2)))  # outside of parts


@pytest.mark.parametrize(
    ("width", "pixels", "multiple", "expected"),
    [
        (6000, 256 * 256, 8, (40, 1632)),  # wide: low windows, so that a strip stays small
        (500, 256 * 256, 8, (256, 256)),
        (100, 256 * 256, 8, (256, 100)),
        (6000, 256 * 256, 9, (36, 1818)),
        (10**6, 64, 8, (8, 8)),
    ],
)
def test_windows(width: int, pixels: int, multiple: int, expected: tuple[int, int]) -> None:
    assert window(width, pixels, multiple) == expected


# --- A large photo ---

RESTORE = """
import sys
from measnet.restore import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
sys.exit(code)
"""


def restore_large(height: int, width: int, gigabytes: float, folder: Path) -> int:
    """Restores a picture within a limit; returns the peak of the process in bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(folder / "in.png", compress_level=1)
    trained(configs.tiny()).save_pretrained(folder / "model.safetensors")
    command = [sys.executable, "-c", RESTORE, str(folder / "in.png"), str(folder / "out.png")]
    command += ["--weights", str(folder / "model.safetensors"), "--memory", str(gigabytes)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "out.png") as out:
        assert out.size == (width, height)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Restored whole, this picture would take 1.5 GB more than the program itself."""
    assert restore_large(800, 1200, 0.9, tmp_path) < 0.9e9


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_24_megapixels_in_4_gb(tmp_path: Path) -> None:
    """A photo of 6000×4000 pixels; 10 minutes of two cores."""
    assert restore_large(4000, 6000, 4, tmp_path) < 4e9
