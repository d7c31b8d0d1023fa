"""Checkpoints: written in the background, for any number of ranks and any ZeRO stage.

A checkpoint is a folder `RUN/checkpoints/SAMPLES-ATTEMPT` of

    weights.safetensors     the network as it trains
    ema.safetensors         its average, with the configuration: what is evaluated and exported
    optimizer.safetensors   Adam's moments, whole tensors by parameter name
    state.json              samples, updates, configuration, data, best score, MLflow's run
    checkpoint.json         the marker, written last: size and sha256 of each file above

A checkpoint is complete if its marker exists and all files match it; others are not used. Each
folder has a new name, so files of a killed process never mix with those of the next one. In an
object store `checkpoints/newest` names the newest one: some stores list new objects late.

An exact resume needs nothing else: the order of samples, their crops and noise, and the noise of
the gates are functions of the seed and the number of samples, not the state of a random generator.

    python -m distributed.checkpoint {list,show,verify,export,prune} RUN
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import fsspec
import tyro

from distributed.config import TrainConfig
from distributed.lease import exclusive
from measnet.config import from_dict
from shards.patience import retrying
from shards.storage import is_local, open_folder, read_json, write_whole
from shards.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "checkpoint.json"
STATE = "state.json"
NEWEST = "newest"
VERSION = 1
WEIGHTS, EMA, OPTIMIZER = (f"{kind}.safetensors" for kind in ("weights", "ema", "optimizer"))
FILES = {WEIGHTS, EMA, OPTIMIZER, STATE}
UNFINISHED = "it has no marker: it is being written, or was never finished"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run; with the tensors beside it, all that a resume needs."""

    samples: int
    """Samples consumed by completed steps: the position in the order of samples."""
    updates: int
    """Updates of the weights: steps less those skipped because of a gradient that was not
    finite."""
    config: dict[str, Any]
    """The configuration of the run."""
    data: str
    """Fingerprint of the shards that it trains on."""
    plan: dict[str, Any]
    """What determines the order of samples."""
    consumed: str = ""
    """Chained sha256 over the pixels of all samples trained on so far, in order."""
    best: float | None = None
    """Best validation score so far: PSNR in dB, averaged over the tasks."""
    score: float | None = None
    """Validation score of these weights, where they were validated."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """(samples, PSNR in dB averaged over the tasks) of every validation so far."""
    validation: dict[str, Any] = field(default_factory=dict)
    """The last validation: `at` how many samples, `psnr`, `gain_error` and its `report`."""
    mlflow_run_id: str | None = None
    """The MLflow run that a resumed run continues."""
    finished: bool = False
    """Whether the run had reached its end."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run; `problem` says whether it is complete."""

    fs: fsspec.AbstractFileSystem
    path: str
    marker: dict[str, Any]
    """Content of the marker; empty if `flaw` is set."""
    flaw: str | None = None
    """Why the marker cannot be used."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return PurePosixPath(self.path).name

    @property
    def samples(self) -> int:
        """Samples consumed when it was taken."""
        return int(self.name.partition("-")[0])

    @property
    def score(self) -> float | None:
        """Validation score, where it was validated."""
        score = self.marker.get("score")
        return None if score is None else float(score)

    def problem(self, *, hashes: bool = True) -> str | None:
        """What is wrong with it; None if every file is there and unchanged."""
        if self.flaw:
            return self.flaw
        for name, expected in self.marker["files"].items():
            file = f"{self.path}/{name}"
            if not self.fs.exists(file):
                return f"{name} is missing"
            size = self.fs.size(file)
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if hashes and _sha256(self.fs, file) != expected["sha256"]:
                return f"{name} was changed: its sha256 differs"
        return None

    def state(self) -> RunState:
        """Read the state of the run."""
        return RunState(**read_json(self.fs, f"{self.path}/{STATE}"))

    def tensors(self, kind: str) -> "dict[str, Tensor]":
        """Read `weights`, `ema` or `optimizer` as CPU tensors by name."""
        from safetensors.torch import load

        return load(self.fs.cat_file(f"{self.path}/{kind}.safetensors"))

    def export(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        """Write the averaged weights, with the configuration inside, to one .safetensors file; it
        appears under its name when it is complete."""
        write_whole(fs, path, self.fs.cat_file(f"{self.path}/{EMA}"))

    def remove(self) -> None:
        """Delete it."""
        _remove(self.fs, self.path)


@dataclass(frozen=True)
class Snapshot:
    """Tensors on the CPU and the state that belongs to them, ready to be written by another
    thread."""

    state: RunState
    weights: "Mapping[str, Tensor]"
    ema: "Mapping[str, Tensor]"
    optimizer: "Mapping[str, Tensor]"

    def write(self, run: str) -> Checkpoint:
        """Write a checkpoint into the run's folder, the marker last."""
        from safetensors.torch import save

        from measnet.network import FORMAT

        fs, root = open_folder(run)
        path = f"{root}/checkpoints/{self.state.samples:012d}-{secrets.token_hex(3)}"
        started = time.monotonic()
        fs.makedirs(path, exist_ok=True)
        model = {"format": FORMAT, "config": json.dumps(self.state.config["model"])}
        files = {
            WEIGHTS: save(dict(self.weights)),
            EMA: save(dict(self.ema), model),
            OPTIMIZER: save(dict(self.optimizer)),
            STATE: json.dumps(dataclasses.asdict(self.state), indent=2).encode(),
        }
        listed = {}
        for name, data in files.items():
            fs.pipe_file(f"{path}/{name}", data)
            listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        marker = {
            "version": VERSION,
            "samples": self.state.samples,
            "score": self.state.score,
            "written": time.time(),
            "seconds": round(time.monotonic() - started, 3),
            "files": listed,
        }
        fs.pipe_file(f"{path}/{MARKER}", json.dumps(marker, indent=2).encode())
        if not is_local(fs):
            fs.pipe_file(f"{root}/checkpoints/{NEWEST}", PurePosixPath(path).name.encode())
        return Checkpoint(fs, path, marker)


