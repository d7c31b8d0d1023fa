"""Train: `python -m distributed.train [PRESET | --config FILE.yaml] [--section.field value ...]`.

The same command resumes a run that was stopped or lost. On a cluster:
`ray job submit --working-dir . -- python -m distributed.train ...`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distributed.presets import parse

if TYPE_CHECKING:
    from rich.console import Console

    from distributed.launch import Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    config = parse(argv)
    from rich.console import Console

    from distributed.launch import launch

    console = Console(soft_wrap=True)
    try:
        outcome = launch(config, console=console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(outcome, console)
    return outcome.exit_code


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
            store = f"--backend-store-uri {outcome.tracking_uri}"
            console.print(f"  MLflow    mlflow ui --host 127.0.0.1 {store}")
            if outcome.mlflow_run_id:
                page = run_page(outcome.tracking_uri, outcome.mlflow_run_id)
                console.print(f"  this run  {page}", soft_wrap=True)
        case "stopped":
            console.print(f"stopped ({reason}) after {outcome.samples:,} samples; {again}")
        case "failed":
            where = f"after {outcome.samples:,} samples"
            console.print(f"[red]failed[/red] {where}: {reason}; {again}")


if __name__ == "__main__":
    sys.exit(main())
