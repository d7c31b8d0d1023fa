"""The report of a search, from records with a known answer."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distributed.pages import charts
from measnet.config import to_dict
from tests.browser import Page, browse, needs_chromium
from tune.config import SearchConfig, parse
from tune.record import SearchRecord, TrialRecord
from tune.report import effective_experts, importance, main, page
from tune.sampler import next_changes
from tune.space import Space, build


def searched(
    trials: int = 16, *more: str, cost: str = "parameters"
) -> tuple[SearchRecord, SearchConfig]:
    """A search whose PSNR depends on the pixel experts' N and a little on lambda, and on nothing
    else; every third trial was stopped, the last but one diverged."""
    config = parse(["demo", "--trials", str(trials), "--cost", cost, "--samples", "1600", *more])
    space = build(config.space, config.vary, config.base())
    record = SearchRecord(
        name="known",
        config=to_dict(config),
        command="python -m tune.search demo",
        budget=config.budget,
        cost=cost,
        state="finished",
    )
    for number in range(len(space.points) or trials):
        changes = next_changes(space, record.trials, config)
        record.trials.append(trial(number, changes, config, space))
    record.rank()
    return record, config


def trial(number: int, changes: dict, config: SearchConfig, space: Space) -> TrialRecord:
    stopped = number % 3 == 2 and not space.points
    n = changes.get("model.pixel_experts", number)
    weight = changes.get("recipe.balance_weight", 1e-4)
    final = 24 + 0.3 * n - 0.05 * abs(math.log10(weight) + 4)
    steps = range(1, 4 if stopped else 10)
    curve = [(s * config.interval, final - 3 * math.exp(-s / 2)) for s in steps]
    if not stopped:
        curve[-1] = (config.budget, curve[-1][1])
    row = TrialRecord(
        number=number,
        name=f"known-{number:03d}",
        changes=changes,
        label=space.points[number].label if space.points else "",
        state="stopped" if stopped else "finished",
        reason="ASHA: not among the best 1/3" if stopped else "",
        curve=curve,
        samples=curve[-1][0],
        psnr=curve[-1][1],
        input_psnr=20.0,
        gain_error=0.4,
        tasks={"denoise": curve[-1][1] + 2, "derain": curve[-1][1] - 2},
        costs={"parameters": 1e5 * n * changes.get("model.dim", 16), "multiply_adds": 1.9e9 + n},
        routing={
            task: {"encoder1": [2 / n] * n, "decoder1.low": [1.0, 0.6, 0.4]}
            for task in ("denoise", "derain")
        }
        if n
        else {},
        seconds=30.0,
    )
    if number == config.trials - 2 and not space.points:
        row.state, row.reason, row.psnr = "failed", "diverged: PSNR is nan <at> 200 samples", None
    return row


class Tags(HTMLParser):
    """Checks that what is opened is closed, and collects what could load something."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


@pytest.mark.parametrize("more", [(), ("--space", "ablation"), ("--space", "tasks")])
def test_the_page_is_complete_and_loads_nothing(more: tuple[str, ...]) -> None:
    record, _ = searched(16, *more)
    text = page(record)
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    assert "url(http" not in text and "@import" not in text
    assert ("every row trained to the end" in text) == bool(more)
    for row in record.trials:
        assert f"<td>{row.number}" in text


def test_the_table_is_sorted_and_reasons_are_shown() -> None:
    record, _ = searched()
    text = page(record)
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    states = re.findall(r'<tr class="(\w+)', body)
    assert states == sorted(states, key=["finished", "stopped", "failed"].index)
    psnrs = [float(v) for v in re.findall(r'class="finished.*?<b>([\d.]+)</b>', body)]
    assert psnrs == sorted(psnrs, reverse=True)
    assert "trial 14: diverged: PSNR is nan &lt;at&gt; 200 samples" in text
    assert 'class="badge paper"' in body and 'class="badge best"' in body


def test_importance_finds_the_parameter_that_matters() -> None:
    record, config = searched(60)
    space = build(config.space, config.vary, config.base())
    shares = importance(record, space)
    assert max(shares, key=lambda f: shares[f]) == "model.pixel_experts"
    assert shares["model.pixel_experts"] > 0.6
    assert "more is better" in page(record)


@pytest.mark.parametrize(
    ("trials", "more"),
    [
        (1, ()),
        (3, ("--space", "--vary", "recipe.optimizer=adam,muon")),
        (3, ("--space", "--vary", "model.mee=true,false", "--vary", "recipe.lr=log 1e-4..1e-2")),
        (4, ("--space", "width")),
    ],
)
def test_few_trials_of_any_kind_of_value_have_a_page(trials: int, more: tuple[str, ...]) -> None:
    record, _ = searched(trials, *more)
    assert "Trials" in page(record)
    for entry in record.trials:  # nothing varies
        entry.changes, entry.psnr = record.trials[0].changes, 25.0
    assert "Trials" in page(record)


