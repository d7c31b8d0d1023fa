"""What tests of Triton kernels need where there is no GPU.

`compiled` compiles kernels for cards that are not there, and says what they take of them.

`python -m tests.compiled MODULE:FUNCTION ARCH ...` compiles every kernel that the function starts
on tensors of `meta`, with what it is started with, and prints one JSON list; without ARCH, a list
of what would be compiled. It runs in a process of its own: Triton's interpreter, which other tests
use, can't be switched off again.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from measnet.ops import gpu_library
from measnet.ops.gpu_library import Launch

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Compute capability -> bytes of shared memory that a program may have there."""


class Resources(NamedTuple):
    """What one kernel takes of a card."""

    name: str
    arch: int
    registers: int
    spilled: int
    """Bytes that each thread keeps in memory because registers do not suffice."""
    shared: int
    """Bytes of shared memory of a program."""
    bytes: int
    """Of the tensors that it reads and writes."""
    constants: dict[str, Any]


def variant(launch: Launch, arch: int) -> tuple[Any, dict[str, Any], list[tuple[str, Any]]]:
    """Triton's backend, the values of all parameters, and the type and the hint of each.

    Triton's own rules: two starts with the same types and hints share what was compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    values, kinds, _ = bind(*launch.arguments, **launch.constants)
    return backend, values, kinds


def resources(launch: Launch, arch: int) -> Resources:
    """Compile what `launch` started for the compute capability `arch`, such as 89."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, values, kinds = variant(launch, arch)
    signature = {name: kind for name, (kind, _) in zip(values, kinds, strict=True)}
    constants, hints = {}, {}
    for at, (value, (kind, hint)) in enumerate(zip(values.values(), kinds, strict=True)):
        if kind == "constexpr":
            constants[at,] = value
        elif hint:
            hints[at,] = backend.parse_attr(hint)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=hints)
    options = {k: v for k, v in launch.constants.items() if k in ("num_warps", "num_stages")}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = used["STACK"] + used["LOCAL"]
    return Resources(
        *(launch.name, arch, used["REG"], spilled, built.metadata.shared, launch.bytes),
        launch.constants,
    )


def compiled(function: str, *archs: int) -> list[Resources]:
    """`resources` of all that `MODULE:FUNCTION` starts, from a process of its own."""
    return [Resources(**one) for one in _listed(function, *map(str, archs))]


def variants(function: str) -> set[str]:
    """What Triton would compile for an RTX 4090 of all that `MODULE:FUNCTION` starts."""
    return set(_listed(function))


def _listed(*arguments: str) -> list[Any]:
    command = [sys.executable, "-m", "tests.compiled", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    listed: list[Any] = json.loads(done.stdout)
    return listed


def assert_fits(found: list[Resources]) -> None:
    """No kernel spills, and each has the shared memory it needs."""
    assert found
    for one in found:
        assert one.spilled == 0, one
        assert one.shared <= SHARED[one.arch], one


def interpret_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter compute with bf16 as a GPU does.

    By itself it multiplies their bits as integers, and rounds towards zero.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), float32)

    def rounded(self: Any, tile: Any, to: Any) -> Any:
        if (tile.dtype.scalar, to.scalar) != (float32, bfloat16):
            return self.cast_impl(tile, to)
        bits = torch.from_numpy(np.ascontiguousarray(tile.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), bfloat16)

    multiply = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest),
    )


def main(function: str, *archs: str) -> None:
    """Compile each kernel once per set of constants and types; without cards only name them."""
    module, name = function.split(":")
    with gpu_library.stand_in("meta"), gpu_library.counting() as launches:
        getattr(importlib.import_module(module), name)()
    if not archs:
        named = {f"{one.name} {variant(one, 89)[2]} {one.constants}" for one in launches}
        print(json.dumps(sorted(named)))
        return
    different = {}
    for launch in launches:
        types = [one.dtype for one in launch.arguments if isinstance(one, Tensor)]
        different[str((launch.name, launch.constants, types))] = launch
    found = [resources(one, int(arch)) for one in different.values() for arch in archs]
    print(json.dumps([one._asdict() for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
