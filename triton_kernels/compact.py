"""Kept tokens into pages of their own: the meaning is ops/compact.py.

They go by way of a buffer, all read before any is written. Without it source and target
must have no block in common, and to know that a GPU would have to be waited for; what
is kept is a small part of a prompt, so the detour is short.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.pages import Elements

from .launch import parameters
from .pages import offsets, power_of_2, steps

# Elements are moved as integers, which keep every bit.
_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def _move(
    cache_ptr,
    held_ptr,
    place,
    index,
    inside,
    element_step,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Copy tokens from the cache to the buffer, or back."""
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    mask = inside[:, None] & (column < HEAD_SIZE)
    paged = cache_ptr + place[:, None] + column * element_step
    held = held_ptr + index[:, None] * HEAD_SIZE + column
    if WRITE:
        tl.store(paged, tl.load(held, mask=mask, other=0), mask=mask)
    else:
        tl.store(held, tl.load(paged, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _compact_kernel(
    cache_ptr,
    held_ptr,
    blocks_ptr,
    kept_ptr,
    key_steps,
    value_steps,
    block_size,
    tokens,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    inside = index < tokens
    token = index
    if not WRITE:
        token = tl.load(kept_ptr + head * tokens + index, mask=inside, other=0)
    index += head * tokens
    place = offsets(blocks_ptr, token, inside, head, block_size, key_steps)
    _move(
        cache_ptr,
        held_ptr,
        place,
        index,
        inside,
        key_steps[3],
        HEAD_SIZE,
        BLOCK_HEAD,
        WRITE,
    )
    index += tl.num_programs(1) * tokens
    place = offsets(blocks_ptr, token, inside, head, block_size, value_steps)
    _move(
        cache_ptr,
        held_ptr,
        place,
        index,
        inside,
        value_steps[3],
        HEAD_SIZE,
        BLOCK_HEAD,
        WRITE,
    )


def compact(
    cache: torch.Tensor,
    halves: Sequence[Elements],
    source: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """See `compact.compact`."""
    if not kept.numel():
        return
    (kv_heads, tokens), head_size = kept.shape, halves[0].head_size
    bits = cache.view(_TYPES[cache.element_size()])
    held = torch.empty(
        2, kv_heads, tokens, head_size, dtype=bits.dtype, device=cache.device
    )
    key_steps, value_steps = (steps(half, cache) for half in halves)
    kept = kept.contiguous()
    launch = parameters("compact", cache.device)
    for blocks, write in ((source, False), (target, True)):
        _compact_kernel[triton.cdiv(tokens, launch["BLOCK_TOKENS"]), kv_heads](
            *(bits, held, blocks.contiguous(), kept, key_steps, value_steps),
            *(cache.shape[2], tokens),
            HEAD_SIZE=head_size,
            BLOCK_HEAD=power_of_2(head_size),
            WRITE=write,
            **launch,
        )
