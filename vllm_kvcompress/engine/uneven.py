"""Compression of a request whose KV heads keep unequally many tokens.

The first time all heads hold the same number of tokens, later each its own, and is
then scored alone. All heads of a layer share what it keeps, on whichever worker they
are: what a worker's heads keep may take more blocks than the mean, or fewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..methods.base import Scorer
from ..ops.select import select_each
from .head_pages import HeadPages
from .heads import HeldHeads, rate
from .page_formats import KEYS, VALUES, Pages


@dataclass(frozen=True)
class HeldLayer:
    """What a request holds in one layer.

    Attributes:
        layer: vLLM's.
        pages: Its pages, by head.
        queries: ``[window, query_heads, head_size]``, None if not needed.
    """

    layer: Any
    pages: Pages
    queries: torch.Tensor | None


def keep_by_head(
    scorer: Scorer,
    layers: Sequence[HeldLayer],
    source: torch.Tensor,
    target: torch.Tensor,
    mean: int,
    num_tokens: int,
    candidates: int,
    rows: HeadPages,
    request_id: str,
) -> int:
    """Deal out a request's new private blocks by score and fill them.

    Args:
        scorer: Of a method with uneven heads.
        layers: They get the same shares.
        source: ``[count]`` int64, the blocks that are held, the private ones first.
        target: ``[count]`` int64 on the CPU, the new private blocks; if there are more
        mean: than so many of them, they are for workers whose heads need them.
        num_tokens: Held, in the mean of the heads.
        candidates: The first of them, whole blocks; the rest stays as it is.
        rows: Knows which head has which pages, and learns of the new ones.
        request_id: Whose blocks they are.

    Returns:
        How many of them the worker with the most fills.
    """
    block_size = layers[0].layer.kv_cache.shape[2]
    heads: HeldHeads = layers[0].layer.held_heads
    held = rows.held(request_id, source)
    spare, tail = len(source) * block_size - num_tokens, num_tokens - candidates
    scores = [_scores(scorer, layer, held, spare, tail) for layer in layers]
    longest = candidates + rows.longer(request_id) * block_size
    everywhere = heads.all_scores(scores, longest)
    all_shares = scorer.head_shares(everywhere, mean * heads.total, block_size)
    shares = all_shares[heads.first :][: heads.count]
    pages = rows.deal(request_id, target, shares, mean, max(all_shares))
    pages = pages.to(source.device)
    counts = [share * block_size for share in shares]
    starts = list(accumulate((len(own) * block_size for own in held), initial=0))
    for layer, rated in zip(layers, scores, strict=True):
        best = select_each(rated, counts)
        kept = torch.cat(
            [own + start for own, start in zip(best, starts, strict=False)]
        )
        if len(pages):  # else all are other workers'
            layer.pages.compact(torch.cat(held), kept[None], pages)
    return max(mean, -(-heads.most(all_shares) // heads.count))


def _scores(
    scorer: Scorer, layer: HeldLayer, held: list[torch.Tensor], spare: int, tail: int
) -> torch.Tensor:
    """``[kv_heads, candidates]`` float32, -inf behind those of a head with fewer.

    Heads that hold equally many tokens are scored at once.
    """
    found = list[torch.Tensor]()
    alike = len({len(own) for own in held}) == 1
    parts = [held] if alike else [[own] for own in held]

    for index, part in enumerate(parts):
        blocks = torch.stack(part)
        tokens = blocks.shape[1] * layer.pages.block_size - spare
        queries = values = None
        if layer.queries is not None:
            queries = layer.queries.chunk(len(parts), dim=1)[index]
        if scorer.needs_values:
            values = layer.pages.vectors(VALUES, blocks, tokens).dense()
        keys = layer.pages.vectors(KEYS, blocks, tokens)
        scores = rate(scorer, layer.layer, queries, keys, values, head=index)
        found += scores[:, : scores.shape[1] - tail].unbind()
    return pad_sequence(found, batch_first=True, padding_value=float("-inf"))
