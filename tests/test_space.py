"""The search space: what may change, its command line, and the proposed trials."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.config import changed_fields
from distributed.presets import demo
from measnet.config import ABLATION, replace_dotted, to_dict
from tune.capacity import needed, plan_capacity
from tune.config import SearchConfig, parse
from tune.record import SearchRecord, TrialRecord, front, load
from tune.sampler import build_study, next_changes
from tune.search import _open_record
from tune.space import PAPER, Space, build, parameter


def rows_of(config: SearchConfig, states: Sequence[str]) -> list[TrialRecord]:
    """Trials as a search would propose them, with figures that favour few pixel experts."""
    space = build(config.space, config.vary, config.base())
    rows: list[TrialRecord] = []
    for number, state in enumerate(states):
        changes = next_changes(space, rows, config)
        psnr = 30.0 - changes.get("model.pixel_experts", 0)
        rows.append(
            TrialRecord(
                number=number,
                name=f"s-{number:03d}",
                changes=changes,
                state=state,  # type: ignore[arg-type]
                psnr=None if state == "failed" else psnr,
                curve=[] if state == "failed" else [(100, psnr)],
                costs={"multiply_adds": 1e9 * number},
            )
        )
    return rows


@given(
    seed=st.integers(0, 2**31 - 1),
    algorithm=st.sampled_from(["tpe", "random"]),
    width=st.sampled_from([(), ("width",)]),
    cost=st.sampled_from(["none", "multiply_adds"]),
    states=st.lists(
        st.sampled_from(["finished", "stopped", "failed", "running", "waiting"]), max_size=7
    ),
)
@settings(max_examples=25, deadline=None)
def test_every_proposal_is_a_network_that_can_be_built(
    seed: int, algorithm: str, width: tuple[str, ...], cost: str, states: list[str]
) -> None:
    config = parse(
        [
            *("demo", "--space", "experts", *width, "--cost", cost, "--algorithm", algorithm),
            *("--search-seed", str(seed)),
        ]
    )
    for row in rows_of(config, [*states, "waiting"]):
        model = replace_dotted(config.base(), row.changes).model
        assert 1 <= model.pixel_top_k <= model.pixel_experts <= 8
        assert 1 <= model.image_top_k <= model.image_experts <= 8


def test_trial_0_is_the_papers_point() -> None:
    config = parse(["demo"])
    space = build(config.space, config.vary, config.base())
    assert next_changes(space, [], config) == PAPER
    train = replace_dotted(config.base(), PAPER)
    assert (train.model.pixel_experts, train.model.pixel_top_k) == (6, 2)
    assert (train.model.image_experts, train.model.image_top_k) == (5, 2)
    assert train.recipe.balance_weight == 1e-4


def test_the_papers_point_may_lie_outside_of_the_range() -> None:
    config = parse(["demo", "--space", "--vary", "model.pixel_experts=2..4"])
    rows = rows_of(config, ["finished"] * 6)
    assert rows[0].changes == {"model.pixel_experts": 6}
    assert all(2 <= row.changes["model.pixel_experts"] <= 4 for row in rows[1:])
    study = build_study(build(config.space, config.vary, config.base()), rows, cost="none")
    ranges = [trial.distributions["model.pixel_experts"] for trial in study.trials]
    assert {(one.low, one.high) for one in ranges} == {(2, 6)}  # type: ignore[attr-defined]


def test_the_next_trial_depends_on_the_record_alone() -> None:
    """A search that is killed after each trial proposes the trials of an uninterrupted one."""
    config = parse(["demo", "--trials", "12"])
    undisturbed = rows_of(config, ["finished", "stopped", "failed"] * 4)
    space = build(config.space, config.vary, config.base())
    for number in range(len(undisturbed)):
        assert next_changes(space, undisturbed[:number], config) == undisturbed[number].changes
    other = parse(["demo", "--trials", "12", "--search-seed", "1"])
    assert rows_of(other, ["finished"] * 3)[1].changes != undisturbed[1].changes


def test_tpe_prefers_the_values_of_good_trials_and_random_does_not() -> None:
    def late(algorithm: str) -> float:
        config = parse(["demo", "--algorithm", algorithm, "--trials", "30"])
        rows = rows_of(config, ["finished"] * 30)
        return sum(r.changes["model.pixel_experts"] for r in rows[15:]) / 15

    assert late("tpe") < 3.5 < late("random")


def test_optuna_gets_the_state_of_each_trial() -> None:
    config = parse(["demo"])
    space = build(config.space, config.vary, config.base())
    rows = rows_of(config, ["finished", "stopped", "failed", "running"])
    study = build_study(space, rows, cost="none")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert study.trials[1].intermediate_values == {100: rows[1].psnr}
    study = build_study(space, rows, cost="multiply_adds")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
    assert study.trials[1].values == [rows[1].psnr, 1e9]


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("model.pixel_experts", "2..8", (2, 8, False, ())),
        ("recipe.lr", "log 1e-4..1e-2", (1e-4, 1e-2, True, ())),
        ("recipe.lr", "log:1e-4..1e-2", (1e-4, 1e-2, True, ())),
        ("recipe.beta1", "0.8..0.95", (0.8, 0.95, False, ())),
        ("model.dim", "8,16", (0, 0, False, (8, 16))),
        ("model.dim", [8, 16], (0, 0, False, (8, 16))),
        ("recipe.optimizer", "adam, adamw", (0, 0, False, ("adam", "adamw"))),
        ("model.mee", "true,false", (0, 0, False, (True, False))),
        ("recipe.lr", "1e-3,2e-3", (0, 0, False, (1e-3, 2e-3))),
    ],
)
def test_ranges(field: str, text: Any, expected: tuple) -> None:
    found = parameter(field, text, demo())
    assert (found.low, found.high, found.log, found.choices) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "recipe.learning=1..2"], "no such field"),
        (["--vary", "recipe.dim=8,16"], "did you mean model.dim?"),
        (["--vary", "recipe.lr"], "FIELD=RANGE"),
        (["--vary", "recipe.lr=5"], "cannot read the range"),
        (["--vary", "model.pixel_experts=2.5..8"], "cannot read the range"),
        (["--vary", "recipe.lr=log 0..1"], "begin above 0"),
        (["--vary", "recipe.lr=2..1"], "is empty"),
        (["--vary", "model.dim=15,16"], "multiple of 4"),
        (["--vary", "model.dim=8,12"], "trial 0 needs 16"),
        (["--vary", "model.pixel_top_k=1,2"], "needs a range"),
        (["--vary", "recipe.global_batch=4,9"], "recipe.global_batch 9"),
        (["--space", "--vary", "model.pixel_experts=1..8"], "search it too"),
        (["--space", "expert"], "unknown --space"),
        (["--space"], "nothing to search"),
        (["--space", "missing.yaml"], "cannot read --space missing.yaml"),
        (["--space", "ablation", "width"], "fixed list"),
        (["--space", "tasks", "--vary", "recipe.lr=1e-3,1e-4"], "fixed list"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(
    arguments: list[str], message: str
) -> None:
    config = parse(["demo", *arguments])
    with pytest.raises(ValueError, match=r"(?s).*") as error:
        build(config.space, config.vary, config.base())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "--trials is 0"),
        (["--samples", "16"], "4 steps of 4, fewer than --validations 9"),
        (["--recipe.lr", "-1"], "recipe.lr"),
        (["--scheduler", "hyper"], "hyper"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        parse(["demo", *arguments])
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join(
        (printed.err + printed.out).replace("│", " ").split()
    )  # drawn in a box


def test_a_file_of_ranges(tmp_path: Path) -> None:
    file = tmp_path / "ranges.yaml"
    file.write_text("model.dim: 8,16\nrecipe.lr: log 1e-4..1e-2\nrecipe.optimizer: [adam, muon]\n")
    config = parse(["demo", "--space", str(file)])
    space = build(config.space, config.vary, config.base())
    assert [p.field for p in space.parameters] == ["model.dim", "recipe.lr", "recipe.optimizer"]
    (tmp_path / "bad.yaml").write_text("- model.dim\n")
    with pytest.raises(ValueError, match="must hold lines"):
        build((str(tmp_path / "bad.yaml"),), (), config.base())


def test_the_ablation_is_table_vi() -> None:
    config = parse(["demo", "--space", "ablation"])
    space = build(config.space, config.vary, config.base())
    assert [p.label for p in space.points] == list(ABLATION)
    for point in space.points:
        model, row = replace_dotted(config.base(), point.changes).model, ABLATION[point.label]()
        assert (model.tspg, model.mese, model.fd, model.mee) == (
            row.tspg,
            row.mese,
            row.fd,
            row.mee,
        )
        assert model.dim == config.train.model.dim


def test_tasks_are_trained_together_and_alone() -> None:
    config = parse(["demo", "--space", "tasks"])
    points = build(config.space, config.vary, config.base()).points
    assert [p.label for p in points] == [
        *("all in one", "denoise", "derain", "dehaze", "deblur", "lowlight")
    ]
    alone = replace_dotted(config.base(), points[1].changes)
    assert set(alone.data.repeats) == {"denoise_15", "denoise_25", "denoise_50"}
    single = parse(["paper-single-derain", "--space", "tasks"])
    with pytest.raises(ValueError, match="only derain"):
        build(single.space, single.vary, single.base())


@given(samples=st.integers(200, 40_000), validations=st.integers(1, 20))
@settings(deadline=None)
def test_a_shorter_trial_keeps_its_shape(samples: int, validations: int) -> None:
    config = parse(["demo", "--samples", str(samples), "--validations", str(validations)])
    base, full = config.base(), config.train
    assert base.recipe.samples == config.budget >= samples
    assert base.recipe.samples % base.recipe.global_batch == 0
    share = base.recipe.warmup_samples / base.recipe.samples
    assert share == pytest.approx(full.recipe.warmup_samples / full.recipe.samples, abs=0.01)
    assert config.interval % base.recipe.global_batch == 0
    assert -(-config.budget // config.interval) <= validations
    assert config.interval <= config.first_rung <= config.budget


def test_a_trial_has_one_worker_by_default(tmp_path: Path) -> None:
    assert parse(["demo"]).train.scaling.workers == "1"
    assert parse(["demo", "--scaling.workers", "3..4"]).train.scaling.workers == "3..4"
    (tmp_path / "own.yaml").write_text("scaling: {workers: '2'}\n")
    assert parse(["--config", str(tmp_path / "own.yaml")]).train.scaling.workers == "2"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"name": "b", "storage": "x", "scaling.workers": "1", "engine.compile": "on"}, []),
        ({"data.train": "x", "data.prefetch": 1, "data.cache_gib": 9.0, "every.validate": 9}, []),
        ({"every.validation_pictures": 9}, []),
        ({"recipe.lr": 0.5}, ["recipe.lr 0.003 (now 0.5)"]),
        ({"model.dim": 8, "seed": 1}, ["seed 0 (now 1)", "model.dim 16 (now 8)"]),
        ({"data.crop": 32}, ["data.crop 48 (now 32)"]),
        ({"data.repeats": {"derain": 1}}, ["data.repeats"]),
    ],
)
def test_a_run_resumes_with_the_fields_that_do_not_change_what_is_learnt(
    changes: dict[str, Any], expected: list[str]
) -> None:
    found = changed_fields(to_dict(demo()), replace_dotted(demo(), changes))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
    assert not changed_fields({"model": {}}, demo())  # written by a version without these fields


def test_only_what_keeps_trials_comparable_may_change() -> None:
    first = to_dict(parse(["demo", "--trials", "4"]))

    def changed(*more: str) -> list[str]:
        return changed_fields(
            first, parse(["demo", *more]), fixed={"train.every.validation_pictures"}
        )

    more = ["--trials", "9", "--parallel", "1", "--scaling.workers", "2", "--keep", "1"]
    assert not changed(
        *more, "--data.prefetch", "1", "--data.train", "elsewhere", "--every.log", "9"
    )
    for change in (
        ["--samples", "800"],
        ["--recipe.lr", "1e-3"],
        ["--seed", "1"],
        ["--vary", "model.dim=8,16"],
        ["--scheduler", "none"],
        ["--every.validation-pictures", "2"],
    ):
        assert len(changed(*change)) == 1


def test_the_front_has_the_trials_that_no_other_beats() -> None:
    figures = [(30.0, 5.0), (31.0, 9.0), (29.0, 5.0), (30.0, 6.0), (28.0, 1.0), (31.0, 9.0)]
    rows = [
        TrialRecord(
            number=n, name=str(n), changes={}, state="finished", psnr=p, costs={"parameters": c}
        )
        for n, (p, c) in enumerate(figures)
    ]
    assert [row.number for row in front(rows, "parameters")] == [4, 0, 1, 5]
    assert [row.number for row in front(rows, "none")] == [1, 5]


def test_only_trials_that_ran_to_the_end_can_win() -> None:
    record = SearchRecord(name="s", config={}, command="", budget=9, cost="none")
    for number, (state, psnr) in enumerate([("stopped", 40.0), ("finished", 30.0)]):
        record.trials.append(
            TrialRecord(number=number, name=str(number), changes={}, state=state, psnr=psnr)  # type: ignore[arg-type]
        )
    record.rank()
    assert (record.champion, record.front) == (1, [1])


def test_a_space_is_kept_as_plain_data(tmp_path: Path) -> None:
    base = parse(["demo"]).base()
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text("recipe.lr: log 1e-4..1e-2\nrecipe.optimizer: [adam, muon]\n")
    for names in (("experts", str(ranges)), ("ablation",), ("tasks",), ("width",)):
        space = build(names, (), base)
        assert Space.from_dict(json.loads(json.dumps(space.as_dict()))) == space


def test_a_search_whose_ranges_were_edited_is_not_resumed(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = tmp_path / "ranges.yaml"
    ranges.write_text("recipe.lr: log 1e-4..1e-2\n")
    arguments = ["demo", "--space", str(ranges), "--storage", str(tmp_path)]
    config = parse([*arguments, "--data.validation", str(packed / "test")])
    space = build(config.space, config.vary, config.base())
    _open_record(config, "c", space).save()
    assert _open_record(config, "c", space).space == space.as_dict()
    ranges.write_text("recipe.lr: log 1e-4..1e-2\nrecipe.clip: 0.1..1.0\n")
    edited = build(config.space, config.vary, config.base())
    with pytest.raises(ValueError, match=r"was started with other ranges .*ranges.yaml"):
        _open_record(config, "c", edited)


def test_a_search_may_be_moved(tmp_path: Path) -> None:
    config = parse(["demo"])
    record = SearchRecord(
        name="s",
        config=to_dict(config),
        command="c",
        budget=1,
        cost="none",
        folder=str(tmp_path / "old"),
        trials=rows_of(config, ["finished"]),
    )
    record.trials[0].folder = f"{tmp_path}/old/trials/{record.trials[0].name}"
    record.save()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = load(str(tmp_path / "new"))
    assert moved is not None
    assert moved.trials[0].folder == f"{tmp_path}/new/trials/{moved.trials[0].name}"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = parse(["demo"])
    record = SearchRecord(
        name="s",
        config=to_dict(config),
        command="c",
        budget=config.budget,
        cost="none",
        folder=str(tmp_path),
        trials=rows_of(config, ["finished", "failed", "running"]),
    )
    record.trials[0].curve = [(100, 20.0), (200, 21.0)]
    record.save()
    back = load(str(tmp_path))
    assert back is not None
    assert [r.changes for r in back.trials] == [r.changes for r in record.trials]
    assert back.trials[0].curve == [(100, 20.0), (200, 21.0)]
    assert load(str(tmp_path / "none")) is None
    (tmp_path / "search.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version is 99"):
        load(str(tmp_path))
    (tmp_path / "search.json").write_text('{"vers')
    with pytest.raises(ValueError, match="cannot read"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "nodes", "expected"),
    [
        ([], [{"CPU": 2}], (2, 1, 1, False)),
        ([], [{"CPU": 1}], (1, 1, 1, False)),
        (["--parallel", "1"], [{"CPU": 8}], (1, 1, 8, False)),
        (["--scaling.workers", "2"], [{"CPU": 8}], (2, 2, 2, False)),
        ([], [{"CPU": 16, "GPU": 4}], (4, 1, 4, True)),
        (["--scaling.workers", "2"], [{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 1}], (2, 2, 2, True)),
        (["--scaling.workers", "1..2"], [{"CPU": 8, "GPU": 4}], (2, 2, 2, True)),
        (["--scaling.cpus-per-worker", "3"], [{"CPU": 4}, {"CPU": 4}], (2, 1, 3, False)),
    ],
)
def test_trials_fit_on_the_cluster(
    arguments: list[str], nodes: list[dict[str, float]], expected: tuple
) -> None:
    room = plan_capacity(parse(arguments), nodes)
    assert (room.parallel, room.workers, room.cpus, room.gpu) == expected


@pytest.mark.parametrize(
    ("arguments", "nodes", "message"),
    [
        (
            ["--scaling.workers", "2", "--scaling.device", "gpu"],
            [{"CPU": 8, "GPU": 1}],
            "a trial needs 2 GPUs and 16 CPUs, but the cluster has 1 GPUs and 8 CPUs",
        ),
        (["--scaling.cpus-per-worker", "4"], [{"CPU": 2}], "a trial needs 4 CPUs"),
        (["--scaling.cpus-per-worker", "3"], [{"CPU": 2}, {"CPU": 2}], "a trial needs 3 CPUs"),
        (["--parallel", "3", "--scaling.cpus-per-worker", "1"], [{"CPU": 2}], "room for 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(
    arguments: list[str], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        plan_capacity(parse(arguments), nodes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "workers", "words"),
    [
        ([], [{"CPU": 1}], "1 worker of 1 CPU (1 trial)"),
        (
            ["--scaling.workers", "1..3", "--parallel", "2"],
            [{"CPU": 1}] * 6,
            "6 workers of 1 CPU (2 trials)",
        ),
        (
            ["--scaling.device", "gpu", "--scaling.workers", "2"],
            [{"CPU": 4, "GPU": 1}] * 2,
            "2 workers of 4 CPUs and 1 GPU (1 trial)",
        ),
        (["--scaling.cpus-per-worker", "7"], [{"CPU": 7}], "1 worker of 7 CPUs (1 trial)"),
    ],
)
def test_a_search_asks_the_cluster_for_the_workers_of_its_trials(
    arguments: list[str], workers: list[dict[str, float]], words: str
) -> None:
    assert needed(parse(arguments)) == (workers, words)
