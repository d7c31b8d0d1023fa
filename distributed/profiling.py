"""Some steps of a run in detail: what the host and the GPU do when, and what takes the memory.

python -m distributed.train local-4090 --profile 5
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from distributed.internals.torch import start_memory_history, write_memory_history
from shards.storage import join, open_folder, upload

WARM_STEPS = 3
"""Steps before the recording, in which kernels are chosen and caches fill."""
FOLDER = "profile"
TRACE, MEMORY = "trace.json", "memory.pickle"
"""Files in FOLDER of a run: a trace in Chrome's format, and the GPU's allocations."""


class Profiling:
    """Records steps of one process once, after `WARM_STEPS`; with 0 steps it does nothing."""

    def __init__(
        self, steps: int, run: str, device: torch.device, note: Callable[[str], object]
    ) -> None:
        """Wait for the warm steps.

        Args:
            steps: to record.
            run: folder or URI of the run.
            device: that this process computes on.
            note: takes the line that says where the files are.
        """
        self._steps, self._run, self._note = steps, run, note
        self._device = device
        self._done = 0
        self._profile: profile | None = None

    def after_step(self, *, last: bool) -> None:
        """Count an optimizer step; `last` ends the recording early, for the run ends with it."""
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
        """Write the files; where that fails, say so and go on training."""
        recorded.stop()
        shown = {TRACE: "https://ui.perfetto.dev"}
        target = join(self._run, FOLDER)
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary)
            try:
                recorded.export_chrome_trace(str(local / TRACE))
                if self._device.type == "cuda":
                    write_memory_history(local / MEMORY)
                    shown[MEMORY] = "https://pytorch.org/memory_viz"
                fs, path = open_folder(target)
                fs.makedirs(path, exist_ok=True)
                for name in shown:
                    upload(str(local / name), join(target, name))
            except OSError as error:
                self._note(f"warning: the profile could not be written to {target}: {error}")
                return
        files = "; ".join(f"open {join(target, name)} at {page}" for name, page in shown.items())
        self._note(f"profile of {self._done - WARM_STEPS} steps of rank 0: {files}")
