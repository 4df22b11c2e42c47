"""Measure every provider's kernels on this machine (`make bench-kernels`).

Each is first compared with what its operation means; a kernel that differs is not
timed. Times are of one layer; a case is KV heads x query heads of each x head size.
GB/s count what must be moved at least: each key read once, each kept token read and
written; the share is of the bandwidth of a copy.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_kvcompress.ops import pool, providers, select, window_scores
from vllm_kvcompress.ops.pages import Elements, PagedKeys

COLUMNS = (
    *("operation", "provider", "case", "median_ms", "p20_ms", "p80_ms"),
    *("GB_per_s", "percent_of_copy", "times_torch"),
)
WINDOW, KERNEL, COUNT = 32, 7, 1024
OPERATIONS = providers.operations()


@dataclass(frozen=True)
class Shape:
    """One layer of a model, and a prompt in it."""

    name: str
    kv_heads: int
    group: int
    head_size: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Case:
    """A call of an operation: its arguments, its result, what it moves at least."""

    operation: str
    text: str
    run: Callable[[Callable[..., Any]], Any]
    bytes: int


def order(device: torch.device, block_size: int, head_size: int) -> list[Elements]:
    """Pages as vLLM has them: rows on GPUs, keys by element on processors."""
    offsets = torch.arange(2 * block_size * head_size)
    if device.type == "cuda":
        return [Elements(half) for half in offsets.view(block_size, -1).chunk(2, 1)]
    keys, values = offsets.chunk(2)
    by_element = keys.view(head_size, block_size).T
    return [Elements(by_element), Elements(values.view(block_size, head_size))]


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """All operations on one layer of a prompt."""
    block_size = 16 if device.type == "cuda" else 128
    heads, size, tokens = shape.kv_heads, shape.head_size, shape.tokens
    generator = torch.Generator(device).manual_seed(0)

    def random(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*dims, generator=generator, device=device).to(dtype)

    count = tokens // block_size
    cache = random(count + COUNT // block_size, heads, block_size, 2 * size).to(
        shape.dtype
    )
    if device.type == "cuda":  # heads innermost, vLLM's default
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    mixed = torch.randperm(len(cache), generator=generator, device=device)
    source, target = mixed[:count], mixed[count:]
    halves = order(device, block_size, size)
    keys = PagedKeys(cache, halves[0], source.expand(heads, -1), tokens)
    wide = torch.bfloat16 if shape.dtype.itemsize == 1 else shape.dtype
    queries = random(WINDOW, heads * shape.group, size, dtype=wide)
    vector = size * shape.dtype.itemsize
    yield Case(
        "window_scores",
        shape.name,
        lambda run: run(queries, keys, scale=size**-0.5),
        heads * tokens * (vector + 4),
    )
    scores = window_scores.window_scores.meaning(queries, keys, scale=size**-0.5)
    yield Case(
        "pool",
        shape.name,
        lambda run: run(scores, kernel_size=KERNEL, pooling="max"),
        8 * scores.numel(),
    )
    pooled = pool.pool.meaning(scores, kernel_size=KERNEL, pooling="max")
    yield Case(
        "select",
        shape.name,
        lambda run: run(pooled, COUNT),
        4 * scores.numel() + 8 * heads * COUNT,
    )
    kept = select.select.meaning(pooled, COUNT)

    def moved(run: Callable[..., Any]) -> torch.Tensor:
        run(cache, halves, source, kept, target)
        return cache[target].view(torch.uint8)

    yield Case("compact", shape.name, moved, 4 * heads * COUNT * vector)
    first, second = (random(heads, COUNT, size, dtype=wide) for _ in range(2))
    yield Case(
        "merge",
        shape.name,
        lambda run: run(first, second, 0.6),
        heads * COUNT * (2 * size * wide.itemsize + 4 * size + 8),
    )
    starts = torch.arange(2, device=device) * count
    lens = torch.tensor([tokens], device=device)
    factors = torch.rand(2, len(cache), block_size, heads, device=device) + 0.5
    query = random(1, heads * shape.group, size)
    arguments = (query, cache, halves, source, starts, lens, factors)
    yield Case(
        "attend_pages",
        shape.name,
        lambda run: run(*arguments, scale=size**-0.5),
        2 * heads * tokens * (vector + 4),
    )


def table_case(device: torch.device) -> Case:
    """256 rows of a block table."""
    table = torch.randint(0, 9999, (256, 2048), dtype=torch.int32, device=device)
    lens = torch.full((256,), 32768, dtype=torch.int32, device=device)
    tokens = torch.arange(256, dtype=torch.int32, device=device) * 16
    outputs = {"table_out": table.clone(), "lens_out": lens.clone()}

    def run(kernel: Callable[..., Any]) -> torch.Tensor:
        kernel(table, lens, tokens, 16, **outputs)
        return outputs["table_out"]

    return Case("shift_rows", "256 x 2048 blocks", run, 2 * table.nbytes)


def flat(found: Any) -> torch.Tensor:
    """One tensor of whatever an operation returns."""
    parts = [found] if isinstance(found, torch.Tensor) else list(vars(found).values())
    return torch.cat([part.flatten().double() for part in parts])


def times(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of single runs."""
    found = []
    for turn in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 3:
            found.append((time.perf_counter() - started) * 1e3)
    return found


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(times(lambda: target.copy_(source), device, 10))
    return 2 * source.numel() / best * 1e3


