"""Each operation against a definition with loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import snapkv_scores
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.ops.pool import pool
from vllm_kvcompress.ops.select import select
from vllm_kvcompress.ops.window_scores import window_scores


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from([1, 4]),
    window=st.integers(1, 9),
    past=st.integers(1, 40),
    pooling=st.sampled_from(["max", "avg"]),
    kernel_size=st.sampled_from([1, 3, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_snapkv_equals_the_loops(
    group: int,
    window: int,
    past: int,
    pooling: str,
    kernel_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tokens, head_size = past + window, 8
    queries = _random(window, 2 * group, head_size, seed=seed, dtype=dtype)
    keys = _random(2, tokens, head_size, seed=seed + 1, dtype=dtype)
    scale = head_size**-0.5
    scorer = SnapKV(window=window, pooling=pooling, kernel_size=kernel_size)
    scores = scorer.score(queries, keys, None, Layer(0, scale))
    assert scores.dtype == torch.float32
    assert torch.isinf(scores[:, past:]).all()
    padded = torch.cat([queries.new_zeros(past, *queries.shape[1:]), queries])
    expected = snapkv_scores(
        padded,
        keys,
        window=window,
        kernel_size=kernel_size,
        pooling=pooling,
        scale=scale,
    )
    torch.testing.assert_close(scores[:, :past], torch.tensor(expected).view(2, past))


def test_window_scores_add_up_to_the_window() -> None:
    """Every query gives away exactly one unit of attention."""
    scores = window_scores(
        _random(5, 4, 8, seed=0), _random(2, 33, 8, seed=1), scale=0.3
    )
    torch.testing.assert_close(scores.sum(1), torch.full((2,), 5.0))


def test_window_is_causal() -> None:
    queries, keys = _random(3, 1, 8, seed=0), _random(1, 10, 8, seed=1)
    before = window_scores(queries[:2], keys[:, :9], scale=1.0)
    last = (queries[2, 0] @ keys[0].T).softmax(0)
    after = window_scores(queries, keys, scale=1.0)
    torch.testing.assert_close(after[0, :9], before[0] + last[:9])


def test_softcap_is_the_models() -> None:
    queries, keys = _random(2, 1, 8, seed=2), 9 * _random(1, 6, 8, seed=3)
    logits = 5 * torch.tanh(queries[1, 0] @ keys[0].T / 5)
    first = 5 * torch.tanh(queries[0, 0] @ keys[0, :5].T / 5)
    expected = logits.softmax(0)
    expected[:5] += first.softmax(0)
    scores = window_scores(queries, keys, scale=1.0, softcap=5.0)
    torch.testing.assert_close(scores[0], expected)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 31])
def test_pool_edges(kernel_size: int) -> None:
    scores = _random(1, 12, seed=5).abs()
    half = kernel_size // 2
    row = scores[0].tolist()
    near = [row[max(0, i - half) : i + half + 1] for i in range(12)]
    found = pool(scores, kernel_size=kernel_size, pooling="max")[0]
    torch.testing.assert_close(found, torch.tensor([max(n) for n in near]))
    found = pool(scores, kernel_size=kernel_size, pooling="avg")[0]
    expected = torch.tensor([math.fsum(n) / kernel_size for n in near])
    torch.testing.assert_close(found, expected)


@given(st.data())
def test_select(data: st.DataObject) -> None:
    values = st.sampled_from([0.0, 0.5, 1.0, math.inf, -math.inf])
    row = data.draw(st.lists(values, min_size=1, max_size=40))
    count = data.draw(st.integers(0, len(row)))
    expected = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])
    assert select(torch.tensor([row, row[::-1]]), count)[0].tolist() == expected
