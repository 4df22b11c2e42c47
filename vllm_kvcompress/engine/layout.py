"""Where a token's key and value lie inside a KV cache page.

vLLM's caches are ``[blocks, kv_heads, block_size, 2 * head_size]``. On GPUs a row
is one token's key and value. The CPU backend packs a page for its instruction
set instead (keys transposed, or tiled for AMX); that order is learnt from vLLM's
own writer, so it holds for every instruction set.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops


@dataclass(frozen=True)
class PageLayout:
    """Reads and writes tokens in pages ``[..., block_size * 2 * head_size]``.

    Attributes:
        key: ``[block_size, head_size]`` int64, offsets of the key's elements.
        value: The same for values.
    """

    key: torch.Tensor
    value: torch.Tensor

    def keys(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of some blocks.

        Args:
            kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
            blocks: ``[count]`` int64.

        Returns:
            A copy ``[kv_heads, count * block_size, head_size]``.
        """
        return self._take(kv_cache, blocks, self.key)

    def values(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Values of some blocks, see `keys`."""
        return self._take(kv_cache, blocks, self.value)

    def _take(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        pages = kv_cache[blocks].flatten(2).transpose(0, 1)
        taken = pages[:, :, offsets.flatten()]
        return taken.reshape(pages.shape[0], -1, offsets.shape[1])

    def gather(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single tokens, other ones for every KV head.

        Args:
            kv_cache: As in `keys`.
            blocks: ``[count]`` int64, the blocks of a prompt.
            positions: ``[kv_heads, tokens]`` int64, positions in that prompt.

        Returns:
            Two copies ``[kv_heads, tokens, head_size]``.
        """
        block_size, row = kv_cache.shape[2:]
        block = blocks[positions // block_size][:, :, None]
        head = torch.arange(len(positions), device=positions.device)[:, None, None]
        slot = positions % block_size
        key, value = self.key[slot], self.value[slot]
        return (
            kv_cache[block, head, key // row, key % row],
            kv_cache[block, head, value // row, value % row],
        )

    def write(
        self,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Fill whole blocks.

        Args:
            kv_cache: As in `keys`.
            blocks: ``[count]`` int64, distinct.
            keys: ``[kv_heads, count * block_size, head_size]``.
            values: The same.
        """
        kv_heads = kv_cache.shape[1]
        shape = (kv_heads, len(blocks), self.key.numel())
        pages = torch.empty(
            kv_heads,
            len(blocks),
            kv_cache.shape[2] * kv_cache.shape[3],
            dtype=kv_cache.dtype,
            device=kv_cache.device,
        )
        pages[:, :, self.key.flatten()] = keys.reshape(shape)
        pages[:, :, self.value.flatten()] = values.reshape(shape)
        kv_cache[blocks] = pages.transpose(0, 1).unflatten(2, kv_cache.shape[2:])


def page_layout(layer: Any) -> PageLayout:
    """The layout of an attention layer's bound KV cache."""
    cache = layer.kv_cache
    block_size, head_size = cache.shape[2], cache.shape[3] // 2
    isa = getattr(layer, "isa", None)  # set by the CPU backend alone
    if isa is None:
        return _rows(block_size, head_size, str(cache.device))
    return _cpu_pages(isa, cache.dtype, block_size, head_size)


@functools.cache
def _rows(block_size: int, head_size: int, device: str) -> PageLayout:
    offsets = torch.arange(block_size * 2 * head_size, device=device)
    offsets = offsets.view(block_size, 2 * head_size)
    return PageLayout(offsets[:, :head_size], offsets[:, head_size:])


@functools.cache
def _cpu_pages(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int
) -> PageLayout:
    """Write every element's own number with vLLM's writer and see where it lands.

    Numbers go in base-128 digits, which even bfloat16 holds exactly.
    """
    count = block_size * head_size
    pages = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_page, value_page = pages.chunk(2, dim=2)
    numbers = torch.arange(count).view(block_size, 1, head_size)
    landed = torch.zeros(2, count, dtype=torch.long)
    for shift in range(0, max(1, (count - 1).bit_length()), 7):
        digit = ((numbers >> shift) & 127).to(dtype)
        ops.cpu_attn_reshape_and_cache(
            digit, digit.clone(), key_page, value_page, torch.arange(block_size), isa
        )
        for half, page in enumerate((key_page, value_page)):
            landed[half] += page.flatten().long() << shift
    key, value = landed.argsort(dim=1).view(2, block_size, head_size)
    return PageLayout(key, value + count)
