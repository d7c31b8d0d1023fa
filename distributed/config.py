"""`TrainConfig`: all settings of a training run, from and to YAML.

Imports neither torch nor Ray, so a wrong field is reported in a fraction of a second. Lengths and
intervals are in samples, not in steps, so a recipe means the same on any number of workers.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from measnet.config import ModelConfig, from_dict, to_dict
from shards.config import MAY_CHANGE, DataConfig
from shards.tasks import DEGRADATIONS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimisation, in samples: the same curve on any number of workers."""

    samples: int = 150 * 162_646
    """Length of the run, in samples."""
    global_batch: int = 32
    """Samples per optimizer step, over all workers and accumulation."""
    micro_batch: int = 4
    """Samples per forward pass. Part of the recipe: batch norm and the balance loss see one
    micro-batch."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """`adam` as in the paper; `adamw` as in the authors' program; `muon`: Muon for the matrices,
    AdamW for the rest."""
    lr: float = 2e-4
    """Peak learning rate."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices with optimizer muon: the size of an update's singular
    values. It follows the same schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay with adamw and muon, L2 penalty with adam."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    warmup_samples: int = 0
    """Samples over which the learning rate rises linearly to its peak; then a cosine falls to
    zero."""
    clip: float = 1.0
    """Largest norm of the global gradient; 0 does not clip."""
    balance_weight: float = 1e-4
    """Lambda, the weight of the balance loss (Eq. 12)."""
    frequency_weight: float = 0.0
    """Weight of the L1 loss between the spectra, beside that between the pictures; 0 as in the
    paper, others use 0.1."""
    ema_decay: float = 0.999
    """Decay per optimizer step of the averaged weights that are evaluated and exported; 0 keeps no
    average."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.samples // self.global_batch)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one global batch."""
        return self.global_batch // self.micro_batch

    @property
    def worker_counts(self) -> list[int]:
        """Numbers of workers that can share the micro-batches evenly."""
        return [n for n in range(1, self.micro_batches + 1) if self.micro_batches % n == 0]

    def __post_init__(self) -> None:
        """Refuse values out of range, and batches that do not divide evenly."""
        for name in ("samples", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}, but must be at least 1")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"recipe.global_batch {self.global_batch} must be a multiple of "
                f"recipe.micro_batch {self.micro_batch}"
            )
        if not 0 <= self.warmup_samples < self.samples:
            raise ValueError(
                f"recipe.warmup_samples is {self.warmup_samples}, but must lie below "
                f"recipe.samples ({self.samples})"
            )
        for name, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("ema_decay", 0, 1)):
            if not low <= getattr(self, name) < high:
                raise ValueError(
                    f"recipe.{name} is {getattr(self, name)}, but must lie in [{low}, {high})"
                )
        for name in ("clip", "balance_weight", "frequency_weight", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"recipe.{name} is {getattr(self, name)}, but must not be negative"
                )
        for name in ("lr", "muon_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}, but must be above 0")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the recipe; changes the result by rounding only."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO shards over the workers: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    weights. The state of 30 million parameters takes 0.6 GB, so sharding it saves little."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward pass; weights and their gradients stay fp32. `auto`: bf16 on a GPU
    that has it (RTX 30, A100 and newer), else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each transformer block. `auto`: off. `on` costs about a minute before the
    first step, and needs a C compiler and Python's headers on each node."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute transformer blocks in the backward pass: less memory, about a third more time.
    `auto`: on if the micro-batch would not fit on the GPU otherwise."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Run the forward and backward pass of a micro-batch as one CUDA graph, so that the GPU does
    not wait for the host. `auto`: on a GPU, if it is possible; the log says why not."""
    deterministic: Literal["on", "off"] = "off"
    """`on`: only deterministic algorithms, so that a resumed run on a GPU has the same bits as an
    uninterrupted one; slower. A CPU is deterministic anyway."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Number and device of the workers, and how long to wait for them."""

    workers: str = "1"
    """Training processes: a number, or a range such as 1..8 within which Ray may add and remove
    workers."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """`auto`: one GPU per worker if the cluster has any now, else the CPU; set `gpu` if GPU nodes
    start later."""
    cpus_per_worker: int = 0
    """CPU cores per worker; 0: an equal part of this machine's; on a cluster 1, or 4 with a GPU."""
    max_failures: int = 3
    """Restarts in a row without a new checkpoint before the run fails; -1: no limit. Restarts that
    make progress are not limited."""
    stop_grace_s: float = 0.0
    """Seconds that the platform gives after a request to stop, such as Kubernetes'
    terminationGracePeriodSeconds; the last checkpoint is written within it. 0: within
    RAY_JOB_STOP_WAIT_TIME_S in a Ray job, else as long as checkpoints take."""
    preemption_notice: Literal["auto", "aws", "gcp", "off"] = "auto"
    """Cloud whose metadata server is asked whether it takes the node away; then a checkpoint is
    saved at once. `auto`: the one that the machine names, if any."""
    start_timeout_s: float = 60.0
    """Seconds to wait for the workers' resources; then a message says what is missing, and the wait
    starts again."""
    resize_interval_s: float = 60.0
    """With a range of workers: seconds between two checks for more resources. Each change costs a
    restart from the last checkpoint."""
    health_timeout_s: float = 30.0
    """Seconds without an answer after which a worker counts as lost. Also: a step that takes longer
    than this plus three usual steps counts as hung, and the workers are restarted."""
    give_up_s: float = 1800.0
    """Seconds without any worker after which the run ends; the same command resumes it."""
    collective_timeout_s: float = 600.0
    """Seconds after which a collective operation that does not finish counts as a failure. Also the
    limit for waiting for data, the first steps (which may compile), validating a picture and
    writing a checkpoint."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest number of workers."""
        low, _, high = self.workers.partition("..")
        return int(low), int(high or low)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        low, high = self.bounds
        return low < high

    def __post_init__(self) -> None:
        """Refuse a malformed range and values out of range."""
        if (
            not re.fullmatch(r"[1-9]\d*(\.\.[1-9]\d*)?", self.workers)
            or self.bounds[0] > self.bounds[1]
        ):
            raise ValueError(
                f"scaling.workers is {self.workers!r}; write a number (4) or a range (1..8)"
            )
        if self.cpus_per_worker < 0:
            raise ValueError(
                f"scaling.cpus_per_worker is {self.cpus_per_worker}, but must be 0 or more"
            )
        if self.stop_grace_s < 0:
            raise ValueError(f"scaling.stop_grace_s is {self.stop_grace_s}, but must be 0 or more")
        if self.max_failures < -1:
            raise ValueError(f"scaling.max_failures is {self.max_failures}, but must be -1 or more")
        for name in (
            "start_timeout_s",
            "resize_interval_s",
            "health_timeout_s",
            "give_up_s",
            "collective_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"scaling.{name} is {getattr(self, name)}, but must be above 0 seconds"
                )


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """Checkpoints, validations and logs; intervals in samples, rounded up to whole steps."""

    checkpoint: int = field(default=50_000, metadata=MAY_CHANGE)
    """Samples between checkpoints; one is always written at the end."""
    keep_checkpoints: int = field(default=2, metadata=MAY_CHANGE)
    """Checkpoints kept besides the best one."""
    validate: int = field(default=160_000, metadata=MAY_CHANGE)
    """Samples between validations; 0 validates only at the end."""
    validation_pictures: int = field(default=20, metadata=MAY_CHANGE)
    """Pictures restored per degradation in a validation during training; 0 takes all."""
    validation_degradations: tuple[str, ...] = ()
    """Only these are validated, such as `denoise_25`; empty: all that the set holds."""
    log: int = field(default=320, metadata=MAY_CHANGE)
    """Samples between two points of the curves in MLflow."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name, least in (
            ("checkpoint", 1),
            ("keep_checkpoints", 1),
            ("validate", 0),
            ("validation_pictures", 0),
            ("log", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"every.{name} is {getattr(self, name)}, but must be at least {least}"
                )
        for degradation in self.validation_degradations:
            if degradation not in DEGRADATIONS:
                raise ValueError(
                    f"every.validation_degradations names {degradation!r}; known: "
                    + ", ".join(DEGRADATIONS)
                )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when the loss or a gradient is not finite, or the loss jumps."""

    skips_in_a_row: int = 10
    """After so many updates in a row are skipped because of a gradient that is not finite, the run
    goes back to its last checkpoint and leaves out the samples of those steps."""
    spike: float = 8.0
    """A loss this many standard deviations above its running mean is logged with its samples."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.skips_in_a_row < 1:
            raise ValueError(f"guard.skips_in_a_row is {self.skips_in_a_row}; use 1 or more")
        if self.spike <= 0:
            raise ValueError(f"guard.spike is {self.spike}, but must be above 0")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow records the run."""

    uri: str = ""
    """Tracking server or database; empty: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in this
    folder."""
    experiment: str = "measnet"
    """MLflow experiment that the run belongs to."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    name: str = field(default="paper-5task", metadata=MAY_CHANGE)
    """Name of the run; the same name in the same storage resumes from its last checkpoint."""
    storage: str = field(default="runs", metadata=MAY_CHANGE)
    """Folder or URI of runs, reachable from all nodes; the run is in STORAGE/NAME."""
    seed: int = 0
    """Seed of weights, order, crops, flips, noise and gates."""
    init: str = field(default="", metadata=MAY_CHANGE)
    """Weights that a new run starts from: a run folder or URI, a .safetensors file, a checkpoint of
    the authors' program, or `small`, which comes with the program; all workers must reach it.
    Empty: random weights. A run that resumes does not use it."""
    profile: int = field(default=0, metadata=MAY_CHANGE)
    """Optimizer steps that are recorded with torch's profiler, after three to warm up, into the
    run's folder `profile`; 0 records none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: Recipe = field(default_factory=Recipe)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=MAY_CHANGE)
    scaling: ScalingConfig = field(default_factory=ScalingConfig, metadata=MAY_CHANGE)
    every: IntervalConfig = field(default_factory=IntervalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig, metadata=MAY_CHANGE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check what depends on several sections."""
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name in (".", ".."):
            raise ValueError(
                f"name is {self.name!r}; use letters, digits, dot, dash and underscore"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, but must lie in [0, 2^63)")
        if self.profile < 0:
            raise ValueError(f"profile is {self.profile} steps, but must be 0 or more")
        if self.recipe.optimizer == "muon" and self.engine.zero_stage:
            raise ValueError(
                f"recipe.optimizer muon needs whole matrices on each worker, but engine.zero_stage "
                f"is {self.engine.zero_stage}; set it to 0, or take adamw"
            )
        for samples, side in self.data.crop_changes:
            if samples < self.recipe.samples and samples % self.recipe.global_batch:
                raise ValueError(
                    f"data.later_crops changes to crops of {side} after {samples} samples, which "
                    f"must be a multiple of recipe.global_batch ({self.recipe.global_batch})"
                )
        workers, _ = self.scaling.bounds
        if not self.scaling.elastic and self.recipe.micro_batches % workers:
            raise ValueError(
                f"recipe.global_batch {self.recipe.global_batch} is {self.recipe.micro_batches} "
                f"micro-batches of {self.recipe.micro_batch}, which scaling.workers {workers} "
                "cannot share evenly; "
                f"use {', '.join(map(str, self.recipe.worker_counts))} workers, or change "
                "recipe.global_batch"
            )

    @property
    def folder(self) -> str:
        """Folder or URI of this run."""
        return f"{self.storage.rstrip('/')}/{self.name}"


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `from_yaml` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(text: str) -> TrainConfig:
    """Read a configuration; fields that are left out keep their defaults.

    Raises:
        ValueError: not YAML, unknown field, wrong type or value.
    """
    try:
        data = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    return from_dict(TrainConfig, data or {})


class _YamlLoader(yaml.SafeLoader):
    """Also reads 1e-4 as a number; in YAML 1.1 it is a string."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def flat_fields(config: Any) -> dict[str, Any]:
    """`section.field -> value` of a configuration: a dataclass, or its `to_dict`.

    MLflow's parameters have this form.
    """

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                k: v
                for name, inner in value.items()
                for k, v in walk(f"{prefix}{name}.", inner).items()
            }
        return {prefix[:-1]: value}

    return walk("", to_dict(config))


def changed_fields(
    old: Mapping[str, Any], new: Any, *, fixed: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """Fields that a resume must not change and that differ, as `recipe.lr 0.001 (now 0.002)`.

    Args:
        old: the configuration at the start, from `to_dict`. Fields that it lacks are new in this
            version and are not compared.
        new: the configuration now, a dataclass. Its fields marked `MAY_CHANGE` may differ.
        fixed: dotted names that must not change although they are marked.
        prefix: dotted path of `new`, for the messages.
    """
    found: list[str] = []
    for field_ in dataclasses.fields(new):
        name, value = prefix + field_.name, getattr(new, field_.name)
        free = field_.metadata.get("may_change") and name not in fixed
        if free or field_.name not in old:
            continue
        before = old[field_.name]
        if dataclasses.is_dataclass(value):
            found += changed_fields(before, value, fixed=fixed, prefix=f"{name}.")
        elif before != (now := list(value) if isinstance(value, tuple) else value):
            found.append(f"{name} {before} (now {now})")
    return found
