"""Attention mass of the observation window: the meaning is ops/window_scores.py.

Keys are read twice, and no logits are written: once for each row's largest logit and
sum of exponentials, once for the votes. A row is a query head of the group with one of
the window's queries.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.pages import PagedKeys

from .launch import parameters
from .pages import PRECISION, capped, dot_type, fitted, offsets, power_of_2, steps, tile

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _queries(
    queries_ptr,
    query_steps,
    head,
    row,
    window,
    group,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    DOT: tl.constexpr,
):
    """Queries ``[rows, BLOCK_HEAD]``."""
    place = (row % window) * query_steps[0]
    place += (head * group + row // window) * query_steps[1]
    inside = row < window * group
    return tile(queries_ptr, place, inside, query_steps[2], HEAD_SIZE, BLOCK_HEAD, DOT)


@triton.jit
def _logits(queries, keys, row, token, strict_ptr, tokens, window, group, cap):
    """Logits ``[rows, tokens]``, -inf where a row does not see a token."""
    products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    seen = tokens - window + 1 + row % window
    if strict_ptr is not None:
        inside = row < window * group
        seen -= tl.load(strict_ptr + row // window, mask=inside, other=0)
    logits = capped(products, cap[0], cap[1], cap[2])
    return tl.where(token[None, :] < seen[:, None], logits, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "span"])
def _sums_kernel(
    queries_ptr,
    cache_ptr,
    blocks_ptr,
    strict_ptr,
    most_ptr,
    sums_ptr,
    query_steps,
    cache_steps,
    blocks_step,
    block_size,
    tokens,
    span,
    window,
    group,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of one span of tokens, each row's largest logit and sum of exponentials."""
    split, head = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    queries = _queries(
        queries_ptr, query_steps, head, row, window, group, HEAD_SIZE, BLOCK_HEAD, DOT
    )
    most = tl.full([BLOCK_ROWS], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    end = tl.minimum(split * span + span, tokens)
    for first in range(split * span, end, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        inside = token < end
        place = offsets(
            blocks_ptr + head * blocks_step,
            token,
            inside,
            head,
            block_size,
            cache_steps,
        )
        keys = tile(
            cache_ptr, place, inside, cache_steps[3], HEAD_SIZE, BLOCK_HEAD, DOT
        )
        cap = (scale, softcap, CAPPED)
        logits = _logits(
            queries, keys, row, token, strict_ptr, tokens, window, group, cap
        )
        high = tl.maximum(most, tl.max(logits, 1))
        sums *= tl.exp(most - high)
        sums += tl.sum(tl.exp(logits - high[:, None]), 1)
        most = high
    rows = window * group
    at = (head * tl.num_programs(1) + split) * rows + row
    tl.store(most_ptr + at, most, mask=row < rows)
    tl.store(sums_ptr + at, sums, mask=row < rows)


@triton.jit
def _shares_kernel(
    most_ptr,
    sums_ptr,
    weights_ptr,
    tops_ptr,
    shares_ptr,
    splits,
    window,
    group,
    BLIND: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each row's largest logit, and what one of its exponentials counts for."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split, rows = tl.arange(0, BLOCK_SPLITS), window * group
    inside = (split < splits)[:, None] & (row < rows)[None, :]
    at = (head * splits + split)[:, None] * rows + row[None, :]
    most = tl.load(most_ptr + at, mask=inside, other=_LOWEST)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
    top = tl.max(most, 0)
    total = tl.sum(sums * tl.exp(most - top[None, :]), 0)
    some = row < rows
    if BLIND:  # a first token may see nothing
        some &= total > 0
    share = tl.where(some, 1.0 / (tl.where(some, total, 1.0) * group), 0.0)
    if weights_ptr is not None:
        share *= tl.load(weights_ptr + row % window, mask=row < rows, other=0.0)
    tl.store(tops_ptr + head * rows + row, top, mask=row < rows)
    tl.store(shares_ptr + head * rows + row, share, mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def _votes_kernel(
    queries_ptr,
    cache_ptr,
    blocks_ptr,
    strict_ptr,
    tops_ptr,
    shares_ptr,
    scores_ptr,
    query_steps,
    cache_steps,
    blocks_step,
    block_size,
    tokens,
    window,
    group,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DOT: tl.constexpr,
):
    """All rows' votes for one tile of tokens."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = token < tokens
    place = offsets(
        blocks_ptr + head * blocks_step, token, inside, head, block_size, cache_steps
    )
    keys = tile(cache_ptr, place, inside, cache_steps[3], HEAD_SIZE, BLOCK_HEAD, DOT)
    votes = tl.zeros([BLOCK_TOKENS], tl.float32)
    rows = window * group
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        queries = _queries(
            queries_ptr,
            query_steps,
            head,
            row,
            window,
            group,
            HEAD_SIZE,
            BLOCK_HEAD,
            DOT,
        )
        cap = (scale, softcap, CAPPED)
        logits = _logits(
            queries, keys, row, token, strict_ptr, tokens, window, group, cap
        )
        at = head * rows + row
        top = tl.load(tops_ptr + at, mask=row < rows, other=0.0)
        share = tl.load(shares_ptr + at, mask=row < rows, other=0.0)
        votes += tl.sum(tl.exp(logits - top[:, None]) * share[:, None], 0)
    at = tl.cast(head, tl.int64) * tokens + token
    tl.store(scores_ptr + at, votes, mask=inside)


@functools.lru_cache(maxsize=64)
def _strict(past_only: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """Kept on the device, so that no call waits for a copy."""
    return torch.tensor(past_only, dtype=torch.int32, device=device)


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor | PagedKeys,
    *,
    scale: float,
    softcap: float = 0.0,
    weights: torch.Tensor | None = None,
    past_only: Sequence[bool] = (),
) -> torch.Tensor:
    """See `window_scores.window_scores`."""
    window, query_heads, head_size = queries.shape
    kv_heads, tokens, _ = keys.shape
    group, device = query_heads // kv_heads, queries.device
    if isinstance(keys, PagedKeys):
        cache, blocks = keys.cache, keys.blocks
        block_size, cache_steps = cache.shape[2], steps(keys.elements, cache)
    else:  # each head's keys are one page
        cache, block_size = keys, tokens
        head, slot, element = keys.stride()
        cache_steps = (0, head, slot, element, 0)
        blocks = torch.zeros(1, 1, dtype=torch.long, device=device).expand(kv_heads, 1)
    if blocks.stride(1) != 1:
        blocks = blocks.contiguous()
    launch = dict(parameters("window_scores", device))
    dot, block_head = dot_type(queries, cache), max(16, power_of_2(head_size))
    for name in ("BLOCK_ROWS", "BLOCK_TOKENS"):
        launch[name] = fitted(launch[name], block_head, dot)
    rows, most_splits = window * group, launch.pop("MAX_SPLITS")
    parts = triton.cdiv(rows, launch["BLOCK_ROWS"])
    least = max(launch.pop("SPLIT_TOKENS"), triton.cdiv(tokens, most_splits))
    span = triton.cdiv(least, launch["BLOCK_TOKENS"]) * launch["BLOCK_TOKENS"]
    splits = triton.cdiv(tokens, span)
    most, sums = torch.empty(2, kv_heads, splits, rows, device=device)
    tops, shares = torch.empty(2, kv_heads, rows, device=device)
    scores = torch.empty(kv_heads, tokens, device=device)
    strict = _strict(tuple(past_only), device) if past_only else None
    read = (queries, cache, blocks, strict)
    order = (queries.stride(), cache_steps, blocks.stride(0), block_size, tokens)
    fixed = {
        "CAPPED": bool(softcap),
        "HEAD_SIZE": head_size,
        "BLOCK_HEAD": block_head,
        "DOT": dot,
        **launch,
    }
    cap = (float(scale), float(softcap))
    _sums_kernel[parts, splits, kv_heads](
        *read, most, sums, *order, span, window, group, *cap, **fixed
    )
    _shares_kernel[parts, kv_heads](
        *(most, sums, None if weights is None else weights.float().contiguous()),
        *(tops, shares, splits, window, group),
        BLIND=strict is not None,
        BLOCK_SPLITS=power_of_2(splits),
        BLOCK_ROWS=launch["BLOCK_ROWS"],
    )
    _votes_kernel[triton.cdiv(tokens, launch["BLOCK_TOKENS"]), kv_heads](
        *read, tops, shares, scores, *order, window, group, *cap, **fixed
    )
    return scores
