"""The field's recipe against ours: same network, same samples, several seeds.

    python bench/recipe.py --train SHARDS --test SHARDS [--recipes field muon …] [--seeds 0 1 2]

Each recipe trains the network of the preset `small` on five tasks, in runs/recipe/NAME-SEED (a
finished run is not trained again, an interrupted one resumes), and is evaluated on real benchmark
pictures. Writes results/recipe/NAME-SEED.json; `python bench/results.py` makes the table.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import RESULTS, ROOT, origin

RECIPES: dict[str, dict[str, str]] = {
    # Adam 2e-4 without warm-up, clipping or average. The field's cosine ends above zero, this one
    # at zero.
    "field": {
        "optimizer": "adam",
        "lr": "2e-4",
        "beta2": "0.999",
        "warmup-samples": "0",
        "clip": "0",
        "ema-decay": "0",
        "balance-weight": "1e-4",
    },
    # Adam with the rate of this size, warm-up, clipping and average.
    "adam": {"optimizer": "adam", "lr": "3e-3"},
    "muon": {},
    "muon-fft": {"frequency-weight": "0.1"},
    "muon-0.02": {"muon-lr": "0.02"},
}
"""Name -> what differs from the preset `small`, as options of `--recipe`."""
OURS = {"warmup-samples": "160", "ema-decay": "0.98"}
"""For a run as short as these; a recipe may say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train with several recipes and seeds, and evaluate."""

    train: str
    """Packed shards of all five tasks."""
    test: str
    """Packed shards of real benchmark pictures."""
    recipes: tuple[str, ...] = ("field", "adam", "muon", "muon-fft")
    """Of `RECIPES`."""
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
    given = tyro.cli(Arguments, prog="python bench/recipe.py")
    unknown = [name for name in given.recipes if name not in RECIPES]
    if unknown:
        print(
            f"error: --recipes names {unknown[0]!r}; known: {', '.join(RECIPES)}", file=sys.stderr
        )
        return 2
    for seed in given.seeds:
        for name in given.recipes:
            code = _one(given, name, seed)
            if code:
                return code
    print("the table: python bench/results.py")
    return 0


def _one(given: Arguments, name: str, seed: int) -> int:
    run = Path("runs", "recipe", f"{name}-{seed}")
    start = origin()
    recipe = OURS | RECIPES[name] | {"samples": str(given.samples)}
    command = ["distributed.train", "small", "--name", run.name, "--storage", str(run.parent)]
    command += ["--seed", str(seed), "--data.train", given.train, "--data.validation", given.test]
    command += ["--data.crop", str(given.crop), "--scaling.workers", given.workers]
    command += [part for key, value in recipe.items() for part in (f"--recipe.{key}", value)]
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
    code = subprocess.run([sys.executable, "-m", *evaluation], cwd=ROOT).returncode
    if code:
        return code
    rows = json.loads((out / "summary.json").read_text())["degradations"]
    gains = {key: row["restored_psnr"] - row["input_psnr"] for key, row in rows.items()}
    record = {
        **start,
        "recipe": name,
        "seed": seed,
        "options": recipe,
        "samples": given.samples,
        "crop": given.crop,
        "seconds": round(seconds),
        "pictures": {key: row["pictures"] for key, row in rows.items()},
        "psnr": {key: round(row["restored_psnr"], 3) for key, row in rows.items()},
        "gain": {key: round(gain, 3) for key, gain in gains.items()},
        "mean_psnr": round(fmean(row["restored_psnr"] for row in rows.values()), 3),
    }
    target = RESULTS / "recipe" / f"{name}-{seed}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}, seed {seed}: mean PSNR {record['mean_psnr']:.2f} dB; {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
