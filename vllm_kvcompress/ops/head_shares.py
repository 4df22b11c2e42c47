"""How many pages each KV head gets of what a layer keeps."""

import math
from collections.abc import Sequence

import torch


def head_shares(
    scores: Sequence[torch.Tensor], pages: int, page_size: int, floor: float
) -> list[int]:
    """Deal out pages by the heads' numbers of best scores.

    In each layer a head is due its protected tokens, and of what room they leave
    ``floor`` times the even share and ``1 - floor`` times its tokens among the best
    of all heads; heads share a tie in proportion. Layers count alike.

    Args:
        scores: Of each layer, ``[kv_heads, tokens]``; protected tokens have ``+inf``,
            and ``-inf`` fills the rows of heads that hold fewer.
        pages: Of all heads together.
        page_size: Tokens of a page.
        floor: From 0, all by score, to 1, all alike.

    Returns:
        Pages per head, ``pages`` in sum, for each head enough to hold its protected
        tokens and no more than all of its tokens, if that can be.
    """
    heads = scores[0].shape[0]
    due, least = [0.0] * heads, [0] * heads
    most = [held // page_size for held in (~scores[0].isneginf()).sum(1).tolist()]
    for layer in scores:
        protected = layer.isposinf().sum(1)
        room = pages * page_size - int(protected.sum())
        best = _among_the_best(layer, room)
        for head, held in enumerate(protected.tolist()):
            even = pages * page_size / heads - held
            tokens = held + floor * even + (1 - floor) * best[head]
            due[head] += tokens / page_size / len(scores)
            least[head] = max(least[head], -(-held // page_size))
    return _rounded(due, least, most, pages)


def _among_the_best(scores: torch.Tensor, count: int) -> list[float]:
    """How many of the ``count`` best unprotected scores each head has."""
    if count <= 0:
        return [0.0] * len(scores)
    open_scores = scores[scores.isfinite()]
    last = open_scores.sort(descending=True).values[count - 1]
    above = ((scores > last) & scores.isfinite()).sum(1).tolist()
    equal = (scores == last).sum(1).tolist()
    part = (count - sum(above)) / sum(equal)
    return [a + part * e for a, e in zip(above, equal, strict=True)]


def _rounded(
    due: Sequence[float], least: Sequence[int], most: Sequence[int], total: int
) -> list[int]:
    """Whole numbers of the sum ``total`` near ``due``: the largest remainders round up.

    Of equal remainders the lowest head's does.
    """
    heads = range(len(due))
    found = [min(max(least[h], math.floor(due[h])), most[h]) for h in heads]
    while sum(found) < total:
        room = [head for head in heads if found[head] < most[head]]
        found[max(room, key=lambda head: due[head] - found[head])] += 1
    while sum(found) > total:
        spare = [head for head in heads if found[head] > least[head]]
        found[min(spare, key=lambda head: due[head] - found[head])] -= 1
    return found
