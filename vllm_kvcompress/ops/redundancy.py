"""How much of a key other keys already say."""

import torch
from torch.nn.functional import normalize

MOST_PAIRS = 2**24  # 64 MiB of float32


def redundancy(
    keys: torch.Tensor, *, threshold: float, recent: int, most_pairs: int = MOST_PAIRS
) -> torch.Tensor:
    """Softmax over the tokens of a key's mean cosine with all keys.

    A key's cosine with itself counts as 0. So does, for every key, that with the
    last ``recent`` keys among those more similar to it than ``threshold``: of tokens
    that say the same, the latest are not redundant (R-KV, arXiv 2505.24133).

    Args:
        keys: ``[kv_heads, tokens, head_size]``.
        threshold: Cosine, at least 0.
        recent: See above; 0 = no exception.
        most_pairs: How many cosines are held at once.

    Returns:
        ``[kv_heads, tokens]`` float32; each row adds up to 1.
    """
    kv_heads, tokens, _ = keys.shape
    rows = max(1, most_pairs // tokens)
    sums = torch.zeros(kv_heads, tokens, dtype=torch.float32, device=keys.device)
    for head in range(kv_heads):
        directions = normalize(keys[head].float(), dim=-1)
        for first in range(0, tokens, rows):
            cosines = directions[first : first + rows] @ directions.T
            cosines.diagonal(first).zero_()
            similar = cosines > threshold
            # 1 at a row's last similar key, 2 at the one before.
            rank = similar.flip(1).cumsum(1, dtype=torch.int32).flip(1)
            cosines.masked_fill_(similar & (rank <= recent), 0.0)
            sums[head] += cosines.sum(0)
    return (sums / tokens).softmax(-1)
