"""The private parts of torch and DeepSpeed that `measnet` uses; `distributed.internals` has others.

Each entry says what it does, why the public way is not enough, and which test fails when the
library changes it.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "is_sharded", "storage_key", "tree_leaves", "tree_map"]
# TorchDispatchMode sees each operation of a block of code, `tree_leaves` and `tree_map` the tensors
# in its arguments. torch documents both uses, but not another module to import them from.
# test_memory.py, test_autocast.py.


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that two tensors on one storage have in common.

    `data_ptr` is 0 for all storages on `meta`, which has no memory. test_memory.py.
    """
    return int(storage._cdata)


def is_sharded(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps this parameter in parts at this time or at others.

    DeepSpeed has no public test, and marks such parameters with an attribute.
    test_engine.py::test_resume_is_bit_identical_in_every_stage.
    """
    return hasattr(weight, "ds_id")
