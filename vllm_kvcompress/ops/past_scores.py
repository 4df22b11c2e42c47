"""Attention that the observation window gives to what lies before it."""

import torch


def past_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Mean over the window; of a KV head's query heads the largest logit counts.

    The softmax runs in float32 over the past alone, after the maximum (R-KV, arXiv
    2505.24133). One KV head at a time, so the largest temporary is
    ``[window, heads per KV head, tokens]``.

    Args:
        queries: ``[window, query_heads, head_size]``, rotated.
        keys: ``[kv_heads, tokens, head_size]``, all before the window, rotated.
        scale: Factor on the logits.
        softcap: As in `window_scores`.

    Returns:
        ``[kv_heads, tokens]`` float32; each row adds up to 1.
    """
    window, _, head_size = queries.shape
    kv_heads, tokens, _ = keys.shape
    # Query head h reads KV head h // group.
    grouped = queries.float().view(window, kv_heads, -1, head_size)
    scores = torch.empty(kv_heads, tokens, dtype=torch.float32, device=keys.device)
    for head in range(kv_heads):
        logits = (grouped[:, head] @ keys[head].float().T).amax(1).mul_(scale)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        scores[head] = logits.softmax(-1).mean(0)
    return scores
