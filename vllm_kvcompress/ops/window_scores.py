"""Attention mass that the observation window gives to every key."""

import torch


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Sum over the window, mean over the query heads of a KV head.

    The softmax runs in float32 over all keys, the window's own included, under
    the causal mask (SnapKV, arXiv 2404.14469, listing 1). One KV head at a time,
    so the largest temporary is ``[heads per KV head, window, tokens]``.

    Args:
        queries: ``[window, query_heads, head_size]``, the last queries, rotated.
        keys: ``[kv_heads, tokens, head_size]``, all keys, rotated.
        scale: Factor on the logits, ``head_size ** -0.5`` in most models.
        softcap: ``softcap * tanh(logits / softcap)`` if not 0 (Gemma 2).

    Returns:
        ``[kv_heads, tokens]`` float32.
    """
    window, query_heads, head_size = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    # [kv_heads, group * window, head_size]: query head h reads KV head h // group.
    grouped = queries.float().view(window, kv_heads, group, head_size)
    grouped = grouped.permute(1, 2, 0, 3).reshape(kv_heads, group * window, head_size)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    scores = torch.empty(kv_heads, tokens, dtype=torch.float32, device=keys.device)
    for head in range(kv_heads):
        logits = (grouped[head] @ keys[head].float().T).mul_(scale)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.view(group, window, tokens)
        logits[:, :, tokens - window :].masked_fill_(future, float("-inf"))
        scores[head] = logits.softmax(-1).sum(1).mean(0)
    return scores
