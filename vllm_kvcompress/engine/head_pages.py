"""Rows of the block table for every KV head of a request.

A page is one KV head's part of a block: in vLLM's head-major caches it is
contiguous, and page ``block * kv_heads + head`` of the cache seen as
``[num_blocks * kv_heads, 1, block_size, 2 * head_size]``. A request whose heads
hold unequally many tokens has its private blocks' pages dealt out to them. Kernels
then read a batch of (KV head, request) pairs, each with one KV head; allocation and
slot mapping know of blocks only. Batches without such a request stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from .rows import RowShift


@dataclass(frozen=True)
class _Dealt:
    """The private pages of a request.

    Attributes:
        mean: Per KV head of the layer; as many are in the request's row.
        most: Of the head with the most, on any worker.
        pages: ``[pages]`` int64 of each head of this worker.
    """

    mean: int
    most: int
    pages: tuple[torch.Tensor, ...]


class HeadPages(RowShift):
    """Rows of one KV cache group, by request and, where pages are dealt out, head.

    Rows are first shifted by whole blocks, as those of all requests; in them a
    head's own pages then take the place of the private blocks.
    """

    def __init__(self, max_num_reqs: int, device: torch.device, kv_heads: int) -> None:
        super().__init__(max_num_reqs, device)
        self._kv_heads = kv_heads
        self._dealt: dict[str, _Dealt] = {}
        self._laid_out: tuple[tuple[str, ...], int, int] | None = None

    def deal(
        self,
        request_id: str,
        blocks: torch.Tensor,
        shares: Sequence[int],
        mean: int,
        most: int,
    ) -> torch.Tensor:
        """Give the heads of a request their pages.

        Args:
            request_id: Its private blocks,
            blocks: ``[count]`` int64 on the CPU, as kernels count them.
            shares: Pages per head, which may leave some of the last blocks' over.
            mean: Of the shares of all heads of the layer,
            most: and the largest of them.

        Returns:
            The heads' pages, the first head's first.
        """
        pages = self._of(blocks).T.flatten()[: sum(shares)]
        self._dealt[request_id] = _Dealt(mean, most, pages.split(list(shares)))
        self._laid_out = None
        return pages

    def forget(self, request_id: str) -> None:
        """See `RowShift.forget`."""
        super().forget(request_id)
        if self._dealt.pop(request_id, None):
            self._laid_out = None

    def held(self, request_id: str, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The pages of every head of a request.

        Args:
            request_id: The request.
            blocks: ``[count]`` int64, its blocks, the private ones first.

        Returns:
            ``[pages]`` int64 of each head.
        """
        pages = self._of(blocks)
        if (dealt := self._dealt.get(request_id)) is None:
            return list(pages)
        return [
            torch.cat([own.to(blocks.device), rest[dealt.mean :]])
            for own, rest in zip(dealt.pages, pages, strict=True)
        ]

    def longer(self, request_id: str) -> int:
        """Pages by which a head, on any worker, holds more than the mean."""
        dealt = self._dealt.get(request_id)
        return dealt.most - dealt.mean if dealt else 0

    def _of(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[kv_heads, count]``: all heads' pages of some blocks."""
        heads = torch.arange(self._kv_heads, device=blocks.device)
        return blocks * self._kv_heads + heads[:, None]

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
        if not any(request_id in self._dealt for request_id in self._rows):
            return None
        table, heads = physical.block_table_tensor, self._kv_heads
        rows, width = table.shape
        self._lay_out(rows, width, block_size)
        pages = table.expand(heads, -1, -1).gather(2, self._column)
        first = torch.arange(heads, dtype=table.dtype, device=table.device)
        pages = pages.mul_(heads).add_(first.view(-1, 1, 1))
        dealt = torch.where(self._own >= 0, self._own, pages)
        starts = self._starts(physical.query_start_loc_cpu)
        bound, extra = physical.seq_lens_cpu_upper_bound, self._extra_cpu
        longest = physical.max_seq_len + int(extra.max())
        if bound is not None:
            bound = (bound + extra).flatten()
            longest = int(bound.max())
        return physical.replace(
            query_start_loc=starts.to(table.device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=(physical.seq_lens + self._extra).flatten(),
            seq_lens_cpu_upper_bound=bound,
            num_reqs=heads * rows,
            num_actual_tokens=int(starts[-1]),
            max_seq_len=longest,
            block_table_tensor=dealt.flatten(0, 1),
            positions=None,
            is_prefilling=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _starts(self, starts: torch.Tensor) -> torch.Tensor:
        """Of ``[rows + 1]`` the same for pairs, ``[kv_heads * rows + 1]``."""
        tokens = int(starts[-1])
        ends = torch.arange(self._kv_heads, dtype=starts.dtype)[:, None] * tokens
        return torch.cat([starts[:1], (ends + starts[1:]).flatten()])

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
        own_pages = torch.full((heads, rows, width), -1, dtype=torch.int32)
        column = torch.arange(width).repeat(heads, rows, 1)
        extra = torch.zeros(heads, rows, dtype=torch.int32)
        for row, request_id in enumerate(self._rows):
            if dealt := self._dealt.get(request_id):
                counts = torch.tensor([[len(own)] for own in dealt.pages])
                fewer = dealt.mean - counts
                pages = torch.cat(dealt.pages).int()
                own_pages[:, row][column[:, row] < counts] = pages
                column[:, row] += fewer
                extra[:, row] = -fewer[:, 0] * block_size
        self._extra_cpu = extra
        self._own, self._column, self._extra = (
            tensor.to(self._device, non_blocking=True)
            for tensor in (own_pages, column.clamp_(0, width - 1), extra)
        )
