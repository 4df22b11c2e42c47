"""Attention of new tokens over pages with factors: the meaning is ops/attend_pages.py.

A row's tokens are dealt out in splits, so that few rows keep a GPU busy, too. How many
there are follows from shapes alone: the lengths stay on the GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.pages import Elements

from .launch import parameters
from .pages import PRECISION, capped, dot_type, fitted, offsets, power_of_2, steps, tile

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _dot(weights, values, DOT: tl.constexpr):
    """Of float32 weights, what a narrow type loses goes in a second product."""
    if tl.float32 == DOT:
        found = tl.dot(weights, values, input_precision=PRECISION)
    else:
        high = weights.to(DOT)
        found = tl.dot(high, values)
        found += tl.dot((weights - high.to(tl.float32)).to(DOT), values)
    return found


@triton.jit
def _attend_pages_kernel(
    query_ptr,
    cache_ptr,
    blocks_ptr,
    starts_ptr,
    lens_ptr,
    scales_ptr,
    most_ptr,
    sums_ptr,
    found_ptr,
    query_steps,
    key_steps,
    value_steps,
    scale_steps,
    block_size,
    group,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One split of a row's tokens, for the query heads of one KV head."""
    split, head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + row).to(tl.int32)
    blocks_ptr += tl.load(starts_ptr + row)
    member = tl.arange(0, BLOCK_GROUP)
    inside = member < group
    query_head = head * group + member
    place = row * query_steps[0] + query_head * query_steps[1]
    query = tile(query_ptr, place, inside, query_steps[2], HEAD_SIZE, BLOCK_HEAD, DOT)
    most = tl.full([BLOCK_GROUP], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_GROUP], tl.float32)
    found = tl.zeros([BLOCK_GROUP, BLOCK_HEAD], tl.float32)
    splits = tl.num_programs(0)
    span = tl.cdiv(tl.cdiv(length, BLOCK_TOKENS), splits) * BLOCK_TOKENS
    end = tl.minimum(split * span + span, length)
    for first in range(split * span, end, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        held = token < end
        at = offsets(blocks_ptr, token, held, head, block_size, key_steps)
        keys = tile(cache_ptr, at, held, key_steps[3], HEAD_SIZE, BLOCK_HEAD, DOT)
        at = offsets(blocks_ptr, token, held, head, block_size, value_steps)
        values = tile(cache_ptr, at, held, value_steps[3], HEAD_SIZE, BLOCK_HEAD, DOT)
        factors = scales_ptr + offsets(
            blocks_ptr, token, held, head, block_size, scale_steps
        )
        key_scale = tl.load(factors, mask=held, other=0.0).to(tl.float32)
        value_scale = tl.load(factors + scale_steps[5], mask=held, other=0.0)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        logits = capped(logits * key_scale[None, :], scale, softcap, CAPPED)
        logits = tl.where(held[None, :], logits, float("-inf"))
        high = tl.maximum(most, tl.max(logits, 1))
        weights = tl.exp(logits - high[:, None])
        fade = tl.exp(most - high)
        sums = sums * fade + tl.sum(weights, 1)
        weights *= value_scale.to(tl.float32)[None, :]
        found = found * fade[:, None] + _dot(weights, values, DOT)
        most = high
    query_heads = tl.num_programs(1) * group
    index = (row * splits + split) * query_heads + query_head
    tl.store(most_ptr + index, most, mask=inside)
    tl.store(sums_ptr + index, sums, mask=inside)
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    mask = inside[:, None] & (column < HEAD_SIZE)
    tl.store(found_ptr + index[:, None] * HEAD_SIZE + column, found, mask=mask)


@triton.jit
def _combine_kernel(
    most_ptr,
    sums_ptr,
    found_ptr,
    lens_ptr,
    out_ptr,
    splits,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """All splits of one query head as one."""
    query_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_heads = tl.num_programs(0)
    split = tl.arange(0, BLOCK_SPLITS)
    at = (row * splits + split) * query_heads + query_head
    inside = split < splits
    most = tl.load(most_ptr + at, mask=inside, other=_LOWEST)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    shares = tl.exp(most - tl.max(most, 0))
    found = tile(
        found_ptr, at * HEAD_SIZE, inside, 1, HEAD_SIZE, BLOCK_HEAD, tl.float32
    )
    found = tl.sum(found * shares[:, None], 0)
    total = tl.sum(sums * shares, 0)
    # A row without tokens has found nothing.
    total = tl.where(tl.load(lens_ptr + row) > 0, total, 1.0)
    column = tl.arange(0, BLOCK_HEAD)
    out = out_ptr + (row * query_heads + query_head) * HEAD_SIZE + column
    tl.store(out, found / total, mask=column < HEAD_SIZE)


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
    """See `attend_pages.attend_pages`."""
    (rows, query_heads, head_size), kv_heads = query.shape, cache.shape[1]
    device, block_size = query.device, cache.shape[2]
    group = query_heads // kv_heads
    launch = dict(parameters("attend_pages", device))
    dot, block_head = dot_type(query, cache), max(16, power_of_2(head_size))
    launch["BLOCK_TOKENS"] = fitted(launch["BLOCK_TOKENS"], block_head, dot)
    longest = triton.cdiv(len(blocks) * block_size, launch["BLOCK_TOKENS"])
    wanted = launch.pop("PROGRAMS") // max(1, rows * kv_heads)
    splits = max(1, min(longest, wanted, launch.pop("MAX_SPLITS")))
    out = torch.empty(rows, query_heads, head_size, device=device)
    if not rows:
        return out
    most, sums = torch.empty(2, rows, splits, query_heads, device=device)
    found = torch.empty(rows, splits, query_heads, head_size, device=device)
    half, block, slot, head = scales.stride()
    _attend_pages_kernel[splits, kv_heads, rows](
        *(query, cache, blocks.contiguous(), starts.contiguous(), lens.contiguous()),
        *(scales, most, sums, found),
        *(query.stride(), *(steps(half, cache) for half in halves)),
        *((block, head, slot, 1, 0, half), block_size, group),
        *(float(scale), float(softcap)),
        CAPPED=bool(softcap),
        HEAD_SIZE=head_size,
        BLOCK_HEAD=block_head,
        BLOCK_GROUP=max(16, power_of_2(group)),
        DOT=dot,
        **launch,
    )
    _combine_kernel[query_heads, rows](
        *(most, sums, found, lens.contiguous(), out, splits),
        HEAD_SIZE=head_size,
        BLOCK_HEAD=block_head,
        BLOCK_SPLITS=power_of_2(splits),
    )
    return out
