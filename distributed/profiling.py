"""Some steps of a run in detail: what the host and the GPU do when, and what takes the memory.

    python -m distributed.train local-4090 --profile 5

Rank 0 records them with torch's profiler and writes the files into the run's folder.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from distributed.config import TrainConfig
from distributed.internals.torch import start_memory_history, write_memory_history
from shards.storage import join, open_folder, upload

WARM_STEPS = 3
"""Steps before the recording, in which kernels are chosen and caches fill."""
FOLDER = "profile"
TRACE, MEMORY = "trace.json", "memory.pickle"
"""Files in FOLDER of a run: a trace in Chrome's format, and the GPU's allocations."""


class Profiling:
    """Records `config.profile` steps of rank 0 once, after `WARM_STEPS`."""

    def __init__(
        self, config: TrainConfig, rank: int, device: torch.device, note: Callable[[str], object]
    ) -> None:
        """Wait for the warm steps.

        Args:
            config: of the run.
            rank: of this process; others than 0 record nothing.
            device: that this process computes on.
            note: takes the line that says where the files are.
        """
        self._steps = config.profile if rank == 0 else 0
        self._folder = join(config.folder, FOLDER)
        self._device, self._note = device, note
        self._done = 0
        self._profile: profile | None = None

    def after_step(self, *, last: bool) -> None:
        """Count an optimizer step; `last`: the run ends with it, and so does the recording."""
        self._done += 1
        if self._profile and (last or self._done == WARM_STEPS + self._steps):
            self._finish(self._profile)
            self._profile = None
        elif self._steps and self._done == WARM_STEPS and not last:
            self._profile = self._start()
        elif self._steps and last and self._done <= WARM_STEPS:
            self._note(
                f"no profile: the run ended after {self._done} steps, and recording begins after "
                f"{WARM_STEPS}"
            )

    def _start(self) -> profile:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            start_memory_history()
        gpu = [ProfilerActivity.CUDA] if on_gpu else []
        started = profile(activities=[ProfilerActivity.CPU, *gpu])
        started.start()
        return started

    def _finish(self, recorded: profile) -> None:
        """Write the files; if that fails, say so and continue to train."""
        recorded.stop()
        shown = {TRACE: "https://ui.perfetto.dev"}
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            try:
                if self._device.type == "cuda":  # first: it also ends the recording of memory
                    write_memory_history(local / MEMORY)
                    shown[MEMORY] = "https://pytorch.org/memory_viz"
                recorded.export_chrome_trace(str(local / TRACE))
                fs, path = open_folder(self._folder)
                fs.makedirs(path, exist_ok=True)
                for name in shown:
                    upload(str(local / name), join(self._folder, name))
            except OSError as error:
                self._note(f"warning: the profile could not be written to {self._folder}: {error}")
                return
        opened = (f"open {join(self._folder, name)} at {page}" for name, page in shown.items())
        files = "; ".join(opened)
        self._note(f"profile of {self._done - WARM_STEPS} steps of rank 0: {files}")
