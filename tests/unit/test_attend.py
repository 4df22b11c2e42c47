"""Attention over tokens with factors, against a loop and torch's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from vllm_kvcompress.ops.attend import attend

Tensor = torch.Tensor


def _inputs(
    new: int, kv_heads: int, group: int, tokens: int, seed: int
) -> list[Tensor]:
    """Queries, keys, values and both factors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(new, kv_heads * group, 8), *[(kv_heads, tokens, 8)] * 2]
    found = [torch.randn(*shape, generator=generator) for shape in shapes]
    factors = torch.rand(2, kv_heads, tokens, generator=generator) + 0.5
    return [*found, *factors]


def _loop(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    out = torch.zeros_like(query)
    new, heads, _ = query.shape
    kv_heads, tokens, _ = keys.shape
    for row in range(new):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            logits = []
            for token in range(tokens - new + row + 1):
                key = (keys[kv, token] * key_scale[kv, token]).double()
                logit = float(query[row, head].double() @ key) * scale
                if softcap:
                    logit = softcap * math.tanh(logit / softcap)
                logits.append(logit)
            weights = torch.tensor(logits).softmax(0)
            for token, weight in enumerate(weights):
                out[row, head] += weight * values[kv, token] * value_scale[kv, token]
    return out


@settings(deadline=None, max_examples=40)
@given(
    new=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 4]),
    past=st.integers(0, 12),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop(
    new: int, kv_heads: int, group: int, past: int, softcap: float, seed: int
) -> None:
    inputs = _inputs(new, kv_heads, group, past + new, seed)
    found = attend(*inputs, scale=0.4, softcap=softcap)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _loop(*inputs, scale=0.4, softcap=softcap))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_factors_it_is_plain_attention(
    group: int, new: int, dtype: torch.dtype
) -> None:
    query, keys, values, *_ = (x.to(dtype) for x in _inputs(new, 2, group, 33, seed=0))
    ones = torch.ones(2, 33)
    found = attend(query, keys, values, ones, ones, scale=0.3)
    mask = torch.ones(new, 33, dtype=torch.bool).tril(33 - new)
    wanted = scaled_dot_product_attention(
        query.transpose(0, 1).float(),
        keys.repeat_interleave(group, 0).float(),
        values.repeat_interleave(group, 0).float(),
        attn_mask=mask,
        scale=0.3,
    )
    torch.testing.assert_close(found, wanted.transpose(0, 1))
