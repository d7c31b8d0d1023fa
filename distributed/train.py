"""Train: `python -m distributed.train [PRESET | --config FILE.yaml] [--section.field value ...]`.

`--dry-run` prints the configuration and the decisions, and starts nothing. The same command
resumes a run that was stopped or lost. On a cluster: `make wheel`, then
`ray job submit --working-dir dist/job -- python -m distributed.train ...`.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.presets import parse

if TYPE_CHECKING:
    from rich.console import Console

    from distributed.launch import Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_only = "--dry-run" in arguments
    config = parse([argument for argument in arguments if argument != "--dry-run"])
    from rich.console import Console

    from distributed.cluster import starts_its_own_ray
    from distributed.dry_run import dry_run
    from distributed.launch import launch, resolve
    from measnet.hardware import this_machine

    console = Console(soft_wrap=True)
    try:
        if show_only:
            machine = this_machine() if starts_its_own_ray() else None
            print(dry_run(resolve(config), machine), end="")
            return 0
        outcome = launch(config, console=console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(outcome, console)
    return outcome.exit_code


def ui_command(tracking_uri: str) -> str:
    """The command that shows runs in a browser, or the address of the tracking server."""
    if not tracking_uri.startswith("sqlite:"):
        return tracking_uri
    program = str(Path(sys.executable).parent / "mlflow")
    return shlex.join([program, "ui", "--host", "127.0.0.1", "--backend-store-uri", tracking_uri])


def show(outcome: "Outcome", console: "Console") -> None:
    """Print how the run ended, where its results are and what to do next."""
    from rich.markup import escape

    from distributed.mlflow_tracker import run_page

    reason = escape(outcome.reason)  # messages of libraries may contain [brackets]
    again = "the same command resumes it"
    match outcome.status:
        case "finished":
            console.print(f"finished {outcome.samples:,} samples in {outcome.seconds:.0f} s")
            console.print(f"  weights   {outcome.folder}/model.safetensors")
            console.print(f"  MLflow    {ui_command(outcome.tracking_uri)}", soft_wrap=True)
            if outcome.goodput is not None:
                console.print(f"  goodput   {outcome.goodput}", highlight=False)
            if outcome.mlflow_run_id:
                page = run_page(outcome.tracking_uri, outcome.mlflow_run_id)
                console.print(f"  this run  {page}", soft_wrap=True)
        case "stopped":
            console.print(f"stopped ({reason}) after {outcome.samples:,} samples; {again}")
            if outcome.goodput is not None:
                console.print(f"  goodput   {outcome.goodput}", highlight=False)
        case "failed":
            where = f"after {outcome.samples:,} samples"
            console.print(f"[red]failed[/red] {where}: {reason}; {again}")


if __name__ == "__main__":
    sys.exit(main())