def measure(
    case: Case,
    setting: providers.Setting,
    repeats: int,
    bandwidth: float,
    refusals: set[str],
) -> Iterator[list[Any]]:
    """Rows of the table: torch, then every provider that can serve."""
    operation = OPERATIONS[case.operation]
    expected, base = flat(case.run(operation.meaning)), 0.0
    for name, kernel, reason in providers.offers(operation, setting):
        row: list[Any] = [case.operation, name, case.text]
        if kernel is None:
            refusals.add(f"{name}: {reason}")
            continue
        found = flat(case.run(kernel))
        if not torch.allclose(found, expected, rtol=2e-2, atol=1e-4, equal_nan=True):
            yield [*row, *["-"] * 5, "WRONG"]
            continue
        spent = times(lambda kernel=kernel: case.run(kernel), setting.device, repeats)
        middle = statistics.median(spent)
        fifths = statistics.quantiles(spent, n=5)
        base = base or middle
        speed = case.bytes / middle * 1e3
        yield [
            *row,
            *(f"{x:.3f}" for x in (middle, fifths[0], fifths[3])),
            f"{speed / 1e9:.1f}",
            f"{100 * speed / bandwidth:.0f}",
            f"{base / middle:.2f}",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", help="file to write the rows to")
    parser.add_argument("--only", default="", help="operations, separated by commas")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [
        Shape("8 x 4 x 128 bfloat16", 8, 4, 128, 0, torch.bfloat16),
        Shape("8 x 4 x 128 fp8", 8, 4, 128, 0, torch.float8_e4m3fn),
        Shape("16 x 1 x 64 float32", 16, 1, 64, 0, torch.float32),
    ]
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    console = Console()
    console.print(f"{name}, a copy moves {bandwidth / 1e9:.1f} GB/s")
    table, rows, refusals = Table(*COLUMNS), [], set[str]()
    setting = providers.Setting(device)
    every = [
        case
        for shape in shapes
        for case in cases(Shape(**vars(shape) | {"tokens": given.tokens}), device)
    ]
    wanted = given.only.split(",") if given.only else OPERATIONS
    for case in [*every, table_case(device)]:
        if case.operation in wanted:
            for row in measure(case, setting, given.repeats, bandwidth, refusals):
                rows.append(row)
                table.add_row(*map(str, row))
    console.print(table)
    for refusal in sorted(refusals):
        console.print(f"not measured: {refusal}")
    if given.csv:
        with open(given.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return 1 if any(row[-1] == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
