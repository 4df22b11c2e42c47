"""Gated retention (YOCO, arXiv 2405.05254, section 3.1) in three equal forms.

Per head ``S_t = gamma_t S_{t-1} + k_t^T v_t`` and ``o_t = q_t S_t``, with a decay
``gamma_t`` between 0 and 1 that every token sets for itself. All that a head knows of
the past is its state: ``[head_size, head_size]``, however long the past is.

Queries and keys come rotated, the keys scaled by ``head_size ** -0.5`` too. Every
function takes any dtype, computes in float32, changes no argument and carries
gradients. Every shape may have more dimensions in front, such as a batch.
"""

import torch
from torch.nn import functional as F

Tensor = torch.Tensor

GATE_NORMALIZER = 16  # Of the authors: gamma = sigmoid(gate) ** (1 / 16).
CHUNK = 256


def gate_decay(gates: Tensor) -> Tensor:
    """``log gamma``, from the gate's logits; float32 of the same shape, at most 0."""
    return F.logsigmoid(gates.float()) / GATE_NORMALIZER


def retention_recurrent(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Retention by its definition, token by token: the one for decoding.

    Args:
        queries: ``[tokens, heads, head_size]``.
        keys: The same.
        values: The same.
        log_decay: ``[tokens, heads]``, at most 0.
        state: ``[heads, head_size, head_size]`` float32, rows for keys and columns
            for values; zeros where a sequence starts.

    Returns:
        ``[tokens, heads, head_size]`` float32, and the state after the last token.
    """
    queries, keys, values = (part.float() for part in (queries, keys, values))
    decay = log_decay.float().exp()
    outputs = torch.empty_like(values)
    for t in range(values.shape[-3]):
        added = keys[..., t, :, :, None] * values[..., t, :, None, :]
        state = decay[..., t, :, None, None] * state + added
        outputs[..., t, :, :] = (queries[..., t, :, None, :] @ state).squeeze(-2)
    return outputs, state


def retention_parallel(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor
) -> Tensor:
    """Retention of whole sequences, without a state: ``(q k^T * decay) v``.

    Takes memory for ``heads * tokens ** 2`` weights.

    Args:
        queries: ``[tokens, heads, head_size]``.
        keys: The same.
        values: The same.
        log_decay: ``[tokens, heads]``, at most 0.

    Returns:
        ``[tokens, heads, head_size]`` float32.
    """
    q, k, v = (part.float().transpose(-3, -2) for part in (queries, keys, values))
    return _within(q, k, v, _summed(log_decay)).transpose(-3, -2)


def retention_chunkwise(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor,
    state: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Parallel within a chunk, recurrent from chunk to chunk: the one for prompts.

    Takes memory for ``heads * chunk ** 2`` weights. Any number of tokens is exact: the
    last chunk is as short as it is, without padding.

    Args:
        queries: ``[tokens, heads, head_size]``.
        keys: The same.
        values: The same.
        log_decay: ``[tokens, heads]``, at most 0.
        state: ``[heads, head_size, head_size]`` float32, rows for keys and columns
            for values; zeros where a sequence starts.
        chunk: Tokens of one chunk.

    Returns:
        ``[tokens, heads, head_size]`` float32, and the state after the last token.

    Raises:
        ValueError: ``chunk`` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    outputs = []
    parts = (part.split(chunk, -3) for part in (queries, keys, values))
    for *vectors, decay in zip(*parts, log_decay.split(chunk, -2), strict=True):
        q, k, v = (part.float().transpose(-3, -2) for part in vectors)
        summed = _summed(decay)
        whole = decay.double().sum(-2)[..., None]
        since_start = summed.exp().float()[..., None]
        to_end = (whole - summed).exp().float()[..., None]
        output = _within(q, k, v, summed) + (q * since_start) @ state
        state = whole.exp().float()[..., None] * state + (k * to_end).mT @ v
        outputs.append(output.transpose(-3, -2))
    return torch.cat(outputs, -3), state


def _summed(log_decay: Tensor) -> Tensor:
    """Log decays summed from the first token on, ``[heads, tokens]`` float64.

    In float32 a strong decay early on would swallow the weak ones after it.
    """
    return log_decay.double().cumsum(-2).mT


def _within(q: Tensor, k: Tensor, v: Tensor, summed: Tensor) -> Tensor:
    """What tokens hear of each other, all ``[heads, tokens, head_size]`` float32."""
    tokens = q.shape[-2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu_(1)
    between = (summed[..., :, None] - summed[..., None, :]).float()
    # The future's sums are positive: masked after exp, they could be inf.
    decay = between.masked_fill(future, float("-inf")).exp()
    return (q @ k.mT * decay) @ v
