"""A compressed request's row of the block table, as kernels read it.

The worker writes the private blocks at logical entries ``[E - K, E)``, which no
slot mapping uses any more. What kernels read is then the logical row without its
first ``E - K`` entries, and a length shorter by as many blocks: one integer per
request. Buffers persist, since full CUDA graphs capture their addresses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


class RowShift:
    """Tokens by which the rows of one KV cache group are shifted."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._max_num_reqs = max_num_reqs
        self._device = device
        self._shift_of: dict[str, int] = {}
        self._rows: Sequence[str] = ()
        self._table: torch.Tensor | None = None
        self._lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)

    def set(self, request_id: str, tokens: int) -> None:
        """Shift a request's row by ``tokens``, a multiple of the block size."""
        self._shift_of[request_id] = tokens

    def get(self, request_id: str) -> int:
        """Tokens by which a request's row is shifted."""
        return self._shift_of.get(request_id, 0)

    def forget(self, request_id: str) -> None:
        """The request is gone or starts anew."""
        self._shift_of.pop(request_id, None)

    def begin(self, request_ids: Sequence[str]) -> None:
        """Name the rows of the coming batch; () for a dummy batch."""
        self._rows = request_ids

    def _shifts(self, num_rows: int) -> np.ndarray:
        shifts = np.zeros(num_rows, dtype=np.int32)
        if self._shift_of:
            for row, request_id in enumerate(self._rows):
                shifts[row] = self._shift_of.get(request_id, 0)
        return shifts

    def physical(
        self, common: CommonAttentionMetadata, block_size: int
    ) -> CommonAttentionMetadata:
        """The metadata with every row shifted and every length reduced.

        Args:
            common: vLLM's metadata of one group, logical.
            block_size: Tokens of the blocks that ``block_table_tensor`` counts.
        """
        table = common.block_table_tensor
        rows, width = table.shape
        shifts = self._shifts(rows)
        if self._device.type == "cpu" and not shifts.any():
            return common  # no graph has captured an address here
        if self._table is None:
            self._table = torch.zeros(
                self._max_num_reqs, width, dtype=table.dtype, device=self._device
            )
        on_cpu = torch.from_numpy(shifts)
        tokens = on_cpu.to(self._device, non_blocking=True)
        column = torch.arange(width, device=self._device)
        source = (column + (tokens // block_size)[:, None]).clamp_(max=width - 1)
        lens_bound = common.seq_lens_cpu_upper_bound
        longest = common.max_seq_len
        if lens_bound is not None:
            lens_bound = lens_bound - on_cpu
            if shifts.any():
                longest = int(lens_bound.max())
        return common.replace(
            block_table_tensor=torch.gather(
                table, 1, source, out=self._table[:rows, :width]
            ),
            seq_lens=torch.sub(common.seq_lens, tokens, out=self._lens[:rows]),
            seq_lens_cpu_upper_bound=lens_bound,
            max_seq_len=longest,
            _num_computed_tokens_cache=None,
        )
