"""Kept tokens, moved into pages of their own."""

from collections.abc import Sequence

import torch

from .pages import Elements
from .providers import Operation


@Operation
def compact(
    cache: torch.Tensor,
    halves: Sequence[Elements],
    source: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """Copy kept tokens into whole blocks, bit for bit, whatever their type.

    Target blocks may be among the source's: all is read before anything is written.

    Args:
        cache: ``[num_blocks, kv_heads, block_size, row]``, changed in place.
        halves: The order of keys in a page, and that of values.
        source: ``[count]`` int64, the blocks that hold the tokens.
        kept: ``[kv_heads, kept]`` int64, ascending positions in the source.
        target: ``[kept / block_size]`` int64, distinct.
    """
    taken = [half.gather(cache, source, kept) for half in halves]
    for half, tokens in zip(halves, taken, strict=True):
        half.write(cache, target, tokens)
