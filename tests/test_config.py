import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distributed.config import TrainConfig, flat_fields, from_yaml, to_yaml
from distributed.presets import PRESETS, parse
from measnet.config import ModelConfig, from_dict, replace_dotted, to_dict
from shards import storage

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name: str) -> None:
    config = PRESETS[name]()
    assert from_yaml(to_yaml(config)) == config
    assert f"distributed.train {name}" in (PRESETS[name].__doc__ or "")


@pytest.mark.parametrize("name", ["local-4090", "paper-3task", "paper-5task"])
def test_improved_presets_change_the_recipe_only(name: str) -> None:
    paper, improved = PRESETS[name](), PRESETS[f"{name}-improved"]()
    assert improved.recipe.optimizer == "muon" and improved.recipe.frequency_weight == 0.1
    assert improved.recipe.samples == paper.recipe.samples
    assert dataclasses.replace(improved, name=name, recipe=paper.recipe) == paper


def test_paper_presets_draw_what_the_paper_draws() -> None:
    assert PRESETS["paper-5task"]().recipe.samples == 150 * 162_646
    assert PRESETS["paper-3task"]().recipe.samples == 150 * 142_431
    single = PRESETS["paper-single-dehaze"]()
    assert single.data.repeats == {"dehaze": 1}
    assert single.recipe.samples == 150 * 72_135


def test_fields_are_overridden_from_the_command_line() -> None:
    config = parse(
        ["demo", "--recipe.lr", "1e-3", "--model.pixel-experts", "8", "--model.pixel-top-k", "7"]
    )
    assert config.recipe.lr == 1e-3
    assert (config.model.pixel_experts, config.model.pixel_top_k) == (8, 7)
    assert dataclasses.replace(config, recipe=PRESETS["demo"]().recipe).name == "demo"


def test_a_yaml_file_is_a_starting_point(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: mine\nrecipe: {lr: 1e-4, samples: 640}\n")
    config = parse(["--config", str(file), "--recipe.samples", "320"])
    assert (config.name, config.recipe.lr, config.recipe.samples) == ("mine", 1e-4, 320)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], ["unknown preset 'nonsense'", "paper-5task"]),
        (["demo", "--model.pixel-top-k", "9"], ["model.pixel_top_k is 9"]),
        (["demo", "--recipe.lr", "fast"], ["recipe.lr"]),
        (["demo", "--data.later-crops", "96"], ["data.later_crops is '96'", "SAMPLES:SIDE"]),
        (["demo", "--data.later-crops", "800:8"], ["data.later_crops is '800:8'", "16 or more"]),
        (["demo", "--data.later-crops", "800:64,80:96"], ["samples that increase"]),
        (["demo", "--data.later-crops", "802:64"], ["after 802 samples", "multiple of", "(4)"]),
        (["demo", "--recipe.lerning", "1"], ["unknown option --recipe.lerning"]),
        (["--batch-size", "4"], ["did you mean --recipe.global-batch or --recipe.micro-batch?"]),
        (["demo", "--recipe.learning-rate=1"], ["did you mean --recipe.lr?"]),
        (["--recipe.global_bach", "8"], ["did you mean --recipe.global-batch?"]),
        (["demo", "--dryrun"], ["unknown option --dryrun; did you mean --dry-run?"]),
        (["demo", "--dry_run"], ["did you mean --dry-run?"]),
        (
            ["demo", "--data.repeats", "lowlight", "2"],
            ["did you mean --data.repeats.denoise-15 or --data.repeats.denoise-25"],
        ),
        (["--scaling.gpus", "8"], ["unknown option --scaling.gpus. python"]),
        (["demo", "more"], ["unknown argument 'more'"]),
        (["demo", "--recipe.micro-batch", "3"], ["must be a multiple of recipe.micro_batch 3"]),
        (["demo", "--scaling.workers", "3"], ["cannot share evenly", "use 1, 2 workers"]),
        (["demo", "--scaling.workers", "4..2"], ["scaling.workers is '4..2'"]),
        (["demo", "--name", "a/b"], ["name is 'a/b'"]),
        (["--config", "missing.yaml"], ["cannot read --config missing.yaml"]),
    ],
)
def test_what_is_wrong_is_named(
    arguments: list[str], message: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    said = " ".join((output.err + output.out).replace("│", " ").split())
    assert all(text in said for text in message), said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: {lerning: 1}", "unknown field recipe.lerning"),
        ("recipe: {lr: fast}", "recipe.lr must be float, not 'fast'"),
        ("recipe: {samples: 1.5}", "recipe.samples must be int, not 1.5"),
        ("model: {variant: mine}", "model.variant is 'mine'; choose one of paper, official"),
        ("model: {heads: [1, 2]}", "model.heads needs 4 values, got 2"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace(".", r"\.")):
        from_yaml(text)


def test_a_configuration_may_be_in_a_store() -> None:
    storage.write("memory://best.yaml", b"name: found\nrecipe: {lr: 0.001}\n")
    config = parse(["--config", "memory://best.yaml"])
    assert (config.name, config.recipe.lr) == ("found", 1e-3)


def test_linked_fields_change_together() -> None:
    config = replace_dotted(
        TrainConfig(), {"model.pixel_top_k": 8, "model.pixel_experts": 8, "recipe.lr": 1e-3}
    )
    assert (config.model.pixel_top_k, config.recipe.lr) == (8, 1e-3)
    with pytest.raises(ValueError, match=r"model\.pixel_top_k is 8"):
        replace_dotted(TrainConfig(), {"model.pixel_top_k": 8})
    with pytest.raises(ValueError, match="no section 'nothing'"):
        replace_dotted(TrainConfig(), {"nothing.here": 8})


def test_parameters_for_mlflow_are_flat() -> None:
    flat = flat_fields(TrainConfig())
    assert flat["recipe.lr"] == 2e-4
    assert flat["data.repeats.derain"] == 120


def test_model_config_round_trips() -> None:
    config = ModelConfig(dim=32, heads=(1, 2, 4, 8), fd=False)
    assert from_dict(ModelConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_every_field_is_documented_and_read_somewhere() -> None:
    sources = "".join(
        path.read_text()
        for room in ("measnet", "shards", "distributed", "tune")
        for path in (ROOT / room).glob("*.py")
    )

    def fields(cls: type) -> list[str]:
        names = []
        for field in dataclasses.fields(cls):
            inner = (
                field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
            )
            names += fields(inner) if isinstance(inner, type) else [field.name]
        return names

    for name in fields(TrainConfig):
        kind = name.removeprefix("pixel_").removeprefix("image_")
        assert f".{name}" in sources or f"_{kind}" in sources, f"nothing reads {name}"
    described = subprocess.run(
        [sys.executable, "-m", "distributed.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    for name in fields(TrainConfig):
        assert name.replace("_", "-") in described


def test_the_answer_comes_before_anything_heavy_is_imported() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'deepspeed'} & set(sys.modules)"
    code = f"import sys, distributed.config; print({heavy})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
