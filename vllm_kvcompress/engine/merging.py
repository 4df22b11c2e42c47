"""Two neighbouring layers merge what they hold of a request."""

from dataclasses import dataclass
from typing import Any

import torch

from ..methods.minicache import MiniCache
from ..ops.merge import Merged, merge, strangeness
from ..ops.select import select
from .layers import rate
from .layout import page_layout


@dataclass(frozen=True)
class Part:
    """One layer of a pair, and where the request's tokens are and go.

    Attributes:
        layer: vLLM's.
        source: ``[count]`` int64, blocks that hold the tokens.
        target: ``[kept]`` int64, blocks that will; merged ones first, the same in both.
        queries: ``[window, query_heads, head_size]``, None if not needed.
    """

    layer: Any
    source: torch.Tensor
    target: torch.Tensor
    queries: torch.Tensor | None = None


def merge_layers(
    scorer: MiniCache,
    shallow: Part,
    deep: Part,
    num_tokens: int,
    candidates: int,
    merged_blocks: int,
) -> None:
    """Fill a pair's private blocks.

    Args:
        scorer: Its parameters.
        shallow: The lower layer, whose pages the merged ones are.
        deep: The upper one, which has ``page_scales``.
        num_tokens: Held in ``source``.
        candidates: The first of them, whole blocks; the rest stays as it is.
        merged_blocks: How many of ``target`` are filled with merged tokens.
    """
    cache, block_size = shallow.layer.kv_cache, shallow.layer.kv_cache.shape[2]
    layout, kept = page_layout(shallow.layer), len(shallow.target) * block_size
    held = [
        [half.take(cache, part.source)[:, :num_tokens] for part in (shallow, deep)]
        for half in (layout.keys, layout.values)
    ]
    if kept < candidates:
        scores = [
            rate(scorer, part.layer, part.queries, keys, values)[:, :candidates]
            for part, keys, values in zip((shallow, deep), *held, strict=True)
        ]
        best = select(scores[0] + scores[1], kept)
        held = [[_at(tokens, best) for tokens in half] for half in held]
    else:
        held = [[tokens[:, :candidates] for tokens in half] for half in held]
    merged = [merge(half[0], half[1], scorer.t) for half in held]
    strange = strangeness(*(half.distance for half in merged))
    share = merged_blocks * block_size
    retained = select(strange, kept - share)
    others = _others(retained, kept)
    exact = None
    if scorer.retention == "range":
        exact = strange.gather(1, retained) >= 1 - scorer.gamma
    pages = (layout.keys, layout.values)
    for index, (half, own, found) in enumerate(zip(pages, held, merged, strict=True)):
        shared = shallow.target[:merged_blocks]
        half.write(cache, shared, _at(found.shared, others).to(cache.dtype))
        scales = deep.layer.page_scales[index]
        ratios = found.ratio.gather(1, others).unflatten(1, (-1, block_size))
        scales[shared] = ratios.permute(1, 2, 0).to(scales.dtype)
        for part, tokens, like in zip((shallow, deep), own, _read(found), strict=True):
            left = _at(tokens, retained)
            if exact is not None:
                left = torch.where(exact[..., None], left, _at(like, retained))
            half.write(cache, part.target[merged_blocks:], left.to(cache.dtype))


def _read(found: Merged) -> tuple[torch.Tensor, torch.Tensor]:
    """What either layer reads of merged tokens."""
    return found.shared, found.shared * found.ratio[..., None]


def _at(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[kv_heads, count, head_size]`` of ``[kv_heads, tokens, head_size]``."""
    head = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[head, positions]


def _others(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending positions below ``count`` that each row of ``positions`` lacks."""
    missing = torch.ones(
        len(positions), count, dtype=torch.bool, device=positions.device
    )
    missing.scatter_(1, positions, False)
    return missing.nonzero()[:, 1].unflatten(0, (len(positions), -1))
