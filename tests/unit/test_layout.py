"""Tokens in pages, against the order in which vLLM's own writer put them there."""

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_kvcompress.engine.layout import PageLayout, _cpu_pages, _rows

BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_SIZE = 5, 2, 32, 64
CASES = [
    ("vec", torch.float32),
    ("vec", torch.bfloat16),
    ("vec16", torch.bfloat16),
    ("amx", torch.bfloat16),
    ("vec", torch.uint8),
    ("amx", torch.uint8),
    ("gpu", torch.bfloat16),
    ("gpu, heads innermost", torch.float32),
]


def _cache(
    kind: str, dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, PageLayout]:
    """Store tokens ``[slots, kv_heads, head_size]`` as vLLM stores them."""
    shape = (BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    if kind.startswith("gpu"):
        cache = torch.zeros(shape, dtype=dtype)
        if kind != "gpu":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        rows = torch.cat([keys, values], dim=-1).unflatten(0, (BLOCKS, BLOCK_SIZE))
        cache.copy_(rows.transpose(1, 2))
        return cache, _rows(BLOCK_SIZE, HEAD_SIZE)
    cache = torch.zeros(shape, dtype=dtype)
    halves = cache.view(BLOCKS, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
    name = "auto"
    if dtype == torch.uint8:  # vLLM's bytes of 8-bit floats
        name = "fp8"
        keys, values = (x.view(torch.float8_e4m3fn).bfloat16() for x in (keys, values))
    ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, torch.arange(len(keys)), kind, kv_cache_dtype=name
    )
    return cache, _cpu_pages(kind, dtype, BLOCK_SIZE, HEAD_SIZE)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_tokens_are_found_and_moved(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(BLOCKS * BLOCK_SIZE, KV_HEADS, HEAD_SIZE, generator=generator)
        for _ in range(2)
    )
    if dtype == torch.uint8:  # vLLM drops the sign of zero
        floats = (x.to(torch.float8_e4m3fn).float() + 0.0 for x in (keys, values))
        keys, values = (x.to(torch.float8_e4m3fn).view(dtype) for x in floats)
    keys, values = keys.to(dtype), values.to(dtype)
    cache, layout = _cache(kind, dtype, keys, values)
    source, target = torch.tensor([3, 0, 4]), torch.tensor([2, 1])
    kept = torch.stack(
        [
            torch.randperm(len(source) * BLOCK_SIZE, generator=generator)[
                : len(target) * BLOCK_SIZE
            ].sort()[0]
            for _ in range(KV_HEADS)
        ]
    )
    untouched = cache[source].clone()
    for half, tokens in ((layout.keys, keys), (layout.values, values)):
        prompt = tokens.unflatten(0, (BLOCKS, BLOCK_SIZE))[source].flatten(0, 1)
        by_head = prompt.transpose(0, 1)
        assert half.take(cache, source).equal(by_head)
        expected = torch.stack([by_head[h, kept[h]] for h in range(KV_HEADS)])
        assert half.gather(cache, source, kept).equal(expected)
        half.write(cache, target, expected)
        assert half.take(cache, target).equal(expected)
    assert cache[source].equal(untouched)
