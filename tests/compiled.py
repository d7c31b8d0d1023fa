"""What tests of Triton kernels need where there is no GPU.

`compiled` compiles kernels for cards that are not there, and says what they take of them.

`python -m tests.compiled MODULE:FUNCTION ARCH ...` compiles every kernel that the function starts
on tensors of `meta`, with what it is started with, and prints one JSON list. It runs in a process
of its own: Triton's interpreter, which other tests use, can't be switched off again.
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
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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


def resources(launch: Launch, arch: int) -> Resources:
    """Compile what `launch` started for the compute capability `arch`, such as 89."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int], list[list[Any]]] = {}
    for at, (name, given) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(given, Tensor):
            signature[name] = TYPES[given.dtype]
            aligned = given.storage_offset() * given.element_size() % 16 == 0
        elif isinstance(given, float):
            signature[name], aligned = "fp32", False
        elif given == 1:  # Triton compiles a kernel of its own for it
            signature[name], constants[name], aligned = "constexpr", 1, False
        else:
            signature[name], aligned = "i32", given % 16 == 0
        if aligned:
            hints[(at,)] = [["tt.divisibility", 16]]
    for name in names[len(launch.arguments) :]:
        signature[name], constants[name] = "constexpr", launch.constants[name]
    indexed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(launch.kernel, signature, constexprs=indexed, attrs=hints)
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
    command = [sys.executable, "-m", "tests.compiled", function, *map(str, archs)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [Resources(**one) for one in json.loads(done.stdout)]


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
    """Compile each kernel once per set of constants and types."""
    module, name = function.split(":")
    with gpu_library.stand_in("meta"), gpu_library.counting() as launches:
        getattr(importlib.import_module(module), name)()
    different = {}
    for launch in launches:
        types = [one.dtype for one in launch.arguments if isinstance(one, Tensor)]
        different[str((launch.name, launch.constants, types))] = launch
    found = [resources(one, int(arch)) for one in different.values() for arch in archs]
    print(json.dumps([one._asdict() for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
