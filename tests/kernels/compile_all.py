"""Compile what launchers launch, for a GPU that is not there; run as a program.

Triton's compiler and its ptxas need no GPU. Launchers are called with tensors on the
CPU, and their kernels are compiled instead of run: what the interpreter lets pass and
a compiler does not is found here. Prints a line for each kernel: of which call, its
name, its shared memory in bytes and bytes of each thread's stack, where registers are
spilled. The argument is a compute capability, such as 90.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from pages import paged, random
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from vllm_kvcompress.triton_kernels import KERNELS

from vllm_kvcompress.ops.pages import PagedKeys

TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
FLOAT8 = torch.float8_e4m3fn
# Of the cache and of queries.
TYPES = [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32,) * 2]
TYPES += [(FLOAT8, torch.bfloat16)] if TARGET.arch >= 89 else []
BLOCK_SIZE, KV_HEADS, QUERY_HEADS = 16, 8, 32
found: list[Any] = []


class _Driver:
    """As much of a driver as compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    found.append(_run(self, *args, grid=grid, warmup=True, **kwargs))


_run, JITFunction.run = JITFunction.run, _compile


def _stack(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.check_output([tool, "--dump-resource-usage", file.name])
    return max(map(int, re.findall(rb"STACK:(\d+)", told)))


def _on_pages(
    types: tuple[torch.dtype, torch.dtype], head_size: int
) -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    dtype, queried = types
    name = f"{dtype},{head_size}".removeprefix("torch.")
    built = paged("rows", dtype, 70, KV_HEADS, BLOCK_SIZE, head_size, "cpu")
    blocks = torch.arange(64)
    queries = random(32, QUERY_HEADS, head_size, seed=0, dtype=queried, device="cpu")
    keys = PagedKeys(built.cache, built.halves[0], blocks.expand(KV_HEADS, 64), 1001)
    group = (True, False) * (QUERY_HEADS // KV_HEADS // 2)
    yield name, "window_scores", (queries, keys), {"scale": 0.1}
    options = {"scale": 0.1, "softcap": 5.0, "past_only": group}
    yield name + ",all", "window_scores", (queries, keys), options
    starts, lens = torch.tensor([0, 32, 64]), torch.tensor([500, 512])
    scales = torch.ones(2, 70, BLOCK_SIZE, KV_HEADS, dtype=torch.float16)
    arguments = queries[:2], built.cache, built.halves, blocks, starts, lens, scales
    yield name, "attend_pages", arguments, {"scale": 0.1, "softcap": 5.0}
    kept = torch.arange(64).expand(KV_HEADS, 64)
    yield name, "compact", (built.cache, built.halves, blocks, kept, blocks[:4]), {}


def _calls() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    for types in TYPES:
        for head_size in (80, 128, 256):
            yield from _on_pages(types, head_size)
    scores = torch.zeros(KV_HEADS, 9000)
    yield "", "select", (scores, 100), {}
    for pooling in ("max", "avg"):
        yield pooling, "pool", (scores,), {"kernel_size": 7, "pooling": pooling}
    for dtype in (torch.float32, torch.bfloat16):
        vectors = torch.zeros(KV_HEADS, 900, 128, dtype=dtype)
        yield str(dtype), "merge", (vectors, vectors, 0.5), {}
    table = torch.zeros(9, 4096, dtype=torch.int32)
    lens = torch.zeros(9, dtype=torch.int32)
    out = {"table_out": table.clone(), "lens_out": lens.clone()}
    yield "", "shift_rows", (table, lens, lens, BLOCK_SIZE), out


def main() -> None:
    """Print a line for each kernel of each call."""
    triton.runtime.driver.set_active(_Driver())
    for name, operation, args, kwargs in _calls():
        found.clear()
        KERNELS[operation](*args, **kwargs)
        for kernel in found:
            stack = _stack(kernel.asm["cubin"])
            call = f"{operation}[{name}]"
            print(call, kernel.metadata.name, kernel.metadata.shared, stack)


main()
