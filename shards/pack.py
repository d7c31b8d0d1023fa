"""Packs a folder of pictures into shards: `python -m shards.pack LAYOUT ROOT OUT`.

OUT is a folder or an object store, and may hold several tasks: pack them one after the other. A
stopped or killed packing continues when the same command is run again. See docs/data.md.
"""

# The packing itself is imported in main(): Ctrl-C must end the command quietly from its first
# moment, and the imports take a second.
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from shards import interrupt
from shards.layouts import LAYOUTS
from shards.tasks import TASKS
from shards.wording import counted

if TYPE_CHECKING:
    from shards.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Packs a folder of pictures into shards."""

    layout: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LAYOUT")]
    """How the source folder is organised; one of the names above."""
    root: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]
    """Folder of the source pictures."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder, or URI of an object store, for the shards."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Task of a `paired` folder: denoise, derain, dehaze, deblur, lowlight or mixed."""
    synthesise: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[TASK ...]")] = ()
    """Make degraded pictures for these tasks from clean ones: dehaze, derain, deblur, lowlight,
    or a chain of two or three such as dehaze+lowlight+denoise, packed as the task `mixed`."""
    severity: Annotated[dict[str, float], tyro.conf.arg(metavar="[TASK FACTOR ...]")] = field(
        default_factory=dict
    )
    """Make what is synthesised weaker, by a factor in (0, 1] for each task: `deblur 0.5` makes
    blur that reaches half as far."""
    seed: int = 0
    """Seed of what is synthesised."""
    shard_mib: float = 256
    """Approximate size of a shard in MiB."""
    tiles: Annotated[int, tyro.conf.arg(metavar="SIDE")] = 0
    """Cut lossless pictures into tiles of this side in pixels (128 suits training); 0: whole."""
    allow_missing: bool = False
    """Go on where a benchmark is not complete."""
    repair: bool = False
    """Pack only the missing and damaged shards of OUT again."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Processes; by default one per core."""
    ray: bool = False
    """Pack on the Ray cluster of RAY_ADDRESS; its nodes must reach ROOT and OUT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 2 with one line on stderr, or 130 after Ctrl-C."""
    try:
        options = tyro.cli(
            Arguments,
            args=argv,
            prog="python -m shards.pack",
            description=_description(),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        from shards.packing import pack

        result = pack(progress=sys.stderr.isatty(), **vars(options))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return interrupt.EXIT_CODE
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    _print_result(result)
    return 0


def _description() -> str:
    lines = ["Packs a folder of pictures into shards. Layouts, their samples and files:"]
    for name, row in LAYOUTS.items():
        count = f"{row.expected:,}" if row.expected else "any"
        lines.append(f"  {name:14} {count:>6}  {row.shape}")
    return "\n".join(lines)


def _print_result(result: "Manifest") -> None:
    size = sum(shard.bytes for shard in result.shards)
    counts = ", ".join(f"{task} {result.counts[task]:,}" for task in TASKS if task in result.counts)
    print(
        f"{result.uri}: {counts} samples in {counted(len(result.shards), 'shard')}, {_bytes(size)}"
    )
    for task, entry in result.tasks.items():
        if entry.leaks:
            total = len(entry.leaks)
            more = f" … ({total} in all, see the manifest)" if total > 2 else ""
            print(f"note: {task}: {'; '.join(entry.leaks[:2])}{more}")
    print(f"check them by: python -m shards.inspect {shlex.quote(result.uri)}")


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(interrupt.run_command(main))
