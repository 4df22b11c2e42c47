"""Rows of a block table without empty entries: the meaning is ops/row_shift.py.

One launch that waits for nothing and allocates nothing, so a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl

from .launch import parameters


@triton.jit
def _shift_rows_kernel(
    table_ptr,
    lens_ptr,
    tokens_ptr,
    table_out_ptr,
    lens_out_ptr,
    table_steps,
    out_steps,
    line_steps,
    width,
    block_size,
    BLOCK_COLUMNS: tl.constexpr,
):
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = part * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    tokens = tl.load(tokens_ptr + row * line_steps[1])
    if part == 0:
        length = tl.load(lens_ptr + row * line_steps[0])
        tl.store(lens_out_ptr + row * line_steps[2], length - tokens)
    source = tl.minimum(column + tokens // block_size, width - 1)
    inside = column < width
    old = table_ptr + row * table_steps[0] + source * table_steps[1]
    new = table_out_ptr + row * out_steps[0] + column * out_steps[1]
    tl.store(new, tl.load(old, mask=inside, other=0), mask=inside)


def shift_rows(
    table: torch.Tensor,
    lens: torch.Tensor,
    tokens: torch.Tensor,
    block_size: int,
    *,
    table_out: torch.Tensor,
    lens_out: torch.Tensor,
) -> None:
    """See `row_shift.shift_rows`."""
    rows, width = table.shape
    if not rows:
        return
    launch = parameters("shift_rows", table.device)
    _shift_rows_kernel[max(1, triton.cdiv(width, launch["BLOCK_COLUMNS"])), rows](
        *(table, lens, tokens, table_out, lens_out),
        *(table.stride(), table_out.stride()),
        (lens.stride(0), tokens.stride(0), lens_out.stride(0)),
        *(width, block_size),
        **launch,
    )
