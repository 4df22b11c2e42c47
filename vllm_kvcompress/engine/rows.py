"""A compressed request's row of the block table, as kernels read it.

The worker writes the private blocks at logical entries ``[E - K, E)``, which no
slot mapping uses any more. What kernels read is then the logical row without its
first ``E - K`` entries, and a length shorter by as many blocks: one integer per
request. Buffers persist, since full CUDA graphs capture their addresses.
"""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..ops.row_shift import shift_rows


class RowShift:
    """Tokens by which the rows of one KV cache group are shifted."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._max_num_reqs = max_num_reqs
        self._device = device
        self._shift_of: dict[str, int] = {}
        self._rows: Sequence[str] = ()
        self._aimed: tuple[list[int], int] | None = None
        self._table: torch.Tensor | None = None

    def of_rows(self, rows: Sequence[int]) -> Self:
        """The same for some rows of the coming batch, with buffers of its own."""
        part = copy.copy(self)
        part._rows = [self._rows[row] for row in rows if row < len(self._rows)]
        part._aimed = part._table = None
        return part

    def set(self, request_id: str, tokens: int) -> None:
        """Shift a request's row by ``tokens``, a multiple of the block size."""
        self._shift_of[request_id] = tokens

    def forget(self, request_id: str) -> None:
        """The request is gone or starts anew."""
        self._shift_of.pop(request_id, None)

    def begin(self, request_ids: Sequence[str]) -> None:
        """Name the rows of the coming batch; () for a dummy batch."""
        self._rows = request_ids

    def _aim(self, rows: int) -> bool:
        """Bring ``_tokens`` up to date with the batch's rows.

        Returns:
            Whether any row is shifted.
        """
        shifts = [self._shift_of.get(request_id, 0) for request_id in self._rows]
        aim = (shifts, rows)
        if aim != self._aimed:  # rows change far less often than steps are run
            self._aimed = aim
            self._tokens_cpu = torch.zeros(rows, dtype=torch.int32)
            self._tokens_cpu[: len(shifts)] = torch.tensor(shifts, dtype=torch.int32)
            self._tokens = self._tokens_cpu.to(self._device)
        return any(shifts)

    def new_lens(self) -> torch.Tensor:
        """A buffer of lengths: each kind of layer sees its own, see `physical`."""
        return torch.zeros(self._max_num_reqs, dtype=torch.int32, device=self._device)

    def physical(
        self, common: CommonAttentionMetadata, block_size: int, lens: torch.Tensor
    ) -> CommonAttentionMetadata:
        """The metadata with every row shifted and every length reduced.

        Args:
            common: vLLM's metadata of one group, logical.
            block_size: Tokens of the blocks that ``block_table_tensor`` counts.
            lens: From `new_lens`; the result refers to it.
        """
        if not self._shift_of and self._device.type == "cpu":
            return common  # no graph has captured an address here
        table = common.block_table_tensor
        rows, width = table.shape
        shifted = self._aim(rows)
        if self._table is None:
            self._table = torch.zeros(
                self._max_num_reqs, width, dtype=table.dtype, device=self._device
            )
        lens_bound = common.seq_lens_cpu_upper_bound
        longest = common.max_seq_len
        if shifted and lens_bound is not None:
            lens_bound = lens_bound - self._tokens_cpu
            longest = int(lens_bound.max())
        table_out, lens_out = self._table[:rows, :width], lens[:rows]
        shift_rows(
            table,
            common.seq_lens,
            self._tokens,
            block_size,
            table_out=table_out,
            lens_out=lens_out,
        )
        return common.replace(
            block_table_tensor=table_out,
            seq_lens=lens_out,
            seq_lens_cpu_upper_bound=lens_bound,
            max_seq_len=longest,
            _num_computed_tokens_cache=None,
        )
