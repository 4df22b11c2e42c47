"""Smoothing of scores along the tokens, so that neighbours are kept together."""

from typing import Literal

import torch
from torch.nn import functional

from .providers import Operation

Pooling = Literal["max", "avg"]


@Operation
def pool(scores: torch.Tensor, *, kernel_size: int, pooling: Pooling) -> torch.Tensor:
    """Pool over positions with stride 1 and the same length.

    As the authors' code does it (SnapKV e216ddc): average pooling pads with zeros
    and always divides by ``kernel_size``; max pooling pads with -inf.

    Args:
        scores: ``[kv_heads, tokens]`` float32.
        kernel_size: Odd.
        pooling: ``"max"`` or ``"avg"``.

    Returns:
        ``[kv_heads, tokens]`` float32.
    """
    if scores.shape[1] == 0:
        return scores  # which torch refuses
    pad = kernel_size // 2
    if pooling == "max":
        return functional.max_pool1d(scores[None], kernel_size, 1, pad)[0]
    return functional.avg_pool1d(scores[None], kernel_size, 1, pad)[0]
