"""Drawn cases for the CUDA kernels, and their comparison with the meaning."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from vllm_kvcompress.ops.compact import compact
from vllm_kvcompress.ops.pages import Elements
from vllm_kvcompress.ops.select import select

# -0 equals 0, all NaN are equal; the others are ties as often as not.
SCORES = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, *map(float, ("inf", "-inf", "nan", "-nan"))]
ORDERS = ("rows", "halves", "keys turned")
MEMORY = ("heads outside", "heads inside", "shifted", "longer rows")
TARGETS = ("apart", "own first", "any")


@dataclass(frozen=True)
class Tokens:
    """A cache of any bits, and what of it is to be moved.

    Attributes:
        storage: ``[bytes]`` uint8, the cache and what lies around it.
        dtype: Of the cache.
        shape: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
        strides: Of the cache.
        offset: Elements in front of it.
        halves: The order in a page.
        source: ``[count]`` int64.
        kept: ``[kv_heads, tokens]`` int64.
        target: ``[tokens / block_size]`` int64.
    """

    storage: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    halves: tuple[Elements, Elements]
    source: torch.Tensor
    kept: torch.Tensor
    target: torch.Tensor

    def moved_by(self, kernel: Callable[..., None], device: str) -> torch.Tensor:
        """The storage after a kernel has moved the tokens."""
        storage = self.storage.to(device, copy=True)
        cache = storage.view(self.dtype).as_strided(
            self.shape, self.strides, self.offset
        )
        numbers = (x.to(device) for x in (self.source, self.kept, self.target))
        kernel(cache, self.halves, *numbers)
        return storage.cpu()


def tokens_of(
    dtype: torch.dtype,
    *,
    kv_heads: int,
    block_size: int,
    head_size: int,
    counts: tuple[int, int],
    order: str = "rows",
    memory: str = "heads outside",
    targets: str = "apart",
    seed: int = 0,
) -> Tokens:
    """Draw a cache.

    Args:
        dtype: Of the cache.
        kv_heads: Its KV heads.
        block_size: Its tokens in a page.
        head_size: Its elements of a key.
        counts: Source blocks, and target blocks; not more than those.
        order: One of `ORDERS`.
        memory: One of `MEMORY`; "shifted" begins at an odd address.
        targets: One of `TARGETS`.
        seed: Of everything else.
    """
    generator = torch.Generator().manual_seed(seed)
    held, private = counts
    num_blocks, row = held + private, 2 * head_size
    shape = (num_blocks, kv_heads, block_size, row)
    steps = torch.empty(shape, device="meta").stride()
    offset = 0
    if memory == "heads inside":
        steps = (steps[0], row, kv_heads * row, 1)
    elif memory == "shifted":
        offset = 1
    elif memory == "longer rows":
        steps = torch.empty((*shape[:3], row + 1), device="meta").stride()
    elements = num_blocks * steps[0] + offset
    size = torch.empty((), dtype=dtype).element_size()
    storage = torch.randint(
        256, (elements * size,), dtype=torch.uint8, generator=generator
    )
    blocks = torch.randperm(num_blocks, generator=generator)
    source, target = blocks[:held], blocks[held:]
    if targets == "own first":
        target = source[:private]
    elif targets == "any":
        target = torch.randperm(num_blocks, generator=generator)[:private]
    kept = [
        torch.randperm(held * block_size, generator=generator)[: private * block_size]
        for _ in range(kv_heads)
    ]
    halves = _halves(order, block_size, head_size)
    kept = torch.stack(kept).sort().values
    return Tokens(storage, dtype, shape, steps, offset, halves, source, kept, target)


def _halves(order: str, block_size: int, head_size: int) -> tuple[Elements, Elements]:
    numbers = torch.arange(2 * block_size * head_size)
    if order == "rows":  # vLLM's on GPUs: a key, then its value
        keys, values = numbers.view(block_size, -1).chunk(2, dim=1)
        return Elements(keys), Elements(values)
    keys, values = numbers.view(2, block_size, head_size)
    if order == "keys turned":
        keys = keys.reshape(head_size, block_size).T
    return Elements(keys), Elements(values)


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    """Small caches of all orders, types, alignments and overlaps."""
    order = draw(st.sampled_from(ORDERS))
    # The strides of other orders are those of pages without gaps.
    memory = draw(st.sampled_from(MEMORY)) if order == "rows" else MEMORY[0]
    held = draw(st.integers(1, 6))
    return tokens_of(
        draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32])),
        kv_heads=draw(st.integers(1, 3)),
        block_size=draw(st.sampled_from([1, 3, 16])),
        head_size=draw(st.sampled_from([1, 6, 8, 20, 64])),
        counts=(held, draw(st.integers(0, held))),
        order=order,
        memory=memory,
        targets=draw(st.sampled_from(TARGETS)),
        seed=draw(st.integers(0, 1000)),
    )


def check_compact(kernel: Callable[..., None], case: Tokens, device: str) -> None:
    """Every bit is as the meaning leaves it, also around the cache."""
    expected = case.moved_by(compact.meaning, "cpu")
    assert case.moved_by(kernel, device).equal(expected)


@st.composite
def rows(draw: st.DrawFn, longest: int) -> tuple[torch.Tensor, int]:
    """Scores ``[kv_heads, tokens]``, in wider rows or not, and a count."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    wide = shape[0], shape[1] + draw(st.integers(0, 2))
    if draw(st.booleans()):
        scores = torch.randn(wide, generator=generator)
    else:
        values = draw(st.lists(st.sampled_from(SCORES), min_size=1, max_size=4))
        chosen = torch.randint(len(values), wide, generator=generator)
        scores = torch.tensor(values)[chosen]
    return scores[:, : shape[1]], draw(st.integers(0, shape[1]))


def check_select(
    kernel: Callable[..., torch.Tensor], scores: torch.Tensor, count: int, device: str
) -> None:
    """The positions are the meaning's."""
    found = kernel(scores.to(device), count)
    assert found.dtype == torch.long
    assert found.cpu().equal(select.meaning(scores, count))
