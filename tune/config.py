"""`SearchConfig`: all settings of a search, and its command line. Imports neither torch nor Ray."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from distributed.config import TrainConfig
from distributed.options import exit_on_error, read_options
from distributed.presets import PRESETS, starting_point
from shards.config import MAY_CHANGE

Cost = Literal["none", "multiply_adds", "parameters", "latency"]

Register = Literal["if-better", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a search. The fields of a training run hold for all trials."""

    trials: int = field(default=20, metadata=MAY_CHANGE)
    """Trials in all; the same command with a larger number adds trials. Fixed lists (ablation,
    tasks) ignore it."""
    space: tuple[str, ...] = ("experts",)
    """What to search: `experts` (N and K of both kinds, and lambda), `width`, a FILE.yaml of
    `field: range`, or several of them; or a fixed list: `ablation` (Table VI), `tasks` (Fig. 8)."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Search one more field, as in `--vary "recipe.lr=log 1e-4..1e-2"`, `--vary model.dim=16,24`;
    may be given several times."""
    samples: int = 0
    """Samples per trial; 0 trains each trial for the full length of the preset."""
    validations: int = 9
    """Validations per trial, at equal distances; ASHA and PBT act at these."""
    algorithm: Literal["tpe", "random"] = "tpe"
    """How new trials are chosen: Optuna's TPE learns from earlier trials, `random` does not."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` stops trials that are not among the best, except trial 0. With `pbt` the worst trials
    take over the weights of better ones, and the searched recipe.* fields are varied. `none` trains
    all trials to the end, as is always done with fixed lists."""
    cost: Cost = "none"
    """A second objective, to be low while PSNR is high: `multiply_adds` (of 256x256 pixels),
    `parameters` or measured `latency`. K alone changes the multiply-adds by about 2 %: search the
    width too (`--space experts width`) if the cost matters."""
    reduction: int = 3
    """ASHA keeps the best 1/reduction of the trials at each rung."""
    grace: int = 0
    """Samples that every trial gets before ASHA may stop it; 0: 1/reduction^2 of a trial."""
    parallel: int = field(default=0, metadata=MAY_CHANGE)
    """Trials at the same time; 0: as many as fit on the nodes that are there, two on one machine
    without GPU. A cluster that starts nodes on demand starts enough for this number, or for one."""
    search_seed: int = 0
    """Seed for the choice of trials; `--seed` is the seed of the training."""
    keep: int = field(default=3, metadata=MAY_CHANGE)
    """Number of best trials whose checkpoints are kept; those of the others are deleted."""
    register: Register = field(default="if-better", metadata=MAY_CHANGE)
    """Whether the best trial gets the alias `champion` in MLflow's model registry. `if-better`:
    only if its PSNR is higher than the present champion's on the same validation data by the same
    protocol, and above noise."""
    model_name: str = field(default="measnet", metadata=MAY_CHANGE)
    """Name of the model in MLflow's registry."""
    retry_failed: bool = field(default=False, metadata=MAY_CHANGE)
    """Train failed trials once more when the search resumes."""
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
        if not re.fullmatch(r"[\w.-]+", self.model_name):
            raise ValueError(
                f"--model-name is {self.model_name!r}; use letters, digits, dot and dash"
            )
        steps = self.budget // self.train.recipe.global_batch
        if steps < self.validations:
            raise ValueError(
                f"a trial of {self.budget} samples has {steps} steps of "
                f"{self.train.recipe.global_batch}, fewer than --validations {self.validations}"
            )

    @property
    def budget(self) -> int:
        """Samples of a trial that runs to its end, in whole steps."""
        batch = self.train.recipe.global_batch
        return -(-(self.samples or self.train.recipe.samples) // batch) * batch

    @property
    def fixed(self) -> bool:
        """Whether the space is a fixed list, whose rows are all trained to the end."""
        return bool({"ablation", "tasks"} & set(self.space))

    @property
    def folder(self) -> str:
        """Folder or URI of the search."""
        return self.train.folder

    def base(self) -> TrainConfig:
        """What all trials have in common: a recipe of `budget` samples, validated at `interval`."""
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
        """Samples between two validations, in whole steps."""
        batch = self.train.recipe.global_batch
        return -(-(self.budget // batch) // self.validations) * batch

    @property
    def first_rung(self) -> int:
        """Samples that every trial gets before ASHA may stop it."""
        return self.grace or max(self.interval, self.budget // self.reduction**2)


def parse(argv: Sequence[str] | None = None) -> SearchConfig:
    """Read `[preset | --config FILE.yaml] [--search-option value ...] [--section.field value ...]`.

    Prints one message and exits with code 2 where the command line is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error():
        own_file = "--config" in arguments
        train = starting_point(arguments)
        # Several trials use a machine better than several workers; the curves are the same.
        scaling = train.scaling
        if not own_file:
            scaling = dataclasses.replace(scaling, workers="1", device="auto")
        train = dataclasses.replace(train, name=f"{train.name}-search", scaling=scaling)
        return read_options(
            SearchConfig(train=train),
            arguments,
            prog="python -m tune.search",
            description=_DESCRIPTION,
        )


_DESCRIPTION = """python -m tune.search [PRESET | --config FILE.yaml] [--option value ...]

Search the number of experts N, the number chosen K, the balance weight lambda, or any other field
of a training run. Trial 0 is always the paper's point. The same command resumes a search that was
stopped or killed. K alone changes the multiply-adds by about 2 %: if the cost matters, search the
width too (--space experts width --cost multiply_adds).

Presets: """ + ", ".join(PRESETS)
