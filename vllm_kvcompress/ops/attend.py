"""Attention of new tokens over keys and values that are still to be scaled."""

import torch


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of the latest tokens over all, in float32.

    A scale belongs to one token and KV head, so it is applied to logits and to
    weights, not to every element of a vector.

    Args:
        query: ``[new, query_heads, head_size]``.
        keys: ``[kv_heads, tokens, head_size]``, the new ones last.
        values: ``[kv_heads, tokens, head_size]``.
        key_scale: ``[kv_heads, tokens]``.
        value_scale: The same.
        scale: Factor on logits.
        softcap: Logit soft cap, 0 = none.

    Returns:
        ``[new, query_heads, head_size]`` float32.
    """
    new, kv_heads, tokens = len(query), len(keys), keys.shape[1]
    rows = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    logits = rows.float() @ keys.float().transpose(1, 2)
    logits *= scale * key_scale.float()[:, None]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if new > 1:
        position = torch.arange(tokens, device=query.device)
        latest = torch.arange(tokens - new, tokens, device=query.device)
        hidden = position > latest[:, None]
        logits = logits.unflatten(1, (-1, new)).masked_fill(hidden, float("-inf"))
        logits = logits.flatten(1, 2)
    weights = logits.softmax(-1) * value_scale.float()[:, None]
    found = weights @ values.float()
    return found.unflatten(1, (-1, new)).permute(2, 0, 1, 3).flatten(1, 2)
