"""What training needs of DeepSpeed beyond its documented interface. Tested with DeepSpeed 0.19."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.internals.versions import untested
from measnet.internals import is_sharded

TESTED = "0.19"
"""DeepSpeed's version that everything here was tested with."""


def version_warning() -> str:
    """A warning if DeepSpeed has another version than the tested one; else empty."""
    return untested("deepspeed", TESTED, "pytest tests/test_engine.py")


@contextmanager
def light_deepspeed(device_type: str) -> Iterator[Any]:
    """DeepSpeed's module; inside the block it imports and builds only what training uses.

    * DeepSpeed imports an optimizer that needs torch's compiler, and MLflow for a tuner. This costs
      seconds at each start, also after the loss of a worker. No option prevents it.
      test_engine.py::test_no_start_waits_for_torchs_compiler.
    * On a CPU it compiles a shared-memory kernel for inference at the start, and fails without a
      compiler. No option prevents it. tests/test_engine.py fails without a compiler.

    Args:
        device_type: `cpu` or `cuda`.
    """
    compile_, unused = torch.compile, "mlflow"
    torch.compile = _not_compiled  # type: ignore[assignment]
    hidden = sys.modules.setdefault(unused, None) is None  # type: ignore[arg-type]
    try:
        deepspeed = importlib.import_module("deepspeed")
        if device_type == "cpu":
            operations = importlib.import_module("deepspeed.ops").__compatible_ops__
            operations["deepspeed_shm_comm"] = False
        yield deepspeed
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules[unused]


def _not_compiled(function: Any = None, **options: Any) -> Any:
    """Replaces `torch.compile`, as a function or a decorator."""
    return (lambda decorated: decorated) if function is None else function


def reduce_by(engine: Any, finish: Callable[[], None], zero: Callable[[], None]) -> None:
    """Let an engine of ZeRO stage 0 reduce its gradients by other means than DeepSpeed's.

    DeepSpeed adds them up when the backward pass is over, and drops them after an update. Its only
    option is to do neither. test_reduction.py::test_the_gradients_are_those_of_deepspeed.

    Args:
        engine: DeepSpeed's.
        finish: called after each backward pass.
        zero: called after each update.
    """
    engine.allreduce_gradients = finish
    engine.zero_grad = zero


def reduce_nothing(engine: Any) -> None:
    """Let an engine of ZeRO stage 0 leave its gradients as they are, because there is one rank.

    DeepSpeed would copy all gradients twice to add up nothing. No option prevents it.
    test_reduction.py::test_a_single_rank_has_no_buckets.
    """
    engine.enable_backward_allreduce = False


# A parameter that ZeRO-3 keeps in parts is empty outside of its module's forward pass. Its own
# tensor and its size are in attributes of DeepSpeed, which has no functions for them.
# test_engine.py::test_resume_is_bit_identical_in_every_stage.


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, whatever part of it this rank keeps."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def held_part(parameter: Any) -> Tensor:
    """What this rank keeps of a parameter: its flat part under ZeRO-3, else the whole."""
    part: Tensor = parameter.ds_tensor if is_sharded(parameter) else parameter.data
    return part


class Part(NamedTuple):
    """One rank's part of one parameter: its flattened elements [start, start + numel)."""

    name: str
    start: int
    weight: Tensor
    flat: Tensor
    """The optimizer's own parameter, which contains this part."""
    flat_start: int


def parts(engine: Any) -> Iterator[Part]:
    """This rank's part of each trained parameter, in the order of the network.

    DeepSpeed's `safe_get_full_optimizer_state` makes one collective call per parameter and gives
    the result to all ranks. There is no public way to set the state on a rank that holds only a
    part of a parameter.
    test_engine.py::test_resume_is_bit_identical_in_every_stage.
    """
    stage = engine.zero_optimization_stage()
    rank = dist.get_rank()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield Part(name, 0, parameter.detach().view(-1), parameter, 0)
        elif stage < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield Part(
                    name,
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment,
                    flat,
                    mapping.hp_fragment_address.start,
                )
        else:
            group, flat_start, numel = engine.optimizer.grad_position[
                engine.optimizer.get_param_id(parameter)
            ]
            flat = engine.optimizer.fp32_partitioned_groups_flat[group]
            start = rank * numel
            left = math.prod(whole_shape(parameter)) - start
            numel = max(0, min(numel, left))  # the last part may be padded
            if numel:
                yield Part(
                    name, start, flat.data[flat_start : flat_start + numel], flat, flat_start
                )
