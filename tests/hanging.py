"""`python -m distributed.train`, but one of its workers can be made to hang in a collective.

Where the file named by the environment variable MEASNET_TEST_HANG appears, the first worker that
enters an all-reduce removes it and never comes out of it. The other workers then wait for it in the
real collective.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from rich.console import Console

from distributed.launch import launch
from distributed.presets import parse
from distributed.train import show

FLAG = "MEASNET_TEST_HANG"
"""Environment variable: file that makes a worker hang."""


def hang_on(flag: Path) -> None:
    """In a worker: make its all-reduce look for the file first."""
    all_reduce = dist.all_reduce

    def maybe_hang(*arguments: Any, **options: Any) -> Any:
        try:
            flag.unlink()
        except FileNotFoundError:
            return all_reduce(*arguments, **options)
        while True:
            time.sleep(1.0)

    dist.all_reduce = maybe_hang


class HangOn(WorkerGroupCallback):
    """Prepares each group of workers before it trains."""

    def __init__(self, flag: Path) -> None:
        self._flag = flag

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(hang_on, self._flag)


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the options of the command line; returns the exit code."""
    console = Console(soft_wrap=True)
    callback = HangOn(Path(os.environ[FLAG]))
    outcome = launch(parse(argv), console=console, callbacks=[callback])
    show(outcome, console)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
