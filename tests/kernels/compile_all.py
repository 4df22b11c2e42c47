"""Compile what launchers launch for a GPU that is not there; run as a program.

Triton's compiler and its ptxas need no GPU. Launchers are called with tensors on the
CPU, and their kernels are compiled instead of run. Prints, for each kernel, its name,
shared memory in bytes and bytes spilled per thread.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.kernels.calls import CALLS

TARGET = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)


class _Driver:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling() -> Iterator[list[Any]]:
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    yield compiled
    JITFunction.run = run


def _spilled(cubin: bytes) -> int:
    """Bytes of local memory."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = nvidia.cuobjdump.path
        out = subprocess.check_output([tool, "--dump-resource-usage", file.name])
    return max(map(int, re.findall(r"STACK:(\d+)", out.decode())))


def main() -> None:
    """Print a line for each kernel of each call."""
    triton.runtime.driver.set_active(_Driver())
    for name, call in CALLS.items():
        with _compiling() as compiled:
            call()
        for kernel in compiled:
            metadata = kernel.metadata
            spilled = _spilled(kernel.asm["cubin"])
            print(name, metadata.name, metadata.shared, spilled)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
