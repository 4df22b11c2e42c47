"""Positions of the highest scores: the meaning is ops/select.py.

Scores become integers of the same order, whose lowest kept one is found eight bits at a
time, from a histogram of each digit. One program has a row of its own.
"""

import torch
import triton
import triton.language as tl

from .launch import parameters


@triton.jit
def _rank(scores_ptr, token, step, inside):
    """Integers in the order of scores: -0 equals 0, and NaN is the highest."""
    score = tl.load(scores_ptr + token * step, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    sign = tl.full(bits.shape, 1 << 31, tl.uint32)
    rank = tl.where(bits >= sign, ~bits, bits | sign)
    return tl.where(score == score, rank, 0xFFFFFFFF).to(tl.uint32)


@triton.jit(do_not_specialize=["tokens", "count"])
def _select_kernel(
    scores_ptr, kept_ptr, row_step, step, tokens, count, BLOCK_TOKENS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * row_step
    kept_ptr += row * count
    least = tl.full([1], 0, tl.uint32)  # the digits known
    needed = count  # of those that begin with them
    digit = tl.arange(0, 256)
    for place in tl.static_range(24, -1, -8):
        found = tl.zeros([256], tl.int32)
        for first in range(0, tokens, BLOCK_TOKENS):
            token = first + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
            inside = token < tokens
            rank = _rank(scores_ptr, token, step, inside)
            if place < 24:
                inside &= rank >> (place + 8) == least
            own = (rank >> place & 255).to(tl.int32)
            found += tl.histogram(own, 256, mask=inside)
        high = tl.cumsum(found, 0, reverse=True)
        last = tl.max(tl.where(high >= needed, digit, 0), 0)
        needed -= tl.sum(tl.where(digit > last, found, 0), 0)
        least = least << 8 | last.to(tl.uint32)
    written, equals = 0, 0
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        inside = token < tokens
        rank = _rank(scores_ptr, token, step, inside)
        equal = inside & (rank == least)
        order = equals + tl.cumsum(equal.to(tl.int32), 0)
        taken = (inside & (rank > least)) | (equal & (order <= needed))
        at = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(kept_ptr + at, token, mask=taken)
        written += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)


def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """See `select.select`."""
    scores = scores.float()
    rows, tokens = scores.shape
    kept = torch.empty(rows, count, dtype=torch.long, device=scores.device)
    if kept.numel():
        launch = parameters("select", scores.device)
        _select_kernel[rows,](scores, kept, *scores.stride(), tokens, count, **launch)
    return kept
