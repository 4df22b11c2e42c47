"""Keys and values of a request where they lie: in pages of a KV cache.

A cache is ``[num_blocks, kv_heads, block_size, row]``; the part of a block that belongs
to one KV head is a page. In which order a page holds its tokens' keys and values is
told by `Elements`, once for keys and once for values.
"""

import functools
from dataclasses import dataclass

import torch


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

    @property
    def offsets(self) -> torch.Tensor:
        """``[block_size, head_size]`` int64 on the CPU, through a page's rows."""
        return self._offsets

    @property
    def head_size(self) -> int:
        """Elements of a token's key, or value."""
        return self._offsets.shape[1]

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """The same in int32, as kernels look it up."""
        return self._offsets.int().contiguous()

    def strides(self, kv_cache: torch.Tensor) -> tuple[int, int, int] | None:
        """From a page's address to the first element; to the next token, and element.

        They count elements of memory; None if the order is tiled.
        """
        if self._steps is None:
            return None
        row = kv_cache.shape[3]
        along_rows, along_row = kv_cache.stride()[2:]
        first, slot, element = (
            step // row * along_rows + step % row * along_row for step in self._steps
        )
        return first, slot, element

    def view(self, kv_cache: torch.Tensor) -> torch.Tensor | None:
        """``[num_blocks, kv_heads, block_size, head_size]``; None if tiled."""
        if (strides := self.strides(kv_cache)) is None:
            return None
        first, slot, element = strides
        return kv_cache.as_strided(
            (*kv_cache.shape[:2], *self._offsets.shape),
            (*kv_cache.stride()[:2], slot, element),
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
class PagedKeys:
    """The keys of one request in one layer, or its values, not yet copied.

    Attributes:
        cache: ``[num_blocks, kv_heads, block_size, row]``; with one KV head where
            pages of several are addressed one by one.
        elements: Their order in a page.
        blocks: ``[kv_heads, count]`` int64, the pages that hold them.
        tokens: How many there are; the last page may hold fewer than others.
        factor: What elements are multiplied by, 1 if they are no codes.
    """

    cache: torch.Tensor
    elements: Elements
    blocks: torch.Tensor
    tokens: int
    factor: float = 1.0

    @classmethod
    def of(cls, keys: torch.Tensor) -> "PagedKeys":
        """Keys ``[kv_heads, tokens, head_size]`` as if they were one page of each."""
        kv_heads, tokens, head_size = keys.shape
        offsets = torch.arange(tokens * head_size).view(tokens, head_size)
        first = torch.zeros(kv_heads, 1, dtype=torch.long, device=keys.device)
        return cls(keys[None].contiguous(), Elements(offsets), first, tokens)

    @property
    def shape(self) -> torch.Size:
        """``[kv_heads, tokens, head_size]``."""
        return torch.Size([len(self.blocks), self.tokens, self.elements.head_size])

    def dense(self) -> torch.Tensor:
        """A copy, ``[kv_heads, tokens, head_size]``; of codes in float32."""
        heads = len(self.blocks)
        if heads == self.cache.shape[1]:
            taken = self.elements.take(self.cache, self.blocks[0])
        else:
            taken = self.elements.take(self.cache, self.blocks.flatten())[0]
            taken = taken.unflatten(0, (heads, -1))
        taken = taken[:, : self.tokens]
        return taken.float() * self.factor if taken.dtype.itemsize == 1 else taken
