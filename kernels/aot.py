"""Compiles a Triton kernel for a chip that is not there, and tells what came out.

Nothing is launched: numerics and speed stay unknown. Knows nothing about the kernels. Must run where Triton
was imported without its interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# most shared memory of one block, bytes, by compute capability
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# instructions that multiply on tensor cores, as PTX names them
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ASYNC_COPIES = ("cp.async.cg", "cp.async.ca", "cp.async.bulk.tensor")
DESCRIPTOR_COPY = ASYNC_COPIES[-1]


class Compiled(NamedTuple):
    """What one variant of a kernel uses; a thread's stack is where registers spill."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int  # of the chip's own kind
    mma_instructions: int  # mma.sync, which all chips have
    async_copies: int
    descriptor_copies: int  # those of them that the tensor memory accelerator does


def compile_ahead(
    kernel: JITFunction,
    arguments: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compile for sm_<capability>; `arguments` names the Triton type of each argument that is not a constant.

    Pointers and integers are taken to be multiples of 16, as the launchers make them, unless a kernel is not
    specialized by one.
    """
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in arguments and name not in constants]
    if missing:
        raise ValueError(f"Expected a type or a value for every argument, but {', '.join(missing)} has none")
    aligned = [
        at
        for at, (name, parameter) in enumerate(zip(names, kernel.params, strict=True))
        if re.match(r"\*|i32|i64", signature[name]) and not parameter.do_not_specialize
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(constants),
        attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=ptx.count(TENSOR_CORES[capability]),
        mma_instructions=ptx.count("mma.sync"),
        async_copies=sum(ptx.count(name) for name in ASYNC_COPIES),
        descriptor_copies=ptx.count(DESCRIPTOR_COPY),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the one kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError("Expected registers and stack in the report of cuobjdump, but found none")
    return int(found[1]), int(found[2])
