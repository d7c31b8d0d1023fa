"""The kernels of a training step are compiled in parallel, before they are first started."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from measnet.compile_ahead import kernels_of_a_step
from measnet.config import replace_dotted, tiny
from measnet.ops import gpu_library
from measnet.ops.gpu_library import Launch

pytestmark = pytest.mark.skipif(not gpu_library.installed(), reason="Triton is not installed")

ON_NO_CARD = """
import json, sys
from types import SimpleNamespace
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from measnet.compile_ahead import compile_ahead, kernels_of_a_step
from measnet.config import tiny

driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 89, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
built = []
triton.knobs.runtime.jit_cache_hook = lambda **about: built.append(about["repr"]) and None
launches = kernels_of_a_step(tiny(), micro_batch=2, crop=64, bf16=True)[:6]
compile_ahead(launches, threads=2)
ahead = len(built)
for one in launches:
    one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)
print(json.dumps([len(launches), ahead, len(built)]))
"""


def variant(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel of its own for, apart from sizes."""
    types = tuple(str(getattr(one, "dtype", type(one))) for one in launch.arguments)
    return launch.name, types, tuple(sorted(launch.constants.items()))


def test_one_block_of_each_level_has_all_kernels_of_the_network() -> None:
    config = replace_dotted(tiny(), {"num_blocks": (2, 1, 3, 2), "num_refinement_blocks": 2})
    from measnet import compile_ahead

    few = {variant(one) for one in kernels_of_a_step(config, micro_batch=2, crop=64, bf16=True)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compile_ahead, "ONE_BLOCK_EACH", {})
        every = kernels_of_a_step(config, micro_batch=2, crop=64, bf16=True)
    assert {variant(one) for one in every} == few


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path: Any) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ON_NO_CARD]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    launches, ahead, after = json.loads(done.stdout.splitlines()[-1])
    assert 0 < ahead <= launches and after == ahead
