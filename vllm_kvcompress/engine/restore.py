"""Rows with merged tokens, on processors, where vLLM's kernel knows no factors.

Rows that decode have a kernel of ours that does. Where that cannot be had, and for
rows with more new tokens, pages are restored for vLLM's: a pass over them in every
step, and memory for some of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..ops.attend import attend
from ..ops.attend_pages import attend_pages
from ..ops.providers import TORCH
from .layout import page_layout
from .page_formats import KEYS, UNQUANTISED, VALUES, pages_of

# Restored pages that exist at once, beyond those of one request.
MOST_BYTES = 256 * 2**20
# Pages are copied and multiplied while they are in a processor's cache.
_CACHED_BYTES = 2**21


@dataclass
class RestoredRows:
    """Some rows of a batch, whose pages are restored together.

    Attributes:
        tokens: ``[count]`` int64, theirs in the batch.
        blocks: ``[count]`` int64, of all rows, one after another.
        starts: ``[rows + 1]`` int64: where those of a row begin.
        lens: ``[rows]`` int64, tokens that each holds.
        common: Metadata of these rows alone, with pages 0, 1, 2 and so on.
        metadata: A backend's, built from it.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    common: CommonAttentionMetadata
    metadata: Any = None

    @property
    def decodes(self) -> bool:
        """Whether each row has one new token."""
        return self.common.max_query_len == 1


def apart(
    common: CommonAttentionMetadata, rows: Sequence[int], kv_cache: torch.Tensor
) -> tuple[CommonAttentionMetadata, list[RestoredRows]]:
    """Split rows off a batch, for `attend_restored`.

    vLLM's kernel may still get them, as short as can be: what it finds is replaced.

    Args:
        common: Metadata of a group, as kernels read them.
        rows: Numbers of those with merged tokens, ascending.
        kv_cache: Of a layer of the group.

    Returns:
        The same with these rows short, and the rows in parts of `MOST_BYTES`.
    """
    starts = common.query_start_loc_cpu.tolist()
    lens, size = common.seq_lens.tolist(), kv_cache.shape[2]
    short = common.seq_lens.clone()
    most = max(1, MOST_BYTES // kv_cache[0].nbytes)
    parts: list[list[int]] = []
    held = 0
    for row in rows:
        short[row] = starts[row + 1] - starts[row]
        count = -(-lens[row] // size)
        if not parts or held + count > most:
            parts.append([])
            held = 0
        parts[-1].append(row)
        held += count
    found = [_part(common, part, starts, lens, size) for part in parts]
    return common.replace(seq_lens=short), found


def _part(
    common: CommonAttentionMetadata,
    rows: list[int],
    starts: list[int],
    lens: list[int],
    size: int,
) -> RestoredRows:
    spans = [torch.arange(starts[row], starts[row + 1]) for row in rows]
    counts = [-(-lens[row] // size) for row in rows]
    table = common.block_table_tensor
    blocks = [table[row, :n] for row, n in zip(rows, counts, strict=True)]
    pages = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    first = 0
    for own, count in zip(pages, counts, strict=True):
        own[:count] = torch.arange(first, first + count)
        first += count
    new = torch.tensor([0, *map(len, spans)], dtype=torch.int32)
    held = torch.tensor([lens[row] for row in rows], dtype=torch.int32)
    tokens = torch.cat(spans)
    alone = common.replace(
        query_start_loc=new.cumsum(0, dtype=torch.int32),
        query_start_loc_cpu=new.cumsum(0, dtype=torch.int32),
        seq_lens=held,
        seq_lens_cpu_upper_bound=held,
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=int(new.max()),
        max_seq_len=int(held.max()),
        block_table_tensor=pages,
        slot_mapping=common.slot_mapping[tokens],
        _num_computed_tokens_cache=None,
    )
    first_blocks = torch.tensor([0, *counts]).cumsum(0)
    return RestoredRows(
        tokens, torch.cat(blocks).long(), first_blocks, held.long(), alone
    )


def attend_restored(
    forward: Callable[..., Any],
    layer: Any,
    parts: Sequence[RestoredRows],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Fill in what rows with merged tokens attend to.

    Args:
        forward: Of the backend's implementation of attention.
        layer: Of a pair the deep one.
        parts: From `apart`.
        query: ``[tokens, query_heads, head_size]``.
        key: Not read.
        value: Not read.
        output: ``[tokens, query_heads, head_size]``.
    """
    for part in parts:
        own = query[part.tokens]
        if part.decodes and attend_pages.provider != TORCH:
            pages = pages_of(layer)
            found = attend_pages(
                own,
                pages.codes,
                pages.halves,
                part.blocks,
                part.starts,
                part.lens,
                layer.page_scales,
                scale=layer.impl.scale * pages.factor(KEYS),
                softcap=layer.impl.logits_soft_cap or 0.0,
            )
            found *= pages.factor(VALUES)
        elif layer.kv_cache_dtype in UNQUANTISED:
            restored, found = _restore(layer, part.blocks), torch.empty_like(own)
            forward(layer, own, key, value, restored, part.metadata, found)
        else:
            found = _attend(layer, own, part)
        output[part.tokens] = found.to(output.dtype)


def _restore(layer: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Pages ``[count, kv_heads, block_size, 2 * head_size]`` times their factors."""
    cache, layout = layer.kv_cache, page_layout(layer)
    pages = cache.new_empty(len(blocks), *cache.shape[1:])
    halves = (layout.keys, layout.values)
    views = [view for half in halves if (view := half.view(pages)) is not None]
    step = max(1, _CACHED_BYTES // cache[0].nbytes)
    for first in range(0, len(blocks), step):
        span = slice(first, first + step)
        own = blocks[span]
        scales = layer.page_scales[:, own].transpose(2, 3).to(cache.dtype)
        if len(views) == len(halves):
            torch.index_select(cache, 0, own, out=pages[span])
            for view, factors in zip(views, scales, strict=True):
                view[span].mul_(factors[..., None])
            continue
        for half, factors in zip(halves, scales, strict=True):
            by_token = factors.transpose(0, 1).flatten(1)[..., None]
            tokens = half.take(cache, own) * by_token
            half.write(pages[span], torch.arange(len(own)), tokens)
    return pages


def _attend(layer: Any, query: torch.Tensor, part: RestoredRows) -> torch.Tensor:
    """Attention over pages of codes, in torch; see `attend`."""
    pages, found = pages_of(layer), []
    starts = part.common.query_start_loc_cpu.tolist()
    own = part.blocks.split(part.starts.diff().tolist())
    for row, (blocks, tokens) in enumerate(zip(own, part.lens.tolist(), strict=True)):
        scales = layer.page_scales[:, blocks].flatten(1, 2).transpose(1, 2)
        keys, values = (
            pages.decode(half, pages.take(half, blocks))[:, :tokens]
            for half in (KEYS, VALUES)
        )
        found.append(
            attend(
                query[starts[row] : starts[row + 1]],
                keys,
                values,
                *scales[:, :, :tokens],
                scale=layer.impl.scale,
                softcap=layer.impl.logits_soft_cap or 0.0,
            )
        )
    return torch.cat(found)
