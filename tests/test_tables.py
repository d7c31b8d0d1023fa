"""Sets of pictures given by name, results beside the field's, several methods side by side."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from distributed import baselines, compare, sources, tables
from distributed.evaluate import evaluate, main
from distributed.published import TABLES
from distributed.scores import EvaluationReport, Held, Score
from measnet.config import tiny
from measnet.metrics import FIELD
from measnet.network import MEASNet
from measnet.tiling import Tiling
from shards.packing import pack


def score(degradation: str, task: str, restored: float, position: int = 0) -> Score:
    """A made-up score with this PSNR."""
    return Score(
        *(position, degradation, task, f"{position}.png", 8, 8, 0, 0),
        *(20.0, restored, 0.5, 0.9, 20.0, restored, 0.5, 0.9, 1.0, {}),
    )


def report(*scores: Score, **held: Held) -> EvaluationReport:
    return EvaluationReport("sets/test", FIELD, list(scores), held)


# --- Sources ---


def test_a_raw_folder_is_named_with_its_layout() -> None:
    assert sources.parse("cbsd68=/data/CBSD68") == sources.Source(
        "cbsd68", "/data/CBSD68", "cbsd68"
    )
    assert sources.parse("data/shards/test/") == sources.Source("test", "data/shards/test/")
    assert sources.parse("s3://bucket/a=b").layout == ""
    sets = ["a/cbsd68", "b/cbsd68", "c/cbsd68-2", "d/cbsd68"]
    names = [one.name for one in sources.parse_all(sets)]
    assert names == ["cbsd68", "cbsd68-2", "cbsd68-2-2", "cbsd68-3"]
    names = [one.name for one in sources.parse_all(["a/test", "b/test", "c/other"])]
    assert names == ["test", "test-2", "other"]


@pytest.mark.parametrize(
    ("given", "words"), [("cbsd=/x", "did you mean cbsd68"), ("paired=/x", "--task TASK")]
)
def test_a_wrong_layout_says_what_to_do(given: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sources.parse(given)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for name, picture in (("chelsea", data.chelsea()), ("coffee", data.coffee())):
        Image.fromarray(picture[100:140, 150:200]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def model() -> MEASNet:
    torch.manual_seed(0)
    return MEASNet(tiny()).eval()


def test_a_raw_folder_gives_the_figures_of_packed_shards(
    raw: Path, model: MEASNet, tmp_path: Path
) -> None:
    pack("clean", str(raw), str(tmp_path / "shards"), workers=1)
    whole = Tiling(10**9)
    expected = evaluate(model, str(tmp_path / "shards"), None, tiling=whole)
    with sources.packed(sources.parse(f"clean={raw}")) as uri:
        found = evaluate(model, uri, None, tiling=whole)
    assert not Path(uri).exists()

    def without_time(one: EvaluationReport) -> list[Score]:
        return [s._replace(seconds=0.0) for s in one.scores]

    assert without_time(found) == without_time(expected)


def test_the_command_takes_several_sets_and_methods(
    raw: Path, model: MEASNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / f"{name}.safetensors")
    pack("clean", str(raw), str(tmp_path / "lowlight"), synthesise=["lowlight"], workers=1)
    given = [str(tmp_path / "first.safetensors"), f"clean={raw}", str(tmp_path / "lowlight")]
    others = ["--compare", str(tmp_path / "second.safetensors"), "--compare", "gamma"]
    out = ["--limit", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*given, *others, *out]) == 0
    said = capsys.readouterr().out
    assert "paired difference" in said and "tables.md" in said
    for name in ("clean", "lowlight"):
        assert (tmp_path / "out" / name / "pictures.csv").is_file()
    found = json.loads((tmp_path / "out" / "lowlight" / "compare.json").read_text())
    methods = found["methods"]
    assert list(methods) == ["first.safetensors", str(tmp_path / "second.safetensors"), "gamma"]
    same = methods[str(tmp_path / "second.safetensors")]["less first.safetensors"]["all"]
    assert same["mean"] == 0 and same["better"] == 0
    gamma = methods["gamma"]
    assert gamma["psnr"]["lowlight"] > methods["first.safetensors"]["psnr"]["lowlight"]
    assert gamma["degradations"]["lowlight"] == gamma["psnr"]["lowlight"]
    text = (tmp_path / "out" / "tables.md").read_text()
    assert FIELD.digest in text and "MEASNet (paper)" in text


def test_an_unknown_method_is_refused_before_anything_is_restored(
    raw: Path, model: MEASNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model.safetensors")
    given = [str(tmp_path / "model.safetensors"), f"clean={raw}", "--compare", "nothing"]
    assert main(given) == 2
    assert "nothing" in capsys.readouterr().err


# --- Tables ---


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_published_averages_are_near_the_mean_of_their_columns(table) -> None:  # type: ignore[no-untyped-def]
    assert len({row.method for row in table.rows}) == len(table.rows)
    for row in table.rows:
        assert row.source and len(row.psnr) in (0, len(table.columns))
        if row.psnr:
            assert row.average == pytest.approx(np.mean(row.psnr), abs=0.06), row.method


def test_our_row_is_beside_the_papers() -> None:
    own = report(score("derain", "derain", 38.5), derain=Held(packed=3, benchmark=100))
    haze = report(score("dehaze", "dehaze", 31.25), dehaze=Held(packed=1, benchmark=1))
    text = tables.markdown("mine", [own, haze])
    assert "| **mine** |  | **31.25** | **38.50** | **–** | **–** | **–** | **–** |  |" in text
    paper = "| MEASNet (paper) | 31M | 31.61 | 39.00 | 34.12 | 31.46 | 28.19 | 32.85 | the paper |"
    assert paper in text
    assert "| DACG-IR | 30.9M | – | – | – | – | – | 33.02 | DACG-IR's figure |" in text
    assert "sample, not comparable with whole benchmarks: Rain100L 1 of 100 pictures" in text
    latex = tables.latex("mine_1", [own, haze])
    assert r"mine\_1 &  & 31.25 & 38.50 & -- &" in latex and r"$\sigma$ = 15" in latex
    assert latex.count(r"\begin{tabular}{llrrrrrrl}") == 2


def test_an_average_needs_all_columns() -> None:
    five = ("dehaze", "derain", "denoise_25", "deblur", "lowlight")
    tasks = {"denoise_25": "denoise"}
    own = report(*(score(name, tasks.get(name, name), 30.0 + at) for at, name in enumerate(five)))
    assert "| **32.00** |" in tables.markdown("mine", [own])


def test_a_single_task_has_its_own_table_without_figures_of_the_paper() -> None:
    noise = report(*(score(f"denoise_{sigma}", "denoise", 30.0, sigma) for sigma in (15, 25)))
    found = tables.sheets("mine", [dataclasses.replace(noise, data="cbsd68")])
    (sheet,) = (one for one in found if one.title.startswith("Tables III to V"))
    assert sheet.title == "Tables III to V, one task: denoising, cbsd68"
    assert sheet.headings == ["method", "σ = 15", "σ = 25", "σ = 50", "source"]
    assert sheet.own == ["mine", "30.00 / 0.9000", "30.00 / 0.9000", "–", ""]
    assert sheet.others[0] == ["input", "20.00 / 0.5000", "20.00 / 0.5000", "–", ""]
    assert ["CBM3D", "–", "30.71", "–", "MDIRNet's README"] in sheet.others
    assert "not included" in sheet.notes[0]
    assert all(len(row) == len(sheet.headings) for row in (*sheet.others, sheet.own))
    kodak = tables.sheets("mine", [dataclasses.replace(noise, data="kodak24")])
    assert len(kodak[-1].others) == 1  # figures of CBSD68 are not beside another set


# --- Several methods ---


def test_differences_are_paired() -> None:
    first = report(*(score("derain", "derain", 30.0 + at, at) for at in range(3)))
    second = report(
        *(score("derain", "derain", 30.0 + at + gain, at) for at, gain in enumerate([1, 2, 3]))
    )
    found = compare.difference(second, first)
    assert found.mean == pytest.approx(2) and found.error == pytest.approx(1 / math.sqrt(3))
    assert (found.better, found.pictures) == (3, 3)
    other = report(score("derain", "derain", 30.0, 7))
    with pytest.raises(ValueError, match="not of the same pictures"):
        compare.difference(first, other)


def test_one_picture_has_no_error() -> None:
    assert math.isnan(
        compare.difference(
            report(score("derain", "derain", 1.0)), report(score("derain", "derain", 1.0))
        ).error
    )


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_classical_methods_help_their_task_and_leave_the_others(
    name: str, worse: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> None:
    task = baselines.BASELINES[name].task
    if name == "cbm3d":
        pytest.importorskip("bm3d")
    degraded, clean = worse(task)
    degradation = "denoise_25" if task == "denoise" else task
    restored = baselines.apply(name, degradation, degraded)
    before, after = (np.square(one - clean).mean() for one in (degraded, restored))
    assert after < before
    other = "derain"
    assert baselines.apply(name, other, degraded) is degraded


@pytest.fixture(scope="module")
def worse() -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """A photograph degraded for a task, and the clean one."""
    from shards import degrade

    clean = data.coffee()[100:228, 200:328]
    rng = degrade.generator("test")

    def make(task: str) -> tuple[np.ndarray, np.ndarray]:
        if task == "denoise":
            degraded = degrade.noise(clean, 25.0, rng)
        elif task == "deblur":
            from scipy.ndimage import gaussian_filter

            degraded = gaussian_filter(clean.astype(float), (1.5, 1.5, 0))
        else:
            degraded, _ = degrade.synthesise(clean, (task,), rng)
        return degraded / 255.0, clean / 255.0

    return make


def test_the_difference_under_mean_is_that_of_the_means() -> None:
    apart = [compare.Difference(0.1, 0.03, 80, 100), compare.Difference(-0.5, 0.04, 1, 5)]
    found = compare.over_tasks(apart)
    assert found.mean == pytest.approx(-0.2) and found.error == pytest.approx(0.025)
    assert (found.better, found.pictures) == (81, 105)
