"""Rows of a block table without the entries that compression has left empty."""

import torch

from .providers import Operation


@Operation
def shift_rows(
    table: torch.Tensor,
    lens: torch.Tensor,
    tokens: torch.Tensor,
    block_size: int,
    *,
    table_out: torch.Tensor,
    lens_out: torch.Tensor,
) -> None:
    """Move every row to the left by its own number of blocks, and shorten it.

    What was a row's last entry fills its end.

    Args:
        table: ``[rows, width]`` int32, blocks of each row.
        lens: ``[rows]`` int32, tokens of each row.
        tokens: ``[rows]`` int32, by how many each is shifted; whole blocks.
        block_size: Tokens of a block.
        table_out: Of the table's shape and type, which is filled.
        lens_out: Of the lengths' shape and type, which is filled.
    """
    width = table.shape[1]
    column = torch.arange(width, device=table.device)
    source = (column + (tokens // block_size)[:, None]).clamp_(max=width - 1)
    torch.gather(table, 1, source, out=table_out)
    torch.sub(lens, tokens, out=lens_out)
