"""What profiling needs of torch: names that torch documents, but spells as private.

https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
"""

from pathlib import Path

import torch

MOST_EVENTS = 100_000
"""Allocations and releases that are kept, of some KB each; the latest ones."""


def start_memory_history() -> None:
    """Note each allocation of this process on the GPU, with its stack, from now on.

    There is no other way to tell which line holds the memory.
    test_profiling.py::test_memory_of_a_gpu.
    """
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")


def write_memory_history(path: Path) -> None:
    """Write what was noted, and stop to note; https://pytorch.org/memory_viz shows the file.

    test_profiling.py::test_memory_of_a_gpu.
    """
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(None)
