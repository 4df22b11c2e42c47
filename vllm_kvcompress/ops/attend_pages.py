"""Attention of new tokens over pages, some of them merged ones with factors."""

from collections.abc import Sequence

import torch

from .attend import attend
from .pages import Elements
from .providers import Operation


@Operation
def attend_pages(
    query: torch.Tensor,
    cache: torch.Tensor,
    halves: Sequence[Elements],
    blocks: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    scales: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token per row over all that the row holds, see `attend`.

    Args:
        query: ``[rows, query_heads, head_size]``.
        cache: ``[num_blocks, kv_heads, block_size, row]``.
        halves: The order of keys in a page, and that of values.
        blocks: ``[count]`` int64, the blocks of all rows, one after another.
        starts: ``[rows + 1]`` int64, where those of a row begin.
        lens: ``[rows]`` int64, tokens of each, the new one among them.
        scales: ``[2, num_blocks, block_size, kv_heads]``, factors of keys and values:
            1 in ordinary pages, in merged ones what makes them this layer's.
        scale: Factor on logits.
        softcap: Logit soft cap, 0 = none.

    Returns:
        ``[rows, query_heads, head_size]`` float32.
    """
    found = []
    for row, own in enumerate(blocks.split(starts.diff().tolist())):
        held = int(lens[row])
        keys, values = (half.take(cache, own)[:, :held] for half in halves)
        factors = scales[:, own].flatten(1, 2).transpose(1, 2)[:, :, :held]
        found.append(
            attend(
                query[row : row + 1],
                keys,
                values,
                *factors,
                scale=scale,
                softcap=softcap,
            )
        )
    return torch.cat(found)
