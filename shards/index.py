"""Indexes WebDataset tars in place: `python -m shards.index TARS --task TASK --clean FIELD`.

TARS are folders, tars or patterns, local or in a store. The tars stay as they are; a manifest and
an index for each tar are written beside them, or into `--out`. Then training reads them like packed
shards. See docs/data.md.
"""

# The indexing itself is imported in main(): Ctrl-C must end the command quietly from its first
# moment, and the imports take a second.
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from shards import interrupt
from shards.tasks import DEGRADATIONS, PAPER_TASKS

if TYPE_CHECKING:
    from shards.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Indexes WebDataset tars that another program wrote, so that training reads them in place."""

    tars: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TARS")]
    """Folders, tars, or quoted patterns such as 'data/train-{000..009}.tar' or 's3://b/*.tar'."""
    task: Annotated[str, tyro.conf.arg(metavar="TASK")]
    """What the network learns from them: denoise, derain, dehaze, deblur, lowlight or mixed."""
    clean: Annotated[str, tyro.conf.arg(metavar="FIELD")]
    """Field of the clean pictures: what follows the first dot of their file names, such as png or
    gt.png; 'jpg;png' takes the first one that a sample has."""
    degraded: Annotated[str | None, tyro.conf.arg(metavar="FIELD")] = None
    """Field of the degraded pictures; left out for denoise, whose noise is added while loading."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder or URI for manifest and indexes; by default the folder of the tars."""
    skip_corrupt: bool = False
    """Leave out samples that cannot be decoded or lack a picture, instead of refusing the set."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes; by default one per core."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 2 with one line on stderr, or 130 after Ctrl-C."""
    try:
        options = tyro.cli(
            Arguments,
            args=argv,
            prog="python -m shards.index",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        from shards.indexing import index

        named = dict(vars(options))
        result = index(*named.pop("tars"), progress=sys.stderr.isatty(), **named)
    except KeyboardInterrupt:
        print("stopped; run the same command again", file=sys.stderr)
        return interrupt.EXIT_CODE
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    _print_result(result, options.task)
    return 0


def _print_result(result: "Manifest", task: str) -> None:
    shards = result.shards_of(task)
    size = sum(shard.bytes for shard in shards) / 1e6
    tars = "1 tar" if len(shards) == 1 else f"{len(shards):,} tars"
    print(f"{result.uri}: {task} {result.counts[task]:,} samples in {tars}, {size:,.1f} MB")
    left_out = result.tasks[task].missing
    if left_out:
        print(f"left out {len(left_out):,} corrupt (listed in the manifest); first: {left_out[0]}")
    print(f"check them by: python -m shards.inspect {shlex.quote(result.uri)}")
    print(f"train by: {_train_command(result)}")


def _train_command(result: "Manifest") -> str:
    """How to train on all tasks of a set; VALIDATION stands for a folder that the user has."""
    command, tasks = "python -m distributed.train", list(result.tasks)
    if not set(tasks) <= set(PAPER_TASKS):
        uses = ", ".join(f"{name}: 1" for name, row in DEGRADATIONS.items() if row.task in tasks)
        line = f"data: {{train: {result.uri}, validation: VALIDATION, repeats: {{{uses}}}}}"
        return f"{command} --config FILE.yaml, where FILE.yaml has the line `{line}`"
    preset = f"paper-single-{tasks[0]}" if len(tasks) == 1 else "paper-5task"
    data = f"--data.train {shlex.quote(result.uri)} --data.validation VALIDATION"
    absent = [n for n, row in DEGRADATIONS.items() if row.task in set(PAPER_TASKS) - set(tasks)]
    zeros = [f"--data.repeats.{name.replace('_', '-')} 0" for name in absent if len(tasks) > 1]
    return " ".join([command, preset, data, *zeros])


if __name__ == "__main__":
    sys.exit(interrupt.run_command(main))
