from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from distributed import figures
from distributed.figures import GridRow
from measnet.metrics import FIELD


def row(height: int, width: int) -> GridRow:
    clean = np.zeros((height, width, 3))
    clean[..., 0] = 1.0
    return GridRow("derain   a.png", clean * 0.5, clean * 2, clean, 20.0, 30.0)


def test_panel_holds_the_pixels_themselves() -> None:
    panel = np.asarray(figures.panel(row(200, 300)))
    middle = panel[30 + 100]
    reds = [tuple(middle[8 + at * 308 + 150]) for at in range(3)]
    assert reds == [(128, 0, 0), (255, 0, 0), (255, 0, 0)]  # restored was out of range: clipped


def test_large_pictures_are_scaled_down() -> None:
    panel = figures.panel(row(1000, 2000), widest=500)
    assert panel.width == 8 + 3 * 508 and panel.height == 30 + 250 + 26


def test_grid_stacks_panels(tmp_path: Path) -> None:
    panels = [figures.panel(row(64, 256)), figures.panel(row(32, 40))]
    heights = []
    for footer in ("", "protocol", "protocol " * 100):
        figures.grid(panels, tmp_path / "deep" / "grid.png", footer=footer)
        with Image.open(tmp_path / "deep" / "grid.png") as sheet:
            assert sheet.width == panels[0].width
            heights.append(sheet.height)
    line = heights[1] - heights[0]
    assert line > 0 and heights[0] > panels[0].height + panels[1].height
    lines, rest = divmod(heights[2] - heights[0], line)
    assert lines > 3 and not rest
    with pytest.raises(ValueError, match="at least one picture"):
        figures.grid([], tmp_path / "none.png")


@pytest.mark.parametrize("width", [60, 200, 736])
def test_a_footer_is_never_cut(width: int) -> None:
    font, text = ImageFont.load_default(11), FIELD.describe()
    lines = figures.wrap(text, font, width)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= width or " " not in line for line in lines)
    assert len(lines) > 1 and not figures.wrap("", font, width)


def test_eight_bit_is_rounded_and_clipped() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 3.0])
    assert figures.as_uint8(values).tolist() == [0, 0, 128, 255, 255]


def test_charts_are_written(tmp_path: Path) -> None:
    usage = {
        task: {"encoder1": [0.5, 1.0, 0.5], "decoder1.low": [1.0, 0.0]} for task in ("rain", "haze")
    }
    figures.expert_usage(usage, tmp_path / "experts.png")
    records = [
        {"step": step, "metrics": {"train/loss": 1 / step, "val_psnr/rain": 20.0 + step}}
        for step in (8, 16, 24)
    ]
    figures.curves(records, tmp_path / "curves.png")
    for name in ("experts.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something was drawn
    with pytest.raises(ValueError, match="no expert library"):
        figures.expert_usage({"rain": {}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no metrics"):
        figures.curves([{"step": 1, "metrics": {"system/cpu": 3.0}}], tmp_path / "x.png")
