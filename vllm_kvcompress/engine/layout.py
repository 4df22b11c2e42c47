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


class Elements:
    """The keys, or the values, of all tokens in pages of one order."""

    def __init__(self, offsets: torch.Tensor) -> None:
        """Take the order from ``offsets [block_size, head_size]``, int64 on the CPU.

        Args:
            offsets: Elements of a page are numbered through its rows.
        """
        self._offsets = offsets
        first = int(offsets[0, 0])
        slot = int(offsets[-1, 0] - first) // max(1, offsets.shape[0] - 1)
        element = int(offsets[0, -1] - first) // max(1, offsets.shape[1] - 1)
        grid = [torch.arange(size) for size in offsets.shape]
        even = first + slot * grid[0][:, None] + element * grid[1]
        self._steps = (first, slot, element) if even.equal(offsets) else None

    def strides(self, kv_cache: torch.Tensor) -> tuple[int, int, int] | None:
        """A page's first element, and those to the next token and element."""
        if self._steps is None or not kv_cache[0, 0].is_contiguous():
            return None
        return self._steps

    def view(self, kv_cache: torch.Tensor) -> torch.Tensor | None:
        """``[num_blocks, kv_heads, block_size, head_size]``; None if tiled."""
        if self._steps is None:
            return None
        row = kv_cache.shape[3]
        *outer, along_rows, along_row = kv_cache.stride()
        first, slot, element = (
            step // row * along_rows + step % row * along_row for step in self._steps
        )
        return kv_cache.as_strided(
            (*kv_cache.shape[:2], *self._offsets.shape),
            (*outer, slot, element),
            kv_cache.storage_offset() + first,
        )

    def take(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Copy all tokens of some blocks.

        Args:
            kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
            blocks: ``[count]`` int64.

        Returns:
            ``[kv_heads, count * block_size, head_size]``; where the cache holds
            tokens side by side, so does the copy.
        """
        view = self.view(kv_cache)
        if view is None:
            pages = kv_cache[blocks].flatten(2).transpose(0, 1)
            taken = pages[:, :, self._offsets.flatten()]
            return taken.reshape(len(pages), -1, self._offsets.shape[1])
        if view.stride(2) < view.stride(3):
            turned = view.transpose(2, 3)[blocks]
            return turned.permute(1, 2, 0, 3).flatten(2).transpose(1, 2)
        return view[blocks].transpose(0, 1).flatten(1, 2)

    def gather(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Copy single tokens, other ones for every KV head.

        Args:
            kv_cache: As in `take`.
            blocks: ``[count]`` int64, the blocks of a prompt.
            positions: ``[kv_heads, tokens]`` int64, positions in that prompt.

        Returns:
            ``[kv_heads, tokens, head_size]``.
        """
        block_size, row = kv_cache.shape[2:]
        block, slot = blocks[positions // block_size], positions % block_size
        head = torch.arange(len(positions), device=positions.device)[:, None]
        view = self.view(kv_cache)
        if view is not None:
            return view[block, head, slot]
        offset = self._offsets[slot]
        return kv_cache[block[..., None], head[..., None], offset // row, offset % row]

    def write(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Fill whole blocks.

        Args:
            kv_cache: As in `take`.
            blocks: ``[count]`` int64, distinct.
            tokens: ``[kv_heads, count * block_size, head_size]``.
        """
        _, kv_heads, block_size, row = kv_cache.shape
        paged = tokens.unflatten(1, (-1, block_size)).transpose(0, 1)
        view = self.view(kv_cache)
        if view is not None:
            view[blocks] = paged
            return
        head = torch.arange(kv_heads)[:, None, None]
        offset = self._offsets
        kv_cache[blocks[:, None, None, None], head, offset // row, offset % row] = paged


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
