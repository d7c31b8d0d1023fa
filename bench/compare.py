"""Recipes, networks, tasks, or ways to choose experts against each other: same data, same samples,
several seeds.

    python bench/compare.py recipe --train SHARDS --test SHARDS [--names NAME …] [--seeds 0 1 2]
    python bench/compare.py network --train SHARDS --test SHARDS
    python bench/compare.py task --train SHARDS --test SHARDS
    python bench/compare.py routing --train SHARDS --test SHARDS

`recipe` compares the field's recipe with ours; `network` the six rows of Table VI and the authors'
program; `task` the network for all tasks with one for each task; `routing` the options of
docs/routing.md, and what the choice is worth. Each run starts from the preset `small` on five
tasks, in runs/WHAT/NAME-SEED (a finished run is not trained again, an interrupted one resumes), and
is evaluated on real benchmark pictures.
Writes results/WHAT/NAME-SEED.json; `python bench/results.py` makes the tables.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import RESULTS, ROOT, keep, origin
from distributed.presets import small
from measnet.config import ABLATION
from shards.tasks import DEGRADATIONS

RECIPES: dict[str, dict[str, str]] = {
    # Adam 2e-4 without warm-up, clipping or average. The field's cosine ends above zero, this one
    # at zero.
    "field": {
        "recipe.optimizer": "adam",
        "recipe.lr": "2e-4",
        "recipe.beta2": "0.999",
        "recipe.warmup-samples": "0",
        "recipe.clip": "0",
        "recipe.ema-decay": "0",
        "recipe.balance-weight": "1e-4",
        "recipe.frequency-weight": "0",
    },
    # Adam with the rate of this size, warm-up, clipping and average.
    "adam": {"recipe.optimizer": "adam", "recipe.lr": "3e-3", "recipe.frequency-weight": "0"},
    "muon": {"recipe.frequency-weight": "0"},
    "muon-fft": {},
    "muon-0.02": {"recipe.frequency-weight": "0", "recipe.muon-lr": "0.02"},
}
SMALL = small().data.repeats
"""Degradations that the preset `small` trains on."""
NETWORKS: dict[str, dict[str, str]] = {
    **{
        name: {f"model.no-{p}": "" for p in ("tspg", "mese", "fd", "mee") if not getattr(make(), p)}
        for name, make in ABLATION.items()
    },
    "official": {"model.variant": "official"},
}
"""The rows of Table VI, from the backbone to the whole network, and the authors' program."""
TASKS: dict[str, dict[str, str]] = {
    "all": {},
    **{
        task: {
            f"data.repeats.{name.replace('_', '-')}": "0"
            for name, one in DEGRADATIONS.items()
            if one.task != task and name in SMALL
        }
        for task in dict.fromkeys(DEGRADATIONS[name].task for name in SMALL)
    },
}
"""All tasks of the preset `small` together, and each by itself with as many samples."""
ROUTING: dict[str, dict[str, str]] = {
    "lambda-1e-4": {"recipe.balance-weight": "1e-4"},
    "lambda-1e-2": {},
    "lambda-1e-1": {"recipe.balance-weight": "0.1"},
    "lambda-1": {"recipe.balance-weight": "1"},
    "batch": {"model.routing.balance-over": "batch"},
    "picture": {"model.routing.picture-weight": "1"},
    "bias": {"recipe.balance-weight": "1e-4", "model.routing.bias-rate": "0.01"},
    "noise": {"model.routing.noise": "0.5"},
    "renormalise": {"model.routing.renormalise": ""},
    "z-loss": {"model.routing.z-loss": "0.001"},
    "temperature": {"model.routing.temperature": "2"},
    "prompt-temperature": {"model.routing.prompt-temperature": "2"},
    "level-weights": {"model.routing.level-weights": "10 1 1"},
}
"""The paper's lambda, that of the preset `small`, larger ones, and each option of the choice by
itself. A run has 300 steps, so the rate of the bias is ten times the usual one."""
SUBJECTS = {"recipe": RECIPES, "network": NETWORKS, "task": TASKS, "routing": ROUTING}
"""What can be compared: name -> what differs from the preset `small`, as options."""
OURS = {"recipe.warmup-samples": "160", "recipe.ema-decay": "0.98"}
"""For a run as short as these; a recipe may say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train with several recipes, networks, tasks or choices, and seeds, and evaluate."""

    what: tyro.conf.Positional[Literal["recipe", "network", "task", "routing"]]
    """What is compared."""
    train: str
    """Packed shards of all five tasks."""
    test: str
    """Packed shards of real benchmark pictures."""
    names: tuple[str, ...] = ()
    """Of `SUBJECTS`; default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights and of the order of samples."""
    samples: int = 2_400
    """Length of each run."""
    crop: int = 48
    """Side of the crops."""
    limit: int = 5
    """Pictures per degradation; 0 takes all."""
    workers: str = "2"
    """Training processes."""


