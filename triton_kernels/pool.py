"""Smoothing of scores along the tokens: the meaning is ops/pool.py."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.pool import Pooling

from .launch import parameters


@triton.jit(do_not_specialize=["tokens"])
def _pool_kernel(
    scores_ptr,
    pooled_ptr,
    row_step,
    step,
    tokens,
    kernel_size,
    MAX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    beyond = float("-inf") if MAX else 0.0
    pooled = tl.full([BLOCK_TOKENS], beyond, tl.float32)
    for shift in range(kernel_size):
        near = token + shift - kernel_size // 2
        score = tl.load(
            scores_ptr + row * row_step + near * step,
            mask=(near >= 0) & (near < tokens),
            other=beyond,
        ).to(tl.float32)
        if MAX:  # NaN is larger than all, as torch has it
            pooled = tl.where((score > pooled) | (score != score), score, pooled)
        else:
            pooled += score
    if not MAX:
        pooled /= kernel_size
    tl.store(pooled_ptr + row * tokens + token, pooled, mask=token < tokens)


def pool(scores: torch.Tensor, *, kernel_size: int, pooling: Pooling) -> torch.Tensor:
    """See `pool.pool`."""
    rows, tokens = scores.shape
    pooled = torch.empty(rows, tokens, dtype=scores.dtype, device=scores.device)
    if pooled.numel():
        launch = parameters("pool", scores.device)
        _pool_kernel[triton.cdiv(tokens, launch["BLOCK_TOKENS"]), rows](
            *(scores, pooled, *scores.stride(), tokens, kernel_size),
            MAX=pooling == "max",
            **launch,
        )
    return pooled
