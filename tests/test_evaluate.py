import csv
import dataclasses
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from distributed import routing
from distributed.evaluate import evaluate, held_by, load, main
from distributed.scores import Elapsed, EvaluationReport, Held, table
from distributed.scoring import ahead, chunks, score
from distributed.scoring_workers import Job, ray_workers, room
from measnet.config import ModelConfig, replace_dotted, tiny
from measnet.metrics import FIELD, Protocol
from measnet.network import MEASNet
from measnet.routing import mean_gates
from measnet.tiling import Tiling
from shards.packing import pack
from shards.storage import finite
from shards.stream import Picture, pictures
from tests.official_reference import Golden

WHOLE = Tiling(at_once=10**9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two photographs of different sizes, no side a multiple of 8; noise and rain."""
    root = tmp_path_factory.mktemp("photographs")
    for name, picture in (("chelsea", data.chelsea()), ("coffee", data.coffee())):
        Image.fromarray(picture[100:175, 150:240]).save(root / f"{name}.png")
    Image.fromarray(data.astronaut()[:66, 180:260]).save(root / "astronaut.png")
    out = root.parent / f"{root.name}-shards"
    pack("clean", str(root), str(out), synthesise=["derain"], workers=1)
    return str(out)


@pytest.fixture(scope="module")
def model() -> MEASNet:
    torch.manual_seed(0)
    return MEASNet(tiny()).eval()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def report(model: MEASNet, shards: str, out: Path) -> EvaluationReport:
    return evaluate(model, shards, out)


def test_scores_are_those_of_scikit_image_on_what_the_network_gives(
    model: MEASNet, shards: str, report: EvaluationReport
) -> None:
    assert [s.degradation for s in report.scores] == [
        f"denoise_{sigma}" for sigma in (15, 25, 50) for _ in range(3)
    ] + ["derain"] * 3
    for picture, result in zip(pictures(shards), report.scores, strict=True):
        with torch.no_grad():
            restored = model(picture.degraded[None]).image[0].clamp(0, 1)
        before, after, clean = (
            p.permute(1, 2, 0).double().numpy() for p in (picture.degraded, restored, picture.clean)
        )
        expected = [
            *(peak_signal_noise_ratio(clean, p, data_range=1) for p in (before, after)),
            *(
                structural_similarity(clean, p, data_range=1, channel_axis=2)
                for p in (before, after)
            ),
        ]
        names = ("input_psnr", "restored_psnr", "input_ssim", "restored_ssim")
        measured = [getattr(result, name) for name in names]
        assert measured == pytest.approx(expected, abs=1e-5)
        assert (result.height, result.width) == clean.shape[:2]


def test_tasks_are_means_of_their_degradations(report: EvaluationReport) -> None:
    noise = [report.degradations[f"denoise_{sigma}"].restored_psnr for sigma in (15, 25, 50)]
    assert report.tasks["denoise"].restored_psnr == pytest.approx(np.mean(noise))
    assert report.tasks["denoise"].pictures == 9 and report.tasks["derain"].pictures == 3
    by_task = [report.tasks[task].input_ssim for task in ("denoise", "derain")]
    assert report.mean.input_ssim == pytest.approx(np.mean(by_task))
    assert report.metrics()["val_psnr/denoise"] == pytest.approx(np.mean(noise))
    scores = {
        f"val_{kind}/{name}" for kind in ("psnr", "ssim") for name in ("denoise", "derain", "mean")
    }
    assert scores < set(report.metrics())


def test_it_repeats(model: MEASNet, shards: str, report: EvaluationReport) -> None:
    again = evaluate(model, shards, None)
    for name in ("input_psnr", "restored_psnr", "input_ssim", "restored_ssim", "routing"):
        assert [getattr(s, name) for s in again.scores] == [getattr(s, name) for s in report.scores]


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_together_give_the_report_of_one(
    model: MEASNet, shards: str, report: EvaluationReport, world: int
) -> None:
    scores = [
        result
        for rank in range(world)
        for result in score(model, pictures(shards, rank=rank, world=world), WHOLE)
    ]
    together = EvaluationReport(shards, FIELD, sorted(scores), held_by(shards), report.elapsed)
    assert figures(together) == figures(report)


def figures(report: EvaluationReport) -> dict[str, Any]:
    """All of a report but its times."""
    scores = [score._replace(seconds=0.0) for score in report.scores]
    return {**report.as_dict(), "time": None, "scores": scores}


def test_pictures_of_one_size_together_give_the_report_of_one_by_one(
    model: MEASNet, shards: str, report: EvaluationReport
) -> None:
    assert {(s.height, s.width) for s in report.scores} == {(75, 90), (66, 80)}
    together = evaluate(model, shards, None, batch=5)
    assert [s.name for s in together.scores] == [s.name for s in report.scores]
    assert together.tiles == report.tiles
    for one, other in zip(together.scores, report.scores, strict=True):
        assert one.restored_psnr == pytest.approx(other.restored_psnr, abs=1e-4)
        assert one.restored_ssim == pytest.approx(other.restored_ssim, abs=1e-6)
        assert one.input_psnr == other.input_psnr
        for name, shares in one.routing.items():
            assert shares == pytest.approx(other.routing[name], abs=1e-3)


@pytest.mark.parametrize(
    ("sizes", "batch", "pixels", "lengths"),
    [
        ([(8, 8)] * 5, 1, 10**6, [1, 1, 1, 1, 1]),
        ([(8, 8)] * 5, 2, 10**6, [2, 2, 1]),
        ([(8, 8), (64, 64), (8, 8), (8, 8)], 4, 256, [1, 1, 2]),
        ([(64, 64), (64, 64)], 4, 0, [1, 1]),
        ([], 4, 256, []),
    ],
)
def test_chunks_are_consecutive_and_bounded_in_pixels(
    sizes: list[tuple[int, int]], batch: int, pixels: int, lengths: list[int]
) -> None:
    source = [
        Picture("derain", "derain", str(at), torch.zeros(3, *size), torch.zeros(3, *size), at)
        for at, size in enumerate(sizes)
    ]
    found = list(chunks(source, batch, pixels))
    assert [len(chunk) for chunk in found] == lengths
    assert [picture.position for chunk in found for picture in chunk] == list(range(len(sizes)))


def test_the_next_item_is_made_while_the_caller_works() -> None:
    made: list[int] = []
    second = threading.Event()

    def source() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    items = ahead(source())
    assert next(items) == 0
    assert second.wait(timeout=10)  # made by now, though it was not asked for
    assert list(items) == [1, 2] and made == [0, 1, 2]


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise ValueError("corrupt sample")

    items = ahead(source())
    assert next(items) == 0
    with pytest.raises(ValueError, match="corrupt sample"):
        next(items)


def test_the_share_of_the_network_is_in_the_summary(out: Path, report: EvaluationReport) -> None:
    time = json.loads((out / "summary.json").read_text())["time"]
    assert time["network_share"] == report.network_share and time["workers"] == 1
    assert 0 < report.network_share <= 1
    assert report.describe().endswith("of it in the network")
    several = dataclasses.replace(report, elapsed=Elapsed(100.0, workers=2))
    spent = sum(score.seconds for score in report.scores)
    assert several.network_share == pytest.approx(spent / 200)
    assert "100.0 s on 2 workers" in several.describe()
    assert math.isnan(dataclasses.replace(report, elapsed=None).network_share)


def test_shares_of_experts(report: EvaluationReport) -> None:
    assert set(report.routing) == {"denoise", "derain"}
    config = tiny()
    for shares in report.routing.values():
        assert {"encoder1", "encoder2", "encoder3", "decoder1.low"} <= set(shares)
        assert len(shares["encoder1"]) == config.pixel_experts
        assert sum(shares["encoder1"]) == pytest.approx(config.pixel_top_k)
        assert sum(shares["decoder1.low"]) == pytest.approx(config.image_top_k)


def test_files_state_the_protocol(out: Path, report: EvaluationReport) -> None:
    with (out / "pictures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["protocol"] for row in rows} == {FIELD.describe()}
    assert float(rows[0]["restored_psnr"]) == pytest.approx(
        report.scores[0].restored_psnr, abs=1e-6
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"]["description"] == FIELD.describe()
    assert summary["tasks"]["derain"]["pictures"] == 3
    grids = {path.name for path in (out / "grids").iterdir()}
    noise = {f"denoise_{sigma}.png" for sigma in (15, 25, 50)}
    assert grids == noise | {"derain.png", "overview.png"}
    with Image.open(out / "experts.png") as image:
        assert image.width > 300


def test_mode_of_the_network_is_left_as_it_was(shards: str) -> None:
    model = MEASNet(tiny()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, shards, None, limit=1)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_experts_has_no_heat_map(shards: str, tmp_path: Path) -> None:
    config = ModelConfig(
        **{**tiny().__dict__, "tspg": False, "mese": False, "fd": False, "mee": False}
    )
    report = evaluate(MEASNet(config), shards, tmp_path, limit=1)
    assert report.routing == {"denoise": {}, "derain": {}}
    assert not (tmp_path / "experts.png").exists()


def test_tiles_give_nearly_the_same_and_are_noted(model: MEASNet, shards: str) -> None:
    whole = evaluate(model, shards, None, limit=1)
    tiled = evaluate(model, shards, None, limit=1, tiling=Tiling(0, tile=48, overlap=16))
    assert [(s.tile, s.overlap) for s in tiled.scores] == [(48, 0)] * 4
    assert whole.tiles == {"whole": 4} and tiled.tiles == {"in exact tiles of 48": 4}
    assert tiled.as_dict()["restored"] == tiled.tiles
    assert tiled.mean.input_psnr == whole.mean.input_psnr
    assert tiled.mean.restored_psnr == pytest.approx(whole.mean.restored_psnr, abs=1e-3)
    shares = tiled.scores[0].routing["encoder1"]
    assert sum(shares) == pytest.approx(tiny().pixel_top_k)


def test_counts_say_what_is_missing(model: MEASNet, shards: str) -> None:
    report = evaluate(model, shards, None, limit=1)
    assert report.count("derain") == "1 of 3"
    assert report.as_dict()["held"]["derain"] == {"packed": 3, "benchmark": 0}
    assert "benchmark" not in report.describe()
    sample = EvaluationReport(shards, FIELD, report.scores, {"derain": Held(1, 100)})
    assert sample.count("derain") == "1"
    assert "derain: the packed set holds 1 of the benchmark's 100 pictures" in sample.describe()
    assert table(sample).caption == sample.describe()


def test_a_part_of_a_benchmark_is_known_from_its_manifest(tmp_path: Path) -> None:
    for number in (1, 2):
        picture = Image.fromarray(data.coffee()[: 20 * number, :30])
        for folder, name in (("input", f"{number}.png"), ("target", f"{number}.png")):
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "raw" / folder / name)
    out = str(tmp_path / "shards")
    pack("rain100l-test", str(tmp_path / "raw"), out, allow_missing=True, workers=1)
    assert held_by(out) == {"derain": Held(2, 100)}


def test_command_line(
    model: MEASNet, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), shards, "--limit", "1", "--colour", "y"]
    assert main([*arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "1 of 3" in said
    for line in ("device: cpu (asked for)", "arithmetic: fp32 without TF32 (", "tiles: "):
        assert said.count(line) == 1
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["protocol"]["description"] == Protocol(colour="y").describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.safetensors", "SHARDS"], "there is no file no.safetensors"),
        (["TMP", "SHARDS"], "holds no complete checkpoint"),
        (["no.ckpt", "SHARDS"], "there is no file no.ckpt"),
        (["MODEL", "SHARDS", "--device", "cuda"], "device is cuda, but"),
        (["MODEL", "nowhere"], "nowhere"),
        (["MODEL", "SHARDS", "--limit", "-1"], "--limit is -1, but must be 0 or more"),
        (["MODEL", "SHARDS", "--workers", "-1"], "--workers is -1, but must be 0 or more"),
        (["MODEL", "SHARDS", "--workers", "all", "--routing", "fixed"], "leave --workers out"),
        (["s3://bucket/run.safetensors", "SHARDS"], "there is no file"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    model: MEASNet,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "model.safetensors")
    places = {"SHARDS": shards, "MODEL": str(tmp_path / "model.safetensors"), "TMP": str(tmp_path)}
    assert main([places.get(a, a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_checkpoint_of_the_authors_program_is_loaded(golden: Path, tmp_path: Path) -> None:
    reference = Golden(golden, torch.device("cpu"))
    torch.save({"state_dict": reference.entries("tiny")}, tmp_path / "epoch.ckpt")
    image = reference.image("model_64x64", 64, 64)
    with torch.no_grad():
        restored = load(str(tmp_path / "epoch.ckpt"), "cpu")(image).image
    stride = reference.meta["model_64x64"]["stride"]
    expected = reference.outputs["model_64x64"]
    torch.testing.assert_close(restored[..., ::stride, ::stride], expected, rtol=1e-4, atol=1e-4)


def test_no_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no picture"):
        EvaluationReport("shards", FIELD, [])


def test_json_has_no_nan() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": float("inf")}) == {
        "a": [None, 1.0],
        "b": None,
    }


@pytest.mark.parametrize("by", ["fixed", "random", "best-single"])
def test_worth_of_the_choice(
    by: str, model: MEASNet, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), shards, "--limit", "1", "--device", "cpu"]
    assert main([*arguments, "--routing", by, "--routing-of", "all"]) == 0
    said = capsys.readouterr().out
    assert "choice of experts" in said and "worth of the learned choice" in said
    results = tmp_path / "evaluation"
    summary = json.loads((results / "summary.json").read_text())
    found = json.loads((results / f"routing-{by}-all.json").read_text())
    assert found["learned"]["mean"] == summary["mean"]["restored_psnr"]
    for task, worth in found["worth"].items():
        assert worth == pytest.approx(found["learned"][task] - found["replaced"][task], abs=1e-9)
    assert found["worth"]["mean"] != 0
    assert len(found["libraries"]) == 9
    assert set(found["experts"]) == set(found["libraries"] if by == "best-single" else [])


def test_a_network_whose_gates_are_constant_has_a_choice_that_is_worth_nothing(
    shards: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    own = MEASNet(replace_dotted(tiny(), {"tspg": False})).eval()
    with torch.no_grad():  # equal logits: each pixel chooses the first K experts
        for level in (1, 2, 3):
            getattr(own, f"experts{level}").gate.weight.zero_()
    with mean_gates(own) as means:
        learned = evaluate(own, shards, None, limit=1, tiling=WHOLE)

    def again() -> EvaluationReport:
        return evaluate(own, shards, None, limit=1, tiling=WHOLE)

    found = routing.worth(own, again, learned, means, by="fixed")
    assert found.worth["mean"] == pytest.approx(0, abs=1e-4)
    assert routing.worth(own, again, learned, means, by="random").worth["mean"] != 0
    assert evaluate(own, shards, None, limit=1, tiling=WHOLE).mean == learned.mean


def test_a_network_without_experts_has_no_choice_to_replace(shards: str) -> None:
    bare = MEASNet(replace_dotted(tiny(), {"mese": False}))
    with mean_gates(bare) as means:
        learned = evaluate(bare, shards, None, limit=1, tiling=WHOLE)
    with pytest.raises(ValueError, match="--routing-of pixel"):
        routing.worth(bare, lambda: learned, learned, means, by="random")


def test_measures_are_metrics_and_in_the_summary(report: EvaluationReport) -> None:
    metrics, summary = report.metrics(), report.as_dict()
    assert 2 <= metrics["val_effective_experts/encoder1"] <= 4
    assert metrics["val_mutual_information/encoder1"] >= 0
    assert len(summary["routing_measures"]) == 9
    assert sum(summary["routing_measures"]["encoder1"]["shares"]) == pytest.approx(1)


def test_self_ensemble_is_the_mean_of_eight_turns_and_is_named(
    model: MEASNet, shards: str, tmp_path: Path
) -> None:
    found = evaluate(model, shards, tmp_path, limit=1, ensemble=True)
    one = found.scores[0]
    picture = next(iter(pictures(shards, limit=1)))
    turned = []
    with torch.no_grad():
        for mirrored in (False, True):
            for quarter in range(4):
                image = picture.degraded.flip(-1) if mirrored else picture.degraded
                image = model(image.rot90(quarter, (1, 2))[None]).image[0].clamp(0, 1)
                image = image.rot90(-quarter, (1, 2))
                turned.append(image.flip(-1) if mirrored else image)
    mean = torch.stack(turned).mean(0).double().numpy()
    clean = picture.clean.double().numpy()
    psnr = peak_signal_noise_ratio(clean, mean, data_range=1)
    assert one.restored_psnr == pytest.approx(psnr, abs=1e-4)
    assert found.tiles == {"whole, mean of 8 turns": len(found.scores)}
    rows = list(csv.DictReader((tmp_path / "pictures.csv").open()))
    assert {row["turns"] for row in rows} == {"8"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--tile", "80"], ["--noise", "field", "--batch", "3"]])
def test_workers_of_ray_give_the_files_of_one_process(
    options: list[str], ray_local: None, model: MEASNet, shards: str, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model.safetensors")
    given = [str(tmp_path / "model.safetensors"), shards, "--device", "cpu", "--limit", "2"]
    for name, workers in (("one", []), ("two", ["--workers", "2"])):
        assert main([*given, *options, *workers, "--out", str(tmp_path / name)]) == 0
    one, two = (
        [
            {key: cell for key, cell in row.items() if key != "seconds"}
            for row in csv.DictReader((tmp_path / name / "pictures.csv").open())
        ]
        for name in ("one", "two")
    )
    assert len(one) == 8 and two == one
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    assert [summary.pop("time")["workers"] for summary in summaries] == [1, 2]
    assert summaries[0] == summaries[1]
    for path in sorted((tmp_path / "one" / "grids").iterdir()):
        assert (tmp_path / "two" / "grids" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "two" / "tables.md").read_text() == (
        tmp_path / "one" / "tables.md"
    ).read_text()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_no_score_is_lost(
    ray_local: None, model: MEASNet, shards: str, report: EvaluationReport
) -> None:
    with ray_workers(2, "cpu") as workers:
        workers.tiling(model, overlap=32)  # now they run

        def source() -> Iterator[list[Picture]]:
            for picture in pictures(shards):
                yield [picture]
                if picture.position == 4:
                    own = psutil.Process().children(recursive=True)
                    names = {one: "".join(one.cmdline()) for one in own}
                    next(one for one, name in names.items() if "_Worker" in name).kill()

        found = workers.score(model, Job(FIELD, WHOLE), source(), rows=0, seen=lambda *_: None)
    again = EvaluationReport(shards, FIELD, found, held_by(shards))
    assert figures(again) == figures(report)


def test_the_cluster_gives_room_to_workers() -> None:
    has = {"CPU": 16.0, "GPU": 4.0}
    gpu, cpu = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}
    assert room(has, "all", "auto", 2) == (gpu, 4)
    assert room(has, 2, "cuda", 2) == (gpu, 2)
    assert room(has, "all", "cpu", 2) == (cpu, 8)
    assert room({"CPU": 1.0}, "all", "auto", 2) == (cpu, 1)
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        room({"CPU": 4.0}, "all", "cuda", 1)
