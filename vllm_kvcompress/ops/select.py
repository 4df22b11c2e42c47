"""Which tokens each KV head keeps."""

from collections.abc import Sequence

import torch

from .providers import Operation


@Operation
def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the ``count`` highest scores of every KV head.

    Of equal scores the lowest positions win; results ascend.

    Args:
        scores: ``[kv_heads, tokens]`` float32.
        count: Positions to keep, at most ``tokens``.

    Returns:
        ``[kv_heads, count]`` int64, sorted, unique in each row.
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=-1).values


def select_each(scores: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """As `select`, with a count for every KV head: ``[count]`` int64 of each."""
    rows = scores.split(1)
    return [select(row, count)[0] for row, count in zip(rows, counts, strict=True)]
