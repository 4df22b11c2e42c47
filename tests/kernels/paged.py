"""Caches in every order that pages have, with tokens of requests in them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vllm_kvcompress.ops.pages import Elements

# Rows of key and value as on GPUs, the same with heads innermost, as vLLM's kernels for
# processors have them (keys by element, values by token), and as those for AMX do.
ORDERS = ["rows", "heads innermost", "by element", "tiled"]


@dataclass(frozen=True)
class Drawn:
    """A cache, and the requests in it.

    Attributes:
        cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``; what holds no
            token is NaN.
        halves: The order of keys and of values.
        blocks: ``[count]`` int64, of all requests, one after another.
        starts: ``[requests + 1]`` int64, where those of each begin.
        others: int64, blocks of no request.
    """

    cache: torch.Tensor
    halves: tuple[Elements, Elements]
    blocks: torch.Tensor
    starts: torch.Tensor
    others: torch.Tensor


def order_of(name: str, block_size: int, head_size: int) -> tuple[Elements, Elements]:
    """The order of a page's keys and values."""
    size = block_size * head_size
    offsets = torch.arange(2 * size)
    if name in ("rows", "heads innermost"):
        keys, values = offsets.view(block_size, -1).chunk(2, dim=1)
    elif name == "by element":
        keys = offsets[:size].view(head_size, block_size).T
        values = offsets[size:].view(block_size, head_size)
    else:
        mixed = torch.randperm(size, generator=torch.Generator().manual_seed(1))
        keys = mixed.view(block_size, head_size)
        values = size + mixed.flip(0).view(block_size, head_size)
    return Elements(keys), Elements(values)


def draw_cache(
    order: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    kv_heads: int,
    lens: list[int],
    seed: int,
) -> Drawn:
    """Write random tokens of requests of these lengths into scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-held // block_size) for held in lens]
    shape = (2 * sum(counts) + 1, kv_heads, block_size, 2 * head_size)
    cache = torch.full(shape, float("nan")).to(dtype)
    if order == "heads innermost":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    halves = order_of(order, block_size, head_size)
    mixed = torch.randperm(len(cache), generator=generator)
    blocks, others = mixed[: sum(counts)], mixed[sum(counts) :]
    for own, held in zip(blocks.split(counts), lens, strict=True):
        for half in halves:
            tokens = torch.randn(
                kv_heads, len(own) * block_size, head_size, generator=generator
            )
            tokens[:, held:] = float("nan")
            half.write(cache, own, tokens.to(dtype))
    starts = torch.tensor([0, *counts]).cumsum(0)
    return Drawn(cache, halves, blocks, starts, others)


def poisoned() -> Any:
    """The module torch whose new memory holds NaN, or what no position can be."""

    def filled(new: torch.Tensor) -> torch.Tensor:
        return new.fill_(float("nan") if new.is_floating_point() else -(2**31))

    names = {name: getattr(torch, name) for name in dir(torch)}
    names["empty"] = lambda *args, **kwargs: filled(torch.empty(*args, **kwargs))
    names["empty_like"] = lambda like: filled(torch.empty_like(like))
    return SimpleNamespace(**names)
