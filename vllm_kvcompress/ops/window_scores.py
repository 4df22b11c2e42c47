"""Attention mass that the observation window gives to every key."""

from collections.abc import Sequence

import torch

from .pages import PagedKeys
from .providers import Operation

MAX_LOGITS = 1 << 24  # of one temporary


@Operation
def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor | PagedKeys,
    *,
    scale: float,
    softcap: float = 0.0,
    weights: torch.Tensor | None = None,
    past_only: Sequence[bool] = (),
) -> torch.Tensor:
    """Sum over the window, mean over the query heads of a KV head.

    The softmax runs in float32 over all keys, the window's own included, under
    the causal mask (SnapKV, arXiv 2404.14469, listing 1). One KV head and at most
    `MAX_LOGITS` logits at a time.

    Args:
        queries: ``[window, query_heads, head_size]``, the last queries, rotated.
        keys: ``[kv_heads, tokens, head_size]``, all keys, rotated; a `PagedKeys` may
            stand for them.
        scale: Factor on the logits, ``head_size ** -0.5`` in most models.
        softcap: ``softcap * tanh(logits / softcap)`` if not 0 (Gemma 2).
        weights: ``[window]`` float32, a factor on each query's votes; None = 1.
        past_only: Of each KV head's query heads, whether they do not see their own
            token; empty = all see it.

    Returns:
        ``[kv_heads, tokens]`` float32.
    """
    if isinstance(keys, PagedKeys):
        keys = keys.dense()
    window, query_heads, head_size = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    # Query head h reads KV head h // group.
    grouped = queries.float().view(window, kv_heads, group, head_size)
    grouped = grouped.permute(1, 2, 0, 3)  # [kv_heads, group, window, head_size]
    position = torch.arange(tokens - window, tokens, device=keys.device)
    scores = torch.zeros(kv_heads, tokens, dtype=torch.float32, device=keys.device)
    rows = max(1, MAX_LOGITS // (group * tokens))
    strict = torch.tensor(list(past_only), dtype=torch.bool, device=keys.device)
    for head in range(kv_heads):
        columns = keys[head].float().T
        for first in range(0, window, rows):
            part = grouped[head, :, first : first + rows]
            logits = (part.reshape(-1, head_size) @ columns).mul_(scale)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.view(group, -1, tokens)
            recent = logits[:, :, tokens - window :]
            future = position[first : first + rows, None] < position
            recent.masked_fill_(future, float("-inf"))
            if past_only:
                itself = position[first : first + rows, None] == position
                unseen = strict[:, None, None] & itself
                recent.masked_fill_(unseen, float("-inf"))
            votes = logits.softmax(-1)
            if past_only:
                votes = votes.nan_to_num()  # a first token sees nothing
            if weights is None:
                scores[head] += votes.sum(1).mean(0)
            else:
                scores[head] += weights[first : first + rows] @ votes.mean(0)
    return scores
