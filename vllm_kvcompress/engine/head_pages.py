"""Rows of the block table for every KV head of a request.

A page is one KV head's part of a block: in vLLM's head-major caches it is
contiguous, and page ``block * kv_heads + head`` of the cache seen as
``[num_blocks * kv_heads, 1, block_size, 2 * head_size]``. A request whose heads
hold unequally many tokens has its private blocks' pages dealt out to them. Kernels
then read a batch of (KV head, request) pairs, each with one KV head; allocation and
slot mapping know of blocks only. Batches without such a request stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..methods.base import Scorer
from ..ops.select import select_each
from .layout import PageLayout
from .rows import RowShift

# The others have never been tried; some lay out blocks token by token.
BACKENDS = ("CPU_ATTN",)


class HeadPages(RowShift):
    """Rows of one KV cache group, by request and, where pages are dealt out, head.

    Rows are first shifted by whole blocks, as those of all requests; in them a
    head's own pages then take the place of the private blocks.
    """

    def __init__(self, max_num_reqs: int, device: torch.device, kv_heads: int) -> None:
        super().__init__(max_num_reqs, device)
        self._kv_heads = kv_heads
        self._pages: dict[str, tuple[torch.Tensor, ...]] = {}
        self._laid_out: tuple[tuple[str, ...], int, int] | None = None

    def deal(
        self, request_id: str, blocks: torch.Tensor, shares: Sequence[int]
    ) -> torch.Tensor:
        """Give the heads of a request their pages.

        Args:
            request_id: Its private blocks,
            blocks: ``[count]`` int64, as kernels count them.
            shares: Pages per head, ``count * kv_heads`` in sum.

        Returns:
            All pages, ``[count * kv_heads]``, the first head's first.
        """
        pages = self.pages(blocks, torch.arange(self._kv_heads)).T.flatten()
        self._pages[request_id] = pages.split(list(shares))
        self._laid_out = None
        return pages

    def forget(self, request_id: str) -> None:
        """See `RowShift.forget`."""
        super().forget(request_id)
        if self._pages.pop(request_id, None):
            self._laid_out = None

    def pages(self, blocks: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """``[len(heads), len(blocks)]``: the heads' pages of some blocks."""
        return blocks * self._kv_heads + heads.to(blocks.device)[:, None]

    def by_head(
        self, physical: CommonAttentionMetadata, block_size: int
    ) -> CommonAttentionMetadata | None:
        """The metadata of the batch of (KV head, request) pairs, head by head.

        Args:
            physical: From `RowShift.physical`.
            block_size: The same as there.

        Returns:
            None if no request in the batch has pages dealt out.
        """
        if not any(request_id in self._pages for request_id in self._rows):
            return None
        table, heads = physical.block_table_tensor, self._kv_heads
        rows, width = table.shape
        self._lay_out(rows, width, block_size)
        pages = table.expand(heads, -1, -1).gather(2, self._column)
        pages = pages.mul_(heads).add_(torch.arange(heads).view(-1, 1, 1))
        starts = physical.query_start_loc_cpu
        tokens = int(starts[-1])
        first = torch.arange(heads, dtype=starts.dtype)[:, None] * tokens
        end = torch.tensor([heads * tokens], dtype=starts.dtype)
        starts = torch.cat([(first + starts[:-1]).flatten(), end])
        lens = (physical.seq_lens + self._extra).flatten()
        dealt = torch.where(self._own >= 0, self._own, pages)
        return physical.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            num_reqs=len(lens),
            num_actual_tokens=heads * tokens,
            max_seq_len=int(lens.max()),
            block_table_tensor=dealt.flatten(0, 1),
            positions=None,
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _lay_out(self, rows: int, width: int, block_size: int) -> None:
        """Bring up to date what depends on the batch's requests alone.

        ``_own [kv_heads, rows, width]`` are pages dealt out, -1 elsewhere; there the
        page is that of the table's ``_column``. ``_extra [kv_heads, rows]`` tokens
        are added to lengths.
        """
        wanted = (tuple(self._rows), rows, width)
        if self._laid_out == wanted:
            return  # rows change far less often than steps are run
        self._laid_out = wanted
        heads = self._kv_heads
        self._own = torch.full((heads, rows, width), -1, dtype=torch.int32)
        self._column = torch.arange(width).repeat(heads, rows, 1)
        self._extra = torch.zeros(heads, rows, dtype=torch.int32)
        for row, request_id in enumerate(self._rows):
            dealt = self._pages.get(request_id, ())
            private = sum(map(len, dealt)) // heads
            for head, own in enumerate(dealt):
                self._own[head, row, : len(own)] = own
                self._column[head, row] += private - len(own)
                self._extra[head, row] = (len(own) - private) * block_size
        self._column.clamp_(0, width - 1)


def keep_by_head(
    scorer: Scorer,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, PageLayout]],
    source: torch.Tensor,
    target: torch.Tensor,
    rows: HeadPages,
    request_id: str,
) -> None:
    """Deal out a request's private blocks by score and fill them.

    Args:
        scorer: Of a method with uneven heads.
        layers: Of each the scores ``[kv_heads, candidates]``, the cache, and the
            order in its pages.
        source: ``[count]`` int64, the blocks from the first candidate on.
        target: ``[count]`` int64, the private blocks.
        rows: Learns which head got which pages.
        request_id: Whose blocks they are.
    """
    _, kv_heads, block_size, _ = layers[0][1].shape
    all_scores = [scores for scores, _, _ in layers]
    shares = scorer.head_shares(all_scores, len(target) * kv_heads, block_size)
    pages = rows.deal(request_id, target, shares)
    heads = torch.arange(kv_heads)
    tokens = len(source) * block_size
    for scores, cache, layout in layers:
        by_head = select_each(scores, [share * block_size for share in shares])
        kept = torch.cat([own + head * tokens for head, own in enumerate(by_head)])
        cache = one_head(cache)
        found = rows.pages(source, heads).flatten()
        for half in (layout.keys, layout.values):
            half.write(cache, pages, half.gather(cache, found, kept[None]))


def one_head(kv_cache: torch.Tensor) -> torch.Tensor:
    """A cache as one-head pages, ``[num_blocks * kv_heads, 1, block_size, ...]``."""
    return kv_cache.view(-1, 1, *kv_cache.shape[2:])


def attend_by_head(
    forward: Callable[..., Any],
    kv_heads: int,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Run a backend's forward over (KV head, request) pairs.

    Args:
        forward: Of vLLM's implementation.
        kv_heads: Of the layer.
        layer: The rest is what vLLM calls it with, but for
        query: ``[tokens, query_heads, head_size]``,
        key: not read,
        value: not read,
        kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``,
        metadata: of `HeadPages.by_head`, and
        output: ``[tokens, query_heads, head_size]``, which is filled.
        *args: Passed on, as
        **kwargs: are these.
    """
    tokens = metadata.num_actual_tokens // kv_heads
    # Query head h reads KV head h // group.
    rows = query[:tokens].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1)
    found = torch.empty_like(rows)
    forward(
        layer, rows, key, value, one_head(kv_cache), metadata, found, *args, **kwargs
    )
    found = found.unflatten(0, (kv_heads, tokens)).transpose(0, 1)
    output[:tokens].unflatten(1, (kv_heads, -1)).copy_(found)
    return output