def listed(run: str) -> list[Checkpoint]:
    """All checkpoints of a run that have a marker, oldest first."""
    return [c for c in _all(run) if not c.flaw]


def newest_state(run: str) -> RunState | None:
    """State of the newest checkpoint, whose files are not verified; None if there is none."""
    there = listed(run)
    return there[-1].state() if there else None


def _all(run: str) -> list[Checkpoint]:
    """Also those without a marker, which come last among those of equal samples."""
    fs, root = open_folder(run)
    found = [_read(fs, folder) for folder in _folders(fs, root)]
    return sorted(found, key=lambda c: (c.samples, c.marker.get("written", float("inf"))))


def newest_complete(run: str, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest complete checkpoint; `say` gets a line for each newer one that is skipped."""
    there = _all(run)
    for checkpoint in reversed(there):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        say(f"checkpoint {checkpoint.name} is incomplete ({problem}); going back to the one before")
    if there:
        say("no checkpoint is complete; starting from the beginning")
    return None


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the best validation score."""
    scored = [c for c in checkpoints if c.score is not None]
    return max(scored, key=lambda c: (c.score, c.samples), default=None)


def prune(run: str, keep: int, written: "Checkpoint | None" = None) -> list[str]:
    """Keep the newest `keep` complete checkpoints and the best one; returns the names of those
    removed.

    `written`, if given, was written just now. It is kept also where others have more samples: after
    a damaged checkpoint a run resumes from an older one.

    Also removes checkpoints that are damaged or have no marker, so only the owner of the run may
    call it (`distributed.lease`): another process may be writing one.
    """
    fs, root = open_folder(run)
    complete = [c for c in listed(run) if c.problem(hashes=False) is None]
    if keep < 1:
        raise ValueError(f"--keep is {keep}, but must be at least 1")
    kept = {c.path for c in complete[-keep:]}
    if written is not None:
        kept.add(written.path)
    top = best(complete)
    if top is not None:
        kept.add(top.path)
    removed = []
    for folder in _folders(fs, root):
        if folder not in kept:
            _remove(fs, folder)
            removed.append(PurePosixPath(folder).name)
    return removed


def _remove(fs: fsspec.AbstractFileSystem, folder: str) -> None:
    """Delete a checkpoint, the marker first, so that a half-deleted one does not look complete."""
    for path, whole in ((f"{folder}/{MARKER}", False), (folder, True)):
        with contextlib.suppress(FileNotFoundError):  # an earlier try did it
            fs.rm(path, recursive=whole)


def _folders(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Folders of all checkpoints, oldest first."""
    folder = f"{root}/checkpoints"
    paths = []
    if fs.exists(folder):
        entries = fs.ls(folder, detail=True)
        paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
    if not is_local(fs) and fs.exists(f"{folder}/{NEWEST}"):
        newest = f"{folder}/{fs.cat_file(f'{folder}/{NEWEST}').decode()}"
        if newest not in paths and fs.exists(f"{newest}/{MARKER}"):
            paths.append(newest)
    return sorted(p for p in paths if re.fullmatch(r"\d{12}-[0-9a-f]{6}", PurePosixPath(p).name))


def _read(fs: fsspec.AbstractFileSystem, folder: str) -> Checkpoint:
    try:
        marker = read_json(fs, f"{folder}/{MARKER}")
    except FileNotFoundError:
        return Checkpoint(fs, folder, {}, UNFINISHED)
    except ValueError:  # neither JSON nor text
        return Checkpoint(fs, folder, {}, f"{MARKER} cannot be read")
    flaw = _flaw(marker)
    return Checkpoint(fs, folder, {}, flaw) if flaw else Checkpoint(fs, folder, marker)


def _flaw(marker: Any) -> str | None:
    """Why this is not a marker that this program wrote; None if it is."""
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        return f"{MARKER} lists no files"
    if marker.get("version") != VERSION:
        return f"{MARKER} has version {marker.get('version')}, but this program reads {VERSION}"
    if missing := sorted(FILES - set(marker["files"])):
        return f"{MARKER} does not list {', '.join(missing)}"
    for name, of_file in marker["files"].items():
        if not isinstance(of_file, dict) or not {"bytes", "sha256"} <= set(of_file):
            return f"{MARKER} gives no size and sha256 of {name}"
    return None if isinstance(marker.get("written"), (int, float)) else f"{MARKER} has no date"


def _sha256(fs: fsspec.AbstractFileSystem, path: str) -> str:
    if is_local(fs):
        return _digest(fs, path)
    return retrying("reading", fs.unstrip_protocol(path), lambda: _digest(fs, path))


def _digest(fs: fsspec.AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Command:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or URI of the run, such as runs/demo."""


@dataclass(frozen=True)
class List(_Command):
    """A line per checkpoint: samples, score, size, and whether it is complete."""


@dataclass(frozen=True)
class Show(_Command):
    """What the newest complete checkpoint holds."""

    json: bool = False
    """Print its whole state as JSON, with the configuration."""


@dataclass(frozen=True)
class Verify(_Command):
    """Read every byte of every checkpoint; exit code 1 if one is damaged. A checkpoint that is
    still being written, or was never finished, is shown but does not count as damaged."""


@dataclass(frozen=True)
class Export(_Command):
    """Write the averaged weights, with the configuration inside, to one .safetensors file."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The file to write."""
    which: Annotated[str, tyro.conf.arg(metavar="newest|best|NAME")] = "newest"
    """Which checkpoint."""


@dataclass(frozen=True)
class Prune(_Command):
    """Remove all but the newest checkpoints and the best one; refused while the run trains."""

    keep: int = 2
    """Newest checkpoints to keep."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code."""
    command = tyro.cli(
        List | Show | Verify | Export | Prune,
        args=argv,
        prog="python -m distributed.checkpoint",
    )
    try:
        return _run(command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(command: List | Show | Verify | Export | Prune) -> int:
    checkpoints = _all(command.run)
    if not checkpoints:
        raise ValueError(
            f"{command.run} holds no checkpoint; `ls {command.run}` shows what is there"
        )
    match command:
        case List() | Verify():
            return _print_table(checkpoints, hashes=isinstance(command, Verify))
        case Show():
            chosen = _choose(checkpoints, "newest")
            _print_state(chosen, whole=command.json)
        case Export():
            chosen = _choose(checkpoints, command.which)
            chosen.export(*open_folder(command.out))
            print(f"wrote {command.out}: the averaged weights after {chosen.samples:,} samples")
        case Prune():
            with exclusive(command.run, say=print):
                removed = prune(command.run, command.keep)
            print(
                f"removed {counted(len(removed), 'checkpoint')}"
                + "".join(f"\n  {name}" for name in removed)
            )
    return 0


def _print_state(chosen: Checkpoint, *, whole: bool) -> None:
    state = chosen.state()
    state.validation.pop("report", None)  # long; the folder `validation` of the run has it
    if whole:
        print(json.dumps(dataclasses.asdict(state), indent=2))
        return
    config = from_dict(TrainConfig, state.config)
    recipe, model = config.recipe, config.model
    ended = "the run is finished" if state.finished else "the run can resume from it"
    degradations = state.plan.get("degradations", {})
    lines = {
        "checkpoint": chosen.path,
        "samples": f"{state.samples:,} of {recipe.samples:,}; {ended}",
        "updates": f"{state.updates:,}, each of {recipe.global_batch} samples",
        "validation": ", ".join(f"{psnr:.2f} dB at {at:,}" for at, psnr in state.validations[-5:])
        or "none so far",
        "network": f"{model.variant}, dim {model.dim}, {model.pixel_experts} pixel and "
        f"{model.image_experts} picture experts",
        "optimizer": f"{recipe.optimizer}, lr {recipe.lr:g}, seed {config.seed}",
        "data": f"{config.data.train}: {', '.join(degradations) or 'not recorded'}",
        "MLflow run": state.mlflow_run_id or "none",
        "files": ", ".join(
            f"{name} {entry['bytes'] / 2**20:.1f} MiB"
            for name, entry in chosen.marker["files"].items()
        ),
    }
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    print("the configuration is in config.yaml of the run; --json prints the whole state")


def _choose(checkpoints: Sequence[Checkpoint], which: str) -> Checkpoint:
    complete = [c for c in checkpoints if c.problem() is None]
    chosen = {"newest": complete[-1] if complete else None, "best": best(complete)}
    chosen.update({c.name: c for c in complete})
    found = chosen.get(which)
    if found is None:
        raise ValueError(
            f"no complete checkpoint {which!r}; complete are: {', '.join(c.name for c in complete)}"
        )
    return found


def _print_table(checkpoints: Sequence[Checkpoint], *, hashes: bool) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "samples", "PSNR", "MiB", "state")
    damaged = 0
    for c in checkpoints:
        problem = c.problem(hashes=hashes)
        damaged += problem is not None and problem != UNFINISHED
        size = sum(f["bytes"] for f in c.marker.get("files", {}).values()) / 2**20
        score = "" if c.score is None else f"{c.score:.2f}"
        found = "complete" if hashes else "complete (sizes only; `verify` reads every byte)"
        table.add_row(c.name, f"{c.samples:,}", score, f"{size:.1f}", problem or found)
    Console().print(table)
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
