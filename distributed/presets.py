"""The presets of a training run, and the command line that starts from one of them.

Imports neither torch nor Ray; see `distributed.config`.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from distributed.config import (
    IntervalConfig,
    Recipe,
    ScalingConfig,
    TrainConfig,
    from_yaml,
)
from distributed.options import exit_on_error, read_options
from measnet.config import tiny
from shards.config import PAPER_REPEATS, DataConfig
from shards.storage import checked, read
from shards.tasks import DEGRADATIONS, PAPER_TASKS


def demo() -> TrainConfig:
    """All five tasks at tiny width, on the photographs that `make demo` packs.

    Command: `make demo`, or `python -m distributed.train demo` on shards that are already there.
    Cost: 7 to 9 minutes on two CPU cores. Result: README.md.
    """
    repeats = {"derain": 3, "dehaze": 4, "deblur": 6, "lowlight": 4}
    return TrainConfig(
        name="demo",
        model=tiny(),
        data=DataConfig(
            train="data/demo/shards/train",
            validation="data/demo/shards/validation",
            crop=48,
            # A small blurred crop looks like haze or low light, so the last ones are larger.
            later_crops="2880:64,4608:96",
            repeats={"denoise_15": 2, "denoise_25": 2, "denoise_50": 2, **repeats},
            loader_workers=0,
        ),
        recipe=Recipe(
            samples=5_600,
            global_batch=4,
            micro_batch=2,
            optimizer="muon",  # 1.2 dB better than Adam with the same seed and data
            lr=3e-3,
            muon_lr=0.01,
            beta2=0.99,
            warmup_samples=160,
            ema_decay=0.98,
            balance_weight=0.1,  # with the paper's 1e-4 the pixel experts collapse
            frequency_weight=0.1,  # about 0.9 dB better
        ),
        # Two workers of one thread each: small pictures do not fill two threads. On the CPU, so
        # that the preset runs on every machine; `make demo` takes the GPUs that it finds.
        scaling=ScalingConfig(workers="2", device="cpu", cpus_per_worker=1),
        every=IntervalConfig(checkpoint=1_400, validate=2_800, validation_pictures=1, log=80),
    )


def small() -> TrainConfig:
    """All five tasks at tiny width on a few hundred pictures: the weights named `small`.

    Command: `python -m distributed.train small --init runs/speedrun`, on the shards that
    results/README.md names. Cost: a quarter of an hour on two CPU cores. Result: one of several
    runs behind the weights in results/README.md.
    """
    return TrainConfig(
        name="small",
        model=tiny(),
        data=DataConfig(
            train="data/small/train",
            validation="data/small/validation",
            crop=64,
            augment="dihedral",
            repeats={
                "denoise_15": 1,
                "denoise_25": 1,
                "denoise_50": 1,
                "derain": 2,
                "dehaze": 2,
                "deblur": 2,
                "lowlight": 2,
            },
            loader_workers=0,
        ),
        recipe=Recipe(
            samples=10_000,
            global_batch=8,
            micro_batch=4,
            optimizer="muon",
            lr=2e-3,
            muon_lr=0.01,
            beta2=0.99,
            warmup_samples=800,
            ema_decay=0.998,
            balance_weight=0.01,
            frequency_weight=0.1,  # 0.3 to 0.5 dB better in three seeds (results/README.md)
        ),
        scaling=ScalingConfig(workers="2", device="cpu", cpus_per_worker=1),
        every=IntervalConfig(checkpoint=4_000, validate=5_000, validation_pictures=2, log=400),
    )


def speedrun() -> TrainConfig:
    """Noise of sigma 25 alone at tiny width, to reach 30.0 dB on CBSD68 soon, on two CPU cores.

    Command: `python -m distributed.train speedrun`; `python bench/speedrun.py` also writes the
    record. Rules: docs/speedrun.md.
    """
    config = small()
    # Without the frequency loss, as the record in results/ was made.
    recipe = dataclasses.replace(
        config.recipe, samples=16_000, ema_decay=0.995, balance_weight=1e-3, frequency_weight=0
    )
    every = IntervalConfig(
        checkpoint=8_000,
        validate=4_000,
        validation_pictures=0,
        validation_degradations=("denoise_25",),
        log=400,
    )
    data = dataclasses.replace(
        config.data,
        train="data/speedrun/train",
        validation="data/speedrun/test",
        repeats={"denoise_25": 1},
    )
    return dataclasses.replace(config, name="speedrun", data=data, recipe=recipe, every=every)


def local_4090() -> TrainConfig:
    """The paper's network and three-task recipe on one RTX 4090, bf16, by accumulation.

    Command: `python -m distributed.train local-4090`. Micro-batches of 8; more fit:
    `python -m measnet.complexity paper --memory 24GiB` predicts how many. Hours and result: not
    measured yet; `python -m distributed.cost local-4090` says the hours on your card.
    """
    config = paper_3task()
    recipe = dataclasses.replace(config.recipe, micro_batch=8)
    return dataclasses.replace(config, name="local-4090", recipe=recipe)


def paper_3task() -> TrainConfig:
    """Noise, rain and haze with the paper's recipe: Adam, 2e-4, cosine, 150 epochs, crops of 128.

    Command: `python -m distributed.train paper-3task`. The paper reports 32.85 dB on average (Table
    I). Cost: `python -m distributed.cost paper-3task`. Result here: not measured yet.
    """
    repeats = {
        name: uses for name, uses in PAPER_REPEATS.items() if name not in ("deblur", "lowlight")
    }
    return TrainConfig(
        name="paper-3task", data=DataConfig(repeats=repeats), recipe=Recipe(samples=150 * 142_431)
    )


def paper_5task() -> TrainConfig:
    """All five tasks with the paper's recipe.

    Command: `python -m distributed.train paper-5task`. The paper reports 30.64 dB on average (Table
    II). Cost: `python -m distributed.cost paper-5task`. Result here: not measured yet.
    """
    return TrainConfig()


def _paper_single(task: str) -> Callable[[], TrainConfig]:
    def preset() -> TrainConfig:
        names = [name for name, row in DEGRADATIONS.items() if row.task == task]
        draws = {
            "denoise": 46_296,
            "derain": 24_000,
            "dehaze": 72_135,
            "deblur": 10_515,
            "lowlight": 9_700,
        }[task]
        return TrainConfig(
            name=f"paper-single-{task}",
            data=DataConfig(repeats={name: PAPER_REPEATS[name] for name in names}),
            recipe=Recipe(samples=150 * draws),
        )

    preset.__doc__ = (
        f"The paper's recipe on {task} alone (Fig. 8).\n\n"
        f"Command: `python -m distributed.train paper-single-{task}`. Cost: `python -m "
        f"distributed.cost paper-single-{task}`. Result: not measured yet."
    )
    return preset


def improved(preset: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """The preset with the recipe that won on the tiny network, as `NAME-improved`.

    Muon with warm-up and an average of the weights, the frequency loss, and a larger lambda.
    Measured apart from each other: results/README.md, "Recipes" and "Choice of experts".
    """

    def make() -> TrainConfig:
        config = preset()
        recipe = dataclasses.replace(
            config.recipe,
            optimizer="muon",
            lr=2e-3,
            muon_lr=0.01,
            beta2=0.99,
            warmup_samples=min(100_000, config.recipe.samples // 20),
            balance_weight=0.1,  # better than the paper's 1e-4 in each seed (results/README.md)
            frequency_weight=0.1,
        )
        return dataclasses.replace(config, name=f"{config.name}-improved", recipe=recipe)

    name = preset().name
    make.__doc__ = (
        f"{name} with Muon, warm-up, the frequency loss and a larger lambda; measured at tiny "
        "width only.\n\n"
        f"Command: `python -m distributed.train {name}-improved`. Its result at this width is not "
        "measured yet."
    )
    return make


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "small": small,
    "speedrun": speedrun,
    "local-4090": local_4090,
    "paper-3task": paper_3task,
    "paper-5task": paper_5task,
    "local-4090-improved": improved(local_4090),
    "paper-3task-improved": improved(paper_3task),
    "paper-5task-improved": improved(paper_5task),
    **{f"paper-single-{task}": _paper_single(task) for task in PAPER_TASKS},
}


def parse(
    argv: Sequence[str] | None = None, prog: str = "python -m distributed.train"
) -> TrainConfig:
    """Read `[preset] [--config FILE.yaml] [--section.field value ...]`.

    Prints one message and exits with code 2 where the command line is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error():
        default = starting_point(arguments)
        about = _description(prog)
        return read_options(default, arguments, prog=prog, description=about, more=["dry-run"])


def starting_point(arguments: list[str]) -> TrainConfig:
    """Take the preset or the --config file off the arguments."""
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]()
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs the name of a YAML file")
        uri = arguments[at + 1]
        del arguments[at : at + 2]
        try:
            text = read(checked(uri)).decode()
        except OSError as error:
            raise ValueError(f"cannot read --config {uri}: {error.strerror or error}") from error
        try:
            return from_yaml(text)
        except ValueError as error:
            raise ValueError(f"{uri}: {error}") from error
    return TrainConfig()


def _description(prog: str) -> str:
    rows = "\n".join(
        f"  {name:<24}{(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()
    )
    usage = f"{prog} [PRESET | --config FILE.yaml] [--dry-run] [--section.field value ...]"
    dry_run = "--dry-run prints the configuration and the decisions, and starts nothing."
    return f"{usage}\n\n{dry_run}\n\nPresets:\n{rows}"
