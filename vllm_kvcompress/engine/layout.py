"""Where a token's key and value lie inside a KV cache page.

vLLM's caches are ``[num_blocks, kv_heads, block_size, 2 * head_size]``. On GPUs a
row is one token's key and value. The CPU backend packs a page for its instruction
set instead (keys transposed, or tiled for AMX); that order is learnt from vLLM's
own writer, so it holds for every instruction set. A vector may be codes: what they
mean is the matter of `page_formats`, and ``head_size`` here is the length of a row.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops

from ..ops.pages import Elements


@dataclass(frozen=True)
class PageLayout:
    """The two halves of a page."""

    keys: Elements
    values: Elements


def page_layout(layer: Any) -> PageLayout:
    """The layout of an attention layer's bound KV cache."""
    cache = layer.kv_cache
    block_size, head_size = cache.shape[2], cache.shape[3] // 2
    isa = getattr(layer, "isa", None)  # set by the CPU backend alone
    if isa is None:
        return _rows(block_size, head_size)
    return _cpu_pages(isa, cache.dtype, block_size, head_size)


@functools.cache
def _rows(block_size: int, head_size: int) -> PageLayout:
    offsets = torch.arange(block_size * 2 * head_size).view(block_size, -1)
    return PageLayout(*map(Elements, offsets.chunk(2, dim=1)))


@functools.cache
def _cpu_pages(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int
) -> PageLayout:
    """Write every element's own number with vLLM's writer and see where it lands.

    Numbers go in digits that are exact in the pages' type: base 128 in bfloat16, base
    8 in 8-bit floats, of which vLLM has the bytes.
    """
    width, name = (3, "fp8") if dtype == torch.uint8 else (7, "auto")
    written = torch.bfloat16 if dtype == torch.uint8 else dtype
    count = block_size * head_size
    pages = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_page, value_page = pages.chunk(2, dim=2)
    numbers = torch.arange(count).view(block_size, 1, head_size)
    landed = torch.zeros(2, count, dtype=torch.long)
    for shift in range(0, max(1, (count - 1).bit_length()), width):
        digit = ((numbers >> shift) % (1 << width)).to(written)
        ops.cpu_attn_reshape_and_cache(
            digit,
            digit.clone(),
            key_page,
            value_page,
            torch.arange(block_size),
            isa,
            kv_cache_dtype=name,
        )
        for half, page in enumerate((key_page, value_page)):
            if name == "fp8":
                page = page.view(torch.float8_e4m3fn).float()
            landed[half] += page.flatten().long() << shift
    key, value = landed.argsort(dim=1).view(2, block_size, head_size)
    return PageLayout(Elements(key), Elements(value + count))


def kernel_blocks(blocks: torch.Tensor, split: int) -> torch.Tensor:
    """The manager's blocks as the attention kernel's, ``split`` of them each."""
    parts = torch.arange(split, device=blocks.device)
    return (blocks[:, None] * split + parts).flatten()
