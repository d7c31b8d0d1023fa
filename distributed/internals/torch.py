"""What profiling and CUDA graphs need of torch: names that it documents, but spells as private, and
the end of a capture.

https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
"""

from pathlib import Path
from typing import Any

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


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """After a CUDA graph that could not be captured, let the allocator work as before.

    If a capture becomes invalid, torch 2.11 to 2.13 raises before it tells its allocator that the
    capture has ended. The allocator then keeps every tensor that another stream has used, for ever.
    No public function ends it. tests/gpu/test_kernels.py, on a card.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # torch has ended it itself
    torch._C._cuda_releasePool(device.index, pool)