def test_an_empty_search_has_a_page() -> None:
    record, _ = searched(4)
    record.trials = []
    record.rank()
    assert "No trial has run to its end yet" in page(record)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, _ = searched()
    record.folder = str(tmp_path)
    record.save()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no search.json" in capsys.readouterr().err


def test_a_gain_within_noise_causes_a_warning() -> None:
    record, _ = searched()
    assert "gain of +" in page(record) and "above noise" not in page(record)
    best = record.best
    assert best is not None and best.psnr is not None
    best.input_psnr = best.psnr - 0.02
    assert "gains +0.02 dB over the degraded pictures" in page(record)
    assert "not above noise (±0.80 dB)" in page(record)


@pytest.mark.parametrize(
    ("psnr", "before", "error", "expected"),
    [
        (15.29, 15.27, 0.05, (0.02, False)),
        (25.0, 15.0, 2.0, (10.0, True)),
        (25.0, 15.0, None, (10.0, False)),  # one picture has no spread
        (None, 15.0, 0.1, None),
    ],
)
def test_noise_is_twice_the_standard_error(
    psnr: float | None, before: float, error: float | None, expected: tuple[float, bool] | None
) -> None:
    trial = TrialRecord(
        number=0, name="0", changes={}, psnr=psnr, input_psnr=before, gain_error=error
    )
    found = trial.gain()
    assert found == (None if expected is None else (pytest.approx(expected[0]), expected[1]))


def test_idle_experts_are_judged_only_after_training_at_full_length() -> None:
    record, config = searched()
    assert "N can be smaller" not in page(record)
    record.budget = config.train.recipe.samples
    assert "N can be smaller" in page(record)


def test_curves_have_axis_titles_and_a_legend() -> None:
    text = page(searched()[0])
    assert "training samples" in text and "validation PSNR (dB)" in text
    for label in ("stopped here", "the paper’s point", "the best"):
        assert label in text


def test_effective_experts_and_the_worth_of_the_choice_have_columns() -> None:
    record, _ = searched()
    head = page(record).partition("</thead>")[0]
    assert "effective experts" in head and "worth of the choice" not in head
    best = record.best
    assert best is not None
    best.choice_worth = -0.03
    best.routing = {"derain": {"encoder1": [1.0, 1.0, 0.0], "decoder1.low": [1.0, 0.0]}}
    assert effective_experts(best) == pytest.approx(2)
    text = page(record)
    assert "worth of the choice" in text and "<td>-0.03</td>" in text
    for trial in record.trials:
        trial.routing = {}
    assert '<th scope="col">effective experts' not in page(record)


@pytest.mark.parametrize(
    "places",
    [
        [(0.0, 0.0)],
        [(0.0, 0.0), (5.0, 0.0)],
        [(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)],
        [(10.0 * n, 7.0 * n) for n in range(9)],
        [(0.0, 4.0 * n) for n in range(6)],
    ],
)
def test_labels_cover_neither_points_nor_labels(places: list[tuple[float, float]]) -> None:
    widths = [11.0] * len(places)
    offsets = charts.free_offsets(places, widths)
    boxes = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(places, offsets, strict=True)]
    for number, (left, middle) in enumerate(boxes):
        for other, height in boxes[:number]:
            assert abs(left - other) >= 11 or abs(middle - height) >= charts.LINE
        for x, y in places:
            beside = x + charts.MARK <= left or left + 11 <= x - charts.MARK
            assert beside or abs(middle - y) >= charts.MARK + charts.LINE / 2


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_the_screen(tmp_path: Path, width: int) -> None:
    more = ("--vary", "recipe.lr=log 1e-4..1e-2", "--vary", "model.prompts=2..8")
    record, _ = searched(12, *more, cost="latency")
    for entry in record.trials:
        entry.tasks = dict.fromkeys(("denoise", "derain", "dehaze", "deblur", "lowlight"), 25.123)
        entry.choice_worth, entry.costs["latency"] = 0.12, 12.34
    path = tmp_path / "page.html"
    path.write_text(page(record))
    scrolls = "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    first = "document.querySelector('table.sort')"

    async def visit(shown: Page) -> None:
        await shown.open(path.as_uri(), width)
        assert await shown.sideways() == 0
        if width == 1200:
            assert set(await shown.evaluate(scrolls)) == {0}
        await shown.evaluate(f"{first}.querySelector('th button').click()")
        numbers = await shown.evaluate(
            f"[...{first}.tBodies[0].rows].map(r => parseInt(r.cells[0].textContent))"
        )
        assert numbers == sorted(numbers)
        assert not shown.problems and not shown.requests

    browse(visit)
