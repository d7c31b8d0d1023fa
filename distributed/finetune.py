"""Fine-tuning on a folder of your own photographs, in one command.

    python -m distributed.finetune PHOTOS [--init WEIGHTS] [--name NAME] [--samples N]

Packs the photographs with synthetic degradations and chains of them, trains from the given weights,
and compares both networks on photographs that were held out. The same command resumes.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from distributed.config import IntervalConfig, Recipe, TrainConfig
from distributed.demo import Split, describe_device, scaling_for
from measnet.config import ModelConfig
from measnet.hardware import choose_device, this_machine
from measnet.hub import SMALL
from shards import layouts
from shards.config import DataConfig
from shards.storage import exists, write

SYNTHESISED = ("derain", "dehaze", "deblur", "lowlight", "lowlight+denoise")
"""Degradations that are made from the photographs; noise is added while loading."""
LEAST_PHOTOGRAPHS = 5
"""Photographs that are needed: to train, to validate and to test on."""
REPEATS = {
    "denoise_15": 1,
    "denoise_25": 1,
    "denoise_50": 1,
    "derain": 2,
    "dehaze": 2,
    "deblur": 3,
    "lowlight": 2,
    "mixed": 2,
}

MUON_LR = 6.0
"""Rate of the matrices, in parts of the rate of the rest."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tune a network on photographs of your own."""

    photos: tyro.conf.Positional[Path]
    """Folder of clean photographs, five or more; subfolders too."""
    init: str = SMALL
    """Weights to start from: a run folder, a .safetensors file of this program, or `small`, which
    comes with it."""
    name: str = "finetuned"
    """Name of the run in runs/, and of the shards in data/."""
    samples: int = 3_000
    """Length of the training, in samples."""
    lr: float = 1e-3
    """Peak learning rate; that of the matrices follows it."""
    crop: int = 64
    """Side of the training crops, in pixels."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 after a message, or the exit code of the training."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.finetune")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return run(given, Console(soft_wrap=True))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(given: Arguments, console: Console) -> int:
    """Pack, train and compare.

    Raises:
        ValueError, OSError: photographs or weights that cannot be used.
    """
    names = split(given.photos)
    from distributed.initial import model_config

    config = configuration(given, model_config(given.init))
    shards = pack_photos(given, names, console)

    from distributed.launch import launch

    console.print(describe_device(this_machine()), highlight=False, markup=False)
    outcome = launch(config, console=console)
    if outcome.exit_code:
        console.print(f"the training {outcome.status}: {outcome.reason or 'see above'}")
        return outcome.exit_code
    compare_networks(given, config.folder, str(shards / "test"), console)
    return 0


def split(photos: Path) -> Split:
    """Evenly spread: a fifth of the photographs for testing, a tenth for validation, at least one
    each.

    Raises:
        ValueError: no such folder, or too few pictures.
    """
    if not photos.is_dir():
        raise ValueError(f"{photos} is not a folder; give the folder of your photographs")
    found = layouts.pictures(str(photos))
    if len(found) < LEAST_PHOTOGRAPHS:
        raise ValueError(
            f"{photos} holds {len(found)} pictures ({', '.join(layouts.SUFFIXES)}), but at least "
            f"{LEAST_PHOTOGRAPHS} are needed: some are held out to validate and to test on"
        )
    test = found[:: max(2, min(5, len(found) // 2))]
    rest = [name for name in found if name not in set(test)]
    validation = rest[:: max(2, 10)]
    train = [name for name in rest if name not in set(validation)]
    return Split(train, validation, test)


def configuration(given: Arguments, model: ModelConfig) -> TrainConfig:
    """Of the training run."""
    shards = shards_of(given)
    return TrainConfig(
        name=given.name,
        init=given.init,
        model=model,
        data=DataConfig(
            train=str(shards / "train"),
            validation=str(shards / "validation"),
            crop=given.crop,
            repeats=REPEATS,
        ),
        recipe=Recipe(
            samples=given.samples,
            global_batch=8,
            micro_batch=4,
            # Adam forgot more of what the weights had learned (docs/own-pictures.md).
            optimizer="muon",
            lr=given.lr,
            muon_lr=MUON_LR * given.lr,
            beta2=0.99,
            warmup_samples=min(160, given.samples // 10),
            ema_decay=0.99,
            balance_weight=0.01,  # as in the preset `small`
        ),
        scaling=dataclasses.replace(scaling_for(this_machine()), cpus_per_worker=1),
        every=IntervalConfig(
            checkpoint=max(8, given.samples // 4),
            validate=max(8, given.samples // 2),
            validation_pictures=2,
            log=80,
        ),
    )


def shards_of(given: Arguments) -> Path:
    """Folder of the shards that the command packs."""
    return Path("data", given.name)


def pack_photos(given: Arguments, names: Split, console: Console) -> Path:
    """Pack each part of the photographs, unless that was done by an earlier start.

    Raises:
        ValueError, OSError: pictures that cannot be read, or other photographs were packed before.
    """
    from shards import manifest
    from shards.packing import pack

    shards = shards_of(given)
    note = shards / "photos.json"
    listed = {part: _digests(given.photos, own) for part, own in names._asdict().items()}
    # Written first: if packing is interrupted, the parts must still be the same the next time, else
    # a photograph to test on could be trained on.
    if exists(str(note)):
        if json.loads(note.read_text()) != listed:
            raise ValueError(
                f"{shards} was packed from other photographs; use another --name, or remove that "
                "folder"
            )
    else:
        write(str(note), (json.dumps(listed, indent=2) + "\n").encode())
    for number, (part, own) in enumerate(names._asdict().items()):
        if exists(str(shards / part / manifest.NAME)):
            continue
        folder = shards / "photos" / part
        shutil.rmtree(folder, ignore_errors=True)
        for name in own:
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((given.photos / name).resolve())
        made = pack("clean", str(folder), str(shards / part), synthesise=SYNTHESISED, seed=number)
        counts = ", ".join(f"{task} {count}" for task, count in made.counts.items())
        console.print(f"packed {part}: {counts}", highlight=False)
    return shards


def _digests(photos: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in names}


def compare_networks(given: Arguments, folder: str, data: str, console: Console) -> None:
    """Show what the training improved on the held-out photographs, and where the results are."""
    from distributed import compare
    from distributed.evaluate import evaluate, load
    from measnet.tiling import choose_tiling

    device = choose_device("auto", this_machine()).choice
    reports = {}
    for name, weights in (("before", given.init), ("after", folder)):
        network = load(weights, device)
        out = Path(folder, "evaluation") if name == "after" else None
        reports[name] = evaluate(network, data, out, tiling=choose_tiling(network))
    console.print(compare.table(reports))
    compare.write(reports, Path(folder, "evaluation", "compare.json"))
    console.print(
        f"before/after   {Path(folder, 'evaluation', 'grids')}\n"
        f"figures        {Path(folder, 'evaluation', 'compare.json')}\n"
        f"your pictures  python -m measnet.restore IN OUT --weights {Path('runs', given.name)}",
        highlight=False,
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
