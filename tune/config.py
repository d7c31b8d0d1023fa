"""`SearchConfig`: what a search is made of, and its command line. Imports neither torch nor Ray."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from distributed.config import TrainConfig, as_metrics
from distributed.presets import PRESETS, starting_point

Cost = Literal["none", "multiply_adds", "parameters", "latency"]

FREE_TO_CHANGE = (
    "trials",
    "parallel",
    "keep",
    "register",
    "retry_failed",
    "train.storage",
    "train.scaling",
    "train.tracking",
    "train.guard",
    "train.engine",
    "train.data.train",
    "train.data.validation",
    "train.data.loader_workers",
    "train.data.cache_dir",
    "train.data.cache_gib",
    "train.every.log",
    "train.every.keep_checkpoints",
    "train.every.checkpoint",
    "train.every.validate",
)
"""Fields that may differ when a search goes on: its trials stay comparable."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search; every other field is one of a training run, and holds for all trials."""

    trials: int = 20
    """Trials in all; the same command with a larger number goes on with more. Fixed lists
    (ablation, tasks) ignore it."""
    space: tuple[str, ...] = ("experts",)
    """What to search: `experts` (N and K of both kinds, and lambda), `width`, a FILE.yaml of
    `field: range`, or several of them; or a fixed list: `ablation` (Table VI), `tasks` (Fig. 8)."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Search one more field, as in `--vary "recipe.lr=log 1e-4..1e-2"`, `--vary model.dim=16,24`;
    may be given several times."""
    samples: int = 0
    """Samples per trial; 0 trains each trial at the full length of the preset."""
    validations: int = 9
    """Validations per trial, evenly spread; stopping and PBT happen there."""
    algorithm: Literal["tpe", "random"] = "tpe"
    """How new trials are chosen: Optuna's TPE learns from those before, `random` does not."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` stops trials that lag behind, except trial 0; `pbt` has them take over the weights of
    better ones and vary the recipe.* fields that are searched; `none` trains all to the end, as
    fixed lists always are."""
    cost: Cost = "none"
    """A second objective, to be low, beside PSNR: `multiply_adds` (of 256x256 pixels),
    `parameters` or measured `latency`. K alone moves multiply-adds by about 2 %: search the width
    too (`--space experts width`) where the cost matters."""
    reduction: int = 3
    """ASHA keeps the best 1/reduction of the trials at each rung."""
    grace: int = 0
    """Samples that every trial gets before ASHA may stop it; 0: 1/reduction^2 of a trial."""
    parallel: int = 0
    """Trials at the same time; 0: as many as the cluster holds, two on one machine without GPU."""
    search_seed: int = 0
    """Seed of the choice of trials; `--seed` is that of the training."""
    keep: int = 3
    """Best trials whose checkpoints are kept; those of the others are deleted."""
    register: str = "measnet"
    """Name in MLflow's model registry under which the best gets the alias `champion`; empty does
    not register."""
    retry_failed: bool = False
    """When the search goes on, train failed trials once more."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (
            ("trials", 1),
            ("samples", 0),
            ("validations", 1),
            ("reduction", 2),
            ("grace", 0),
            ("parallel", 0),
            ("search_seed", 0),
            ("keep", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, "
                    f"but must be at least {least}"
                )
        if self.register and not re.fullmatch(r"[\w.-]+", self.register):
            raise ValueError(f"--register is {self.register!r}; use letters, digits, dot and dash")
        steps = self.budget // self.train.recipe.global_batch
        if steps < self.validations:
            raise ValueError(
                f"a trial of {self.budget} samples has {steps} steps of "
                f"{self.train.recipe.global_batch}, fewer than --validations {self.validations}"
            )

    @property
    def budget(self) -> int:
        """Samples of a trial that runs to its end, whole steps."""
        batch = self.train.recipe.global_batch
        return -(-(self.samples or self.train.recipe.samples) // batch) * batch

    @property
    def fixed(self) -> bool:
        """Whether the space is a fixed list, all of which is trained to the end."""
        return bool({"ablation", "tasks"} & set(self.space))

    @property
    def folder(self) -> str:
        """Folder or URI of the search."""
        return self.train.folder

    def base(self) -> TrainConfig:
        """What all trials have in common: the shorter recipe, validated at the rungs."""
        train, batch = self.train, self.train.recipe.global_batch
        share = self.budget / train.recipe.samples
        recipe = dataclasses.replace(
            train.recipe,
            samples=self.budget,
            warmup_samples=min(int(train.recipe.warmup_samples * share), self.budget - 1),
        )
        interval = self.interval
        every = dataclasses.replace(
            train.every,
            validate=interval,
            checkpoint=interval,
            keep_checkpoints=1,
            log=min(train.every.log, max(batch, interval // 4)),
        )
        return dataclasses.replace(
            train, recipe=recipe, every=every, storage=f"{self.folder}/trials"
        )

    @property
    def interval(self) -> int:
        """Samples between two validations, whole steps."""
        batch = self.train.recipe.global_batch
        return -(-(self.budget // batch) // self.validations) * batch

    @property
    def least(self) -> int:
        """Samples that every trial gets before ASHA may stop it."""
        return self.grace or max(self.interval, self.budget // self.reduction**2)


def parse(argv: Sequence[str] | None = None) -> SearchConfig:
    """Read `[preset | --config FILE.yaml] [--search-option value ...] [--section.field value ...]`.

    Prints one message and exits with code 2 where the command line is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        own_file = "--config" in arguments
        train = starting_point(arguments)
        # Trials side by side use a machine better than workers side by side; the curves are equal.
        scaling = (
            train.scaling
            if own_file
            else dataclasses.replace(train.scaling, workers="1", device="auto")
        )
        named = dataclasses.replace(train, name=f"{train.name}-search", scaling=scaling)
        return tyro.cli(
            SearchConfig,
            default=SearchConfig(train=named),
            args=arguments,
            prog="python -m tune.search",
            description=_DESCRIPTION,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


_DESCRIPTION = """python -m tune.search [PRESET | --config FILE.yaml] [--option value ...]

Search the number of experts N, the number chosen K, the balance weight lambda, or any other field
of a training run. Trial 0 is always the paper's point. The same command goes on where a search was
stopped or lost. Note that K alone moves the multiply-adds by about 2 %: where the cost matters,
search the width too (--space experts width --cost multiply_adds).

Presets: """ + ", ".join(PRESETS)


def comparable(config: SearchConfig) -> dict[str, Any]:
    """The fields that must be the same when a search goes on, flat."""
    free = tuple(FREE_TO_CHANGE)
    return {
        name: value
        for name, value in as_metrics(config).items()
        if not any(name == f or name.startswith(f + ".") for f in free)
    }
