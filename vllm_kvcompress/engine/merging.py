"""Two neighbouring layers merge what they hold of a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..methods.minicache import MiniCache
from ..ops.merge import Merged, merge, strangeness
from ..ops.select import select
from ..plan import Compress
from .heads import rate
from .layout import kernel_blocks
from .page_formats import KEYS, VALUES, Pages, pages_of


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


@torch.inference_mode()
def merge_groups(
    scorer: MiniCache,
    request_id: str,
    pairs: Sequence[tuple[Any, Any]],
    rows: Sequence[torch.Tensor],
    directives: Sequence[Compress],
    block_size: int,
) -> torch.Tensor:
    """Merge what pairs of layers hold of a request.

    Args:
        scorer: Its parameters.
        request_id: The request.
        pairs: The layers of a lower group, each with that of an upper one.
        rows: ``[count]`` int64 each, the blocks that either group holds.
        directives: What is planned for either.
        block_size: Tokens of a block.

    Returns:
        ``[merged]`` int64, the blocks of merged tokens, as kernels count them.
    """
    directive = directives[1]
    stay = directive.candidates[0] // block_size if directive.candidates else 0
    if len(directive.destination) == stay:
        return rows[1][:0]  # a selection has left no whole block
    moved = directive.end_block - directive.shift - stay
    selects = moved > len(directive.destination) - stay
    for pair in pairs:
        split = block_size // pair[0].kv_cache.shape[2]
        parts = []
        for layer, row, do in zip(pair, rows, directives, strict=True):
            named = torch.tensor(do.destination[stay:], device=row.device)
            queries = None
            if selects and scorer.needs_queries:
                queries = layer.observation_window.of(request_id, directive.window)
            target = kernel_blocks(named.long(), split)
            parts.append(Part(layer, kernel_blocks(row[stay:], split), target, queries))
        merge_layers(
            scorer,
            parts[0],
            parts[1],
            num_tokens=directive.num_tokens - (directive.shift + stay) * block_size,
            candidates=moved * block_size,
            merged_blocks=directive.merged_blocks * split,
        )
    return parts[1].target[: directive.merged_blocks * split]


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
    parts = (shallow, deep)
    pages = [pages_of(part.layer) for part in parts]
    block_size = pages[0].block_size
    kept, share = (n * block_size for n in (len(shallow.target), merged_blocks))
    rows = [
        [own.take(half, part.source)[:, :num_tokens] for half in (KEYS, VALUES)]
        for own, part in zip(pages, parts, strict=True)
    ]
    if kept < candidates:
        scores = [
            rate(scorer, part.layer, part.queries, *_decode(own, held))[:, :candidates]
            for part, own, held in zip(parts, pages, rows, strict=True)
        ]
        best = select(scores[0] + scores[1], kept)
        rows = [[_at(tokens, best) for tokens in held] for held in rows]
    else:
        rows = [[tokens[:, :candidates] for tokens in held] for held in rows]
    vectors = [_decode(own, held) for own, held in zip(pages, rows, strict=True)]
    merged = [merge(a, b, scorer.t) for a, b in zip(*vectors, strict=True)]
    strange = strangeness(*(half.distance for half in merged))
    retained = select(strange, kept - share)
    others = _others(retained, kept)
    blocks = shallow.target[:merged_blocks]
    shared = pages[0].encode(*(_at(half.shared, others) for half in merged))
    for half, found in enumerate(merged):
        pages[0].write(half, blocks, shared[half])
        ratio = found.ratio.gather(1, others)
        pages[1].share(half, blocks, shared[half], pages[0], ratio)
    exact = None
    if scorer.retention == "range":
        exact = strange.gather(1, retained) >= 1 - scorer.gamma
    for index, (part, own) in enumerate(zip(parts, pages, strict=True)):
        left = [_at(tokens, retained) for tokens in rows[index]]
        if exact is not None:
            alike = own.encode(*(_at(_read(half)[index], retained) for half in merged))
            left = [
                torch.where(exact[..., None], *pair)
                for pair in zip(left, alike, strict=True)
            ]
        for half, tokens in enumerate(left):
            own.write(half, part.target[merged_blocks:], tokens)


def _decode(pages: Pages, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Vectors of rows of keys and of values."""
    return [pages.decode(half, tokens) for half, tokens in enumerate(rows)]


def _read(found: Merged) -> tuple[torch.Tensor, torch.Tensor]:
    """What either layer reads of merged tokens."""
    return found.shared, found.shared * found.ratio[..., None]


def _at(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[kv_heads, count, row]`` of ``[kv_heads, tokens, row]``."""
    head = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[head, positions]


def _others(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending positions below ``count`` that each row of ``positions`` lacks."""
    missing = torch.ones(
        len(positions), count, dtype=torch.bool, device=positions.device
    )
    missing.scatter_(1, positions, False)
    return missing.nonzero()[:, 1].unflatten(0, (len(positions), -1))
