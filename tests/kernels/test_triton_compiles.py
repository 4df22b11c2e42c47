"""Every kernel compiles for GPUs, which the interpreter says nothing about."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_kvcompress.triton_kernels import KERNELS

PROGRAM = Path(__file__).with_name("compile_all.py")
# What a program may have on the chips of that capability with the least of it.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
SPILLED = 512


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_compiles(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, PROGRAM, str(capability)],
        env=environment,
        cwd="/",
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert {call.partition("[")[0] for call, *_ in kernels} == KERNELS.keys()
    for call, name, shared, stack in kernels:
        assert int(shared) <= SHARED[capability], f"{call} {name}: {shared} bytes"
        assert int(stack) <= SPILLED, f"{call} {name}: {stack} bytes"
