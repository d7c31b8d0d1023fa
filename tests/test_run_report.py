"""The report of runs: what it reads, what it shows, and the page in a browser."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from distributed import mlflow_tracker
from distributed.checkpoint import RunState, Snapshot
from distributed.config import TrackingConfig, TrainConfig
from distributed.evaluate import evaluate
from distributed.pages import views
from distributed.pages.render import differences
from distributed.pages.runs import curves, hours, thinned
from distributed.presets import demo
from distributed.report import main
from measnet.config import replace_dotted, to_dict
from measnet.network import MEASNet
from measnet.routing import record
from tests.browser import Page, browse, needs_chromium
from tests.test_report import Tags

LOADABLE = ("#", "data:image/webp;base64,", "data:image/png;base64,", "data:,")


def write_run(folder: Path, config: TrainConfig, seed: int, *, validated: bool = True) -> None:
    """A run with a checkpoint, curves and its hardware, as training leaves them."""
    torch.manual_seed(seed)
    model = MEASNet(config.model).eval()
    report = {}
    if validated:
        scores = evaluate(model, config.data.validation, None, limit=1).as_dict()
        report = {"at": 800, "psnr": 20.0, "report": scores}
    state = RunState(
        samples=800,
        updates=100,
        config=to_dict(config),
        data="0123456789abcdef",
        plan={},
        validation=report,
        finished=True,
    )
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    Snapshot(state, tensors, tensors, {}).write(str(folder))
    lines = [
        {
            "time": 0,
            "step": step,
            "metrics": {
                "train/l1": 1 / step,
                "speed/samples_per_s": 2.0,
                "val_psnr/derain": 20.0 + step / 400,
                "val_psnr/mean": 19.0 + step / 400,
                "system/memory": 1.0,
            },
        }
        for step in (80, 400, 800)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    workers = [{"ranks": [0, 1], "hosts": ["one"], "device": "cuda", "card": "a card"}]
    (folder / "environment.json").write_text(json.dumps({"workers": workers}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> list[Path]:
    """A run, and one of another learning rate that was not validated."""
    root = tmp_path_factory.mktemp("runs")
    base = replace_dotted(demo(), {"data.validation": str(packed / "test")})
    changes = [{"name": "one"}, {"name": "two", "recipe.lr": 1e-4}]
    for seed, change in enumerate(changes):
        config = replace_dotted(base, change)
        write_run(root / config.name, config, seed, validated=config.name == "one")
    return [root / str(change["name"]) for change in changes]


@pytest.fixture(scope="module")
def single(runs: list[Path]) -> Path:
    path = runs[0] / "report.html"
    assert main([str(runs[0]), "--pictures", "1", "--price", "2", "--no-mlflow"]) == 0
    return path


@pytest.fixture(scope="module")
def several(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "sub" / "several.html"
    folders = [str(run) for run in runs]
    assert main([*folders, "--pictures", "1", "--out", str(path), "--no-mlflow"]) == 0
    return path


# --- What is read and computed ---


def test_curves_are_those_of_the_run_without_the_machine_s_load() -> None:
    records = [
        {"step": 8, "metrics": {"train/l1": 0.5, "system/load": 1.0}},
        {"step": 16, "metrics": {"train/l1": 0.4, "val_psnr/mean": float("nan")}},
    ]
    assert curves(records) == {"train/l1": [(8, 0.5), (16, 0.4)]}
    assert curves([]) == {}


@pytest.mark.parametrize(
    ("points", "most", "expected"),
    [
        ([], 2, []),
        ([(1, 1.0), (2, 3.0)], 2, [(1, 1.0), (2, 3.0)]),
        ([(1, 1.0), (2, 3.0), (3, 5.0)], 2, [(2, 2.0), (3, 5.0)]),
    ],
)
def test_long_curves_are_averaged(points: list, most: int, expected: list) -> None:
    assert thinned(points, most) == expected


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([], None), ([(3600, 1.0)], 1.0), ([(3600, 1.0), (7200, 2.0)], 1.5), ([(8, 0.0)], 0.0)],
)
def test_hours_are_the_sum_over_the_curve(rates: list, expected: float | None) -> None:
    assert hours(rates) == expected


def test_differences_of_configurations() -> None:
    configs = {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 1, "y": {"z": 3, "new": 4}}}
    assert differences(configs) == [("y.z", [2, 3]), ("y.new", [None, 4])]
    assert differences({"a": configs["a"]}) == []


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 120, views.Window(0, 0, 100, 120)),
        (512, 512, views.Window(104, 56, 304, 400)),
        (305, 1000, views.Window(0, 296, 304, 400)),
    ],
)
def test_the_shown_part_fits_the_pixels_of_all_levels(
    height: int, width: int, expected: views.Window
) -> None:
    window = views.centre(height, width, 400, 304)
    assert window == expected
    assert window.top % 8 == window.left % 8 == 0
    assert window.top + window.height <= height and window.left + window.width <= width


def test_a_map_shows_the_expert_that_each_pixel_chose() -> None:
    torch.manual_seed(1)
    model = MEASNet(demo().model).eval()
    image = torch.rand(1, 3, 80, 96)
    with torch.no_grad(), views.looking(model) as look:
        model(image)
    with torch.no_grad(), record(model) as choices:
        model(image)
    maps = views.expert_maps(look.choices, views.Window(16, 8, 48, 64))
    assert list(maps) == ["encoder1", "encoder2", "encoder3"]
    for level, (name, image_) in enumerate(maps.items()):
        scale = 2**level
        own = choices[name].chosen[0, 16 // scale : 64 // scale, 8 // scale : 72 // scale, 0]
        assert np.array_equal(np.asarray(image_), own.numpy())
    assert look.prompt is not None and look.bands is not None
    assert float(look.prompt.sum()) == pytest.approx(1)
    assert 0 < views.high_share(look.bands) < 1
    model(image)
    assert not model.prompt.reader._forward_hooks, "hooks stay"  # type: ignore[union-attr]


def test_the_high_share_is_that_of_the_energy() -> None:
    low, high = torch.zeros(2, 2, 1), torch.zeros(2, 2, 1)
    low[0], low[1] = 3.0, -3.0
    high[:, 0], high[:, 1] = 6.0, 4.0  # the mean of a channel does not count
    assert views.high_share((low, high)) == pytest.approx(1 / 10)
    assert views.high_share((torch.zeros(2, 2, 1), torch.ones(2, 2, 1))) == 0


def test_principal_axes_are_those_of_scikit_learn() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 5)) * [5, 3, 1, 1, 1]
    points, shares = views.principal_axes(rows)
    other = PCA(2).fit(rows)
    assert np.allclose(np.abs(points), np.abs(other.transform(rows)))
    assert shares == pytest.approx(tuple(other.explained_variance_ratio_))
    points, shares = views.principal_axes(np.ones((4, 3)))
    assert not points.any() and shares == (0, 0)


# --- The command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of at least one run"),
        (["RUN", "RUN"], "is given twice; give each run once"),
        (["nowhere"], "nowhere holds no complete checkpoint; give the folder of a run"),
        (["RUN", "--pictures", "-1"], "--pictures is -1, but must be 0 or more"),
        (["RUN", "--price", "-1"], "--price is -1.0, but must be 0 or more"),
        (["RUN", "--out", "FOLDER"], "is a folder; give a file such as report.html"),
        (["s3://bucket/run"], "is not a local folder; name the page with --out"),
        (["RUN", "--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_give_one_clear_line(
    arguments: list[str],
    message: str,
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": str(runs[0]), "FOLDER": str(tmp_path)}
    assert main([places.get(one, one) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_page_is_complete_and_loads_nothing(single: Path, several: Path) -> None:
    for path in (single, several):
        text = path.read_text()
        tags = Tags()
        tags.feed(text)
        assert not tags.open
        assert all(link.startswith(LOADABLE) for link in tags.links)
        assert not re.search(r"url\(['\"]?http|@import", text)
        assert path.stat().st_size < 3 * 2**20


def test_figures_are_those_of_the_validation(single: Path, runs: list[Path]) -> None:
    (state,) = (runs[0] / "checkpoints").glob("*/state.json")
    report = json.loads(state.read_text())["validation"]["report"]
    text = single.read_text()
    for row in [*report["degradations"].values(), report["mean"]]:
        cells = f"<td>{row['input_psnr']:.2f}</td><td><b>{row['restored_psnr']:.2f}</b></td>"
        assert cells in text
    for library, own in report["routing_measures"].items():
        assert f"<caption>{library}<small>{own['effective_experts']:.2f} effective" in text
    for distance in report["routing_measures"]["encoder1"]["similarity"].values():
        assert 0 <= distance <= 1
    assert "validation after 800 samples" in text
    for fact in ("2 × a card", "0.11", "0.22", "0.44"):  # hours, hours of both cards, price
        assert f"<dd>{fact}</dd>" in text


def test_several_runs_stand_side_by_side(several: Path) -> None:
    text = several.read_text()
    assert '<td class="left">recipe.lr</td><td>0.003</td><td>0.0001</td>' in text
    assert "pictures, restored for this page" in text, "two has no validation of its own"
    assert text.count(">two</option>") == 14, "the restoration of each run can be chosen"
    assert "one from 20.2 to 22; two from 20.2 to 22" in text


def test_without_pictures_the_network_does_not_run(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main([str(runs[1]), "--pictures", "0", "--out", str(path), "--no-mlflow"]) == 0
    assert "No pictures were restored" in path.read_text()


def test_the_page_is_an_artifact_of_the_run_in_mlflow(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracked = mlflow_tracker.prepare(tracking, name="tracked", key="1" * 32)
    (state,) = (runs[1] / "checkpoints").glob("*/state.json")
    config = json.loads(state.read_text())["config"]
    config["tracking"]["uri"] = tracking.uri
    tensors = MEASNet(demo().model).state_dict()
    newer = RunState(
        samples=808, updates=101, config=config, data="", plan={}, mlflow_run_id=tracked.id
    )
    Snapshot(newer, tensors, tensors, {}).write(str(tmp_path / "run"))
    command = [str(tmp_path / "run"), "--pictures", "0"]
    assert main(command) == 0
    names = [
        one.path for one in mlflow_tracker.client_of(tracked).list_artifacts(tracked.id, "report")
    ]
    assert names == ["report/report.html"]
    assert "MLflow: report/report.html" in capsys.readouterr().out
    (tmp_path / "mlflow.db").unlink()
    assert main(command) == 0
    assert "is not on this machine" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


# --- In a browser ---

SLIDER = "document.querySelector('.compare input')"
EDGE = "getComputedStyle(document.querySelector('.compare .left')).clipPath"
CHARTS = """[...document.querySelectorAll('.charts svg')].map(svg => {
    const lines = [...svg.querySelectorAll('path[style*="stroke: #1f77b4"]')];
    return [svg.getAttribute('aria-label'), Math.max(0, ...lines.map(p => p.getTotalLength()))];
})"""
"""Name of each chart, and the length of its first line in the units of the chart."""
UNNAMED = """[...document.querySelectorAll('img, svg, input, select')].filter(element =>
    !element.alt && !element.labels?.length && !element.getAttribute('aria-label')
).map(element => element.outerHTML.slice(0, 80))"""
LOADED = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"


def visit_of(path: Path, check: Callable[[Page], object]) -> Page:
    async def visit(page: Page) -> None:
        await check(page)  # type: ignore[misc]
        assert not page.problems and not page.requests

    return browse(visit)


@needs_chromium
def test_the_page_works_in_a_browser(single: Path) -> None:
    async def check(page: Page) -> None:
        await page.open(single.resolve().as_uri())
        assert await page.evaluate(LOADED)
        assert await page.evaluate(UNNAMED) == []
        charts = await page.evaluate(CHARTS)
        assert len(charts) == 3
        for label, longest in charts:
            assert "over training samples" in label and longest > 50
        assert await page.evaluate(EDGE) == "inset(0px 50% 0px 0px)"
        await page.evaluate(f"{SLIDER}.focus()")
        for _ in range(5):
            await page.press("ArrowRight", 39)
        assert await page.evaluate(f"{SLIDER}.value") == "55"
        assert await page.evaluate(EDGE) == "inset(0px 45% 0px 0px)"
        box = await page.evaluate(
            "(b => [b.x, b.y, b.width])(document.querySelector('.compare .stack')"
            ".getBoundingClientRect())"
        )
        at = {"x": box[0] + box[2] / 4, "y": box[1] + 10, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await page.call("Input.dispatchMouseEvent", type=kind, **at)
        assert await page.evaluate(f"{SLIDER}.value") == "25"
        right = "document.querySelector('[data-side$=right]')"
        await page.evaluate(
            f"{right}.selectedIndex = 1, {right}.dispatchEvent(new Event('change'))"
        )
        assert (await page.evaluate("document.querySelector('.compare .base').alt")).endswith(
            "clean"
        )

    visit_of(single, check)


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_scrolls_sideways(single: Path, several: Path, width: int) -> None:
    async def check(page: Page) -> None:
        for path in (single, several):
            await page.open(path.resolve().as_uri(), width)
            assert await page.sideways() == 0

    visit_of(single, check)


@needs_chromium
def test_dark_mode_is_dark(single: Path) -> None:
    ink = "getComputedStyle(document.querySelector('.charts text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"

    async def check(page: Page) -> None:
        shown = []
        for dark in (False, True):
            await page.open(single.resolve().as_uri(), dark=dark)
            shown += [[_light(await page.evaluate(one)) for one in (ground, ink)]]
        (ground_light, ink_light), (ground_dark, ink_dark) = shown
        assert ground_light > 0.9 and ink_light < 0.3
        assert ground_dark < 0.2 and ink_dark > 0.7

    visit_of(single, check)


def _light(colour: str) -> float:
    return sum(int(value) for value in re.findall(r"\d+", colour)[:3]) / 765
