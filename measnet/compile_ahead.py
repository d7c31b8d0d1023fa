"""Compiles the Triton kernels of training in parallel, before the first step needs them.

By itself Triton compiles a kernel when it is first started, so one after the other: the network
`paper` needs more than a hundred, at half a second or more each. What was compiled stays in
Triton's folder for later starts.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from measnet.autocast import CudaAutocast
from measnet.config import ModelConfig, replace_dotted
from measnet.losses import restoration_loss
from measnet.network import MEASNet
from measnet.ops import gpu_library
from measnet.ops.gpu_library import Launch

ONE_BLOCK_EACH = {"num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1}
"""Blocks of one level have the same kernels."""


def kernels_of_a_step(
    config: ModelConfig, *, micro_batch: int, crop: int, bf16: bool
) -> list[Launch]:
    """What a training step starts, found on `meta`: nothing is computed and no GPU is needed.

    Args:
        config: of the network.
        micro_batch: number of crops.
        crop: side of a crop in pixels.
        bf16: under autocast.
    """
    with torch.device("meta"):
        model = MEASNet(replace_dotted(config, {**ONE_BLOCK_EACH, "expert_path": "dense"}))
        image = torch.rand(micro_batch, 3, crop, crop)
    with gpu_library.stand_in("meta"), gpu_library.counting() as launches:
        with CudaAutocast(), torch.autocast("cpu", torch.bfloat16, bf16, cache_enabled=False):
            restoration = model.train()(image)
        restoration_loss(restoration, image, 1e-4).total.backward()
    return launches


def compile_ahead(launches: Sequence[Launch], threads: int) -> None:
    """Compile the kernels for the current device, each variant once.

    A kernel that cannot be compiled is left out here: its first start says why.

    Args:
        launches: what is to be started; tensors on `meta` stand for tensors on the device.
        threads: kernels that are compiled at the same time. Most of that work does not hold
            Python's lock.
    """
    import triton

    with (
        ThreadPoolExecutor(threads) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for one in launches:
            one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)
