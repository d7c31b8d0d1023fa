"""What training needs of torch beyond its documented interface: one operation on many tensors, an
Adam that starts fast, the memory's history, and the end of a failed capture.

https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# One operation on a list of tensors: on a GPU a few kernels instead of one for each tensor. torch's
# own optimizers use them, but torch has no public name for them. test_optimizer.py.
foreach_add_ = torch._foreach_add_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
foreach_zero_ = torch._foreach_zero_

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


class FastStartAdam(torch.optim.Adam):
    """torch's Adam, without the wrappers that keep torch's compiler out of its methods.

    Each wrapper imports the whole compiler when it is first called: two seconds of every start,
    also after the loss of a worker. No option prevents it.
    test_engine.py::test_no_start_waits_for_torchs_compiler.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    _update = inspect.unwrap(torch.optim.Adam.step)

    def scale_and_update(self, divisor: Tensor, skipped: Tensor) -> None:
        """Update with the fused kernel; the host does not wait for the values of the arguments.

        torch's gradient scaler gives both to a fused optimizer in these attributes; there is no
        argument for them. test_engine.py::test_a_gpu_clips_skips_and_averages_as_a_cpu_does.

        Args:
            divisor: () of the gradients.
            skipped: () 1 leaves everything as it is, 0 updates.
        """
        self.grad_scale, self.found_inf = divisor, skipped
        self._update()
