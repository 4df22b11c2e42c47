"""Attention over pages by xformers, an independent oracle and baseline on GPUs.

Ordinary pages are read where they lie (`PagedBlockDiagonalGappyKeysMask`). Merged ones
are a second region: restored, attended to apart, and both merged by their logarithms
of sums. Asked for by name only: ``kernels: {"attend_pages": "xformers"}``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from xformers.ops import fmha

from .pages import Elements
from .providers import Setting

_TYPES = (torch.bfloat16, torch.float16)


def refusal(setting: Setting, operation: str | None) -> str | None:
    """Why xformers cannot serve, None if it can."""
    if setting.device.type != "cuda":
        return "needs a GPU"
    for pages in setting.pages:
        if pages.dtype not in _TYPES:
            return f"does not read {pages.dtype}"
        if pages.keys is None:
            return "does not read tiled pages"
    return None


def attend_pages(
    query: torch.Tensor,
    cache: torch.Tensor,
    halves: Sequence[Elements],
    blocks: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    scales: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See `attend_pages.attend_pages`.

    Raises:
        ValueError: There is a soft cap, or heads are not the innermost of a cache.
    """
    if softcap:
        raise ValueError("xformers knows no soft cap of logits")
    block_size = cache.shape[2]
    rows = [own.long() for own in blocks.split(starts.diff().tolist())]
    merged = (scales != 1).flatten(2).any(2).any(0)
    held = [_held(own, int(n), block_size) for own, n in zip(rows, lens, strict=True)]
    ordinary = [(own[~merged[own]], n[~merged[own]]) for own, n in held]
    restored = [(own[merged[own]], n[merged[own]]) for own, n in held]
    views = [half.view(cache) for half in halves]
    if any(view is None for view in views):
        raise ValueError("xformers does not read tiled pages")
    pages = [view.transpose(1, 2) for view in views if view is not None]
    copies = torch.cat([own for own, _ in restored])
    own_pages = [
        page[copies] * factors[copies, :, :, None].to(page.dtype)
        for page, factors in zip(pages, scales, strict=True)
    ]
    numbers = torch.arange(len(copies), device=copies.device)
    parts = numbers.split([len(own) for own, _ in restored])
    restored = [(own, n) for own, (_, n) in zip(parts, restored, strict=True)]
    return _joined(
        _region(query, pages, ordinary, scale),
        _region(query, own_pages, restored, scale),
    )


def _held(
    blocks: torch.Tensor, tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's blocks, and how many tokens each of them holds."""
    first = torch.arange(len(blocks), device=blocks.device) * block_size
    return blocks, (tokens - first).clamp(max=block_size)


def _region(
    query: torch.Tensor,
    pages: Sequence[torch.Tensor],
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows find in some pages, and the logarithms of their sums.

    Args:
        query: ``[rows, query_heads, head_size]``.
        pages: Keys and values, ``[pages, block_size, kv_heads, head_size]``.
        rows: Pages of each row and the tokens that they hold.
        scale: Factor on logits.

    Returns:
        ``[rows, query_heads, head_size]`` and ``[rows, query_heads]`` float32; 0 and
        -inf where a row has no page.
    """
    found = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    sums = found.new_full(query.shape[:2], float("-inf"))
    some = [number for number, (own, _) in enumerate(rows) if len(own)]
    if not some:
        return found, sums
    _, block_size, kv_heads, head_size = pages[0].shape
    group = query.shape[1] // kv_heads
    tables = pad_sequence([rows[number][0].int() for number in some], batch_first=True)
    padding = tables.shape[1] * block_size
    # The paged mask's own `from_seqlens` contradicts itself (xformers 0.0.35).
    mask = fmha.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=[1] * len(some),
        kv_seqstarts=[padding * place for place in range(len(some) + 1)],
        kv_seqlen=[int(rows[number][1].sum()) for number in some],
        device=query.device,
    ).make_paged(
        tables,
        block_size,
        padding,
        fmha.attn_bias.PagedBlockDiagonalGappyKeysMask,
    )
    asked = query[some].to(pages[0].dtype).unflatten(1, (kv_heads, group))[None]
    keys, values = (
        _tokens(page)[None, :, :, None].expand(-1, -1, -1, group, -1) for page in pages
    )
    own, lse = fmha.memory_efficient_attention_partial(
        asked, keys, values, mask, scale=scale, output_dtype=torch.float32
    )
    found[some] = own[0].flatten(1, 2)
    sums[some] = lse[0].flatten(0, 1).T.to(sums.dtype)
    return found, sums


def _tokens(pages: torch.Tensor) -> torch.Tensor:
    """``[tokens, kv_heads, head_size]``, without a copy."""
    if pages.stride(0) != pages.shape[1] * pages.stride(1):
        raise ValueError("xformers reads caches only with heads innermost")
    return pages.flatten(0, 1)


def _joined(*regions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The attention over all regions; of some rows a region may hold nothing."""
    found, sums = (torch.stack(parts) for parts in zip(*regions, strict=True))
    empty = sums.isinf().all(2)  # [regions, rows]
    both = ~empty.any(0)
    result = torch.where(empty[0][:, None, None], found[1], found[0])
    if both.any():
        joined, _ = fmha.merge_attentions(
            list(found[:, None, both]),
            list(sums[:, None, both].transpose(2, 3).contiguous()),
            write_lse=False,
        )
        result[both] = joined[0].to(result.dtype)
    return result


KERNELS: Mapping[str, Callable[..., Any]] = {"attend_pages": attend_pages}