def main() -> int:
    """Exit code."""
    given = tyro.cli(Arguments, prog="python bench/compare.py")
    known = SUBJECTS[given.what]
    for name in given.names:
        if name not in known:
            print(f"error: --names has {name!r}; known: {', '.join(known)}", file=sys.stderr)
            return 2
    for seed in given.seeds:
        for name in given.names or known:
            code = _one(given, name, seed)
            if code:
                return code
    print("the table: python bench/results.py")
    return 0


def _one(given: Arguments, name: str, seed: int) -> int:
    run = Path("runs", given.what, f"{name}-{seed}")
    start = origin()
    options = OURS | SUBJECTS[given.what][name] | {"recipe.samples": str(given.samples)}
    command = ["distributed.train", "small", "--name", run.name, "--storage", str(run.parent)]
    command += ["--seed", str(seed), "--data.train", given.train, "--data.validation", given.test]
    command += ["--data.crop", str(given.crop), "--scaling.workers", given.workers]
    for key, value in options.items():
        command += [f"--{key}", *value.split()]
    # Validation is the evaluation at the end.
    command += ["--every.validate", str(given.samples), "--every.validation-pictures", "1"]
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
    if code:
        return code
    seconds = time.monotonic() - began
    out = ROOT / run / "test"
    evaluation = ["distributed.evaluate", str(run), given.test, "--limit", str(given.limit)]
    evaluation += ["--grid-rows", "1", "--out", str(out)]
    if given.what == "routing":
        evaluation += ["--routing", "fixed"]
    code = subprocess.run([sys.executable, "-m", *evaluation], cwd=ROOT).returncode
    if code:
        return code
    summary = json.loads((out / "summary.json").read_text())
    rows = summary["degradations"]
    gains = {key: row["restored_psnr"] - row["input_psnr"] for key, row in rows.items()}
    record = {
        **start,
        "name": name,
        "seed": seed,
        "options": options,
        "samples": given.samples,
        "crop": given.crop,
        "seconds": round(seconds),
        "pictures": {key: row["pictures"] for key, row in rows.items()},
        "psnr": {key: round(row["restored_psnr"], 3) for key, row in rows.items()},
        "gain": {key: round(gain, 3) for key, gain in gains.items()},
        "mean_psnr": round(fmean(row["restored_psnr"] for row in rows.values()), 3),
    }
    if given.what == "routing":
        record |= _choice(summary, json.loads((out / "routing-fixed-pixel.json").read_text()))
    target = RESULTS / given.what / f"{name}-{seed}.json"
    keep(record, target)
    print(f"{name}, seed {seed}: mean PSNR {record['mean_psnr']:.2f} dB; {target}")
    return 0


def _choice(summary: dict[str, Any], replaced: dict[str, Any]) -> dict[str, Any]:
    """How the experts are used, by library, and what the choice per pixel is worth, by task."""
    measures = summary["routing_measures"]
    return {
        "effective_experts": {
            key: round(one["effective_experts"], 3) for key, one in measures.items()
        },
        "information": {key: round(one["mutual_information"], 4) for key, one in measures.items()},
        "worth": {task: round(worth, 3) for task, worth in replaced["worth"].items()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
