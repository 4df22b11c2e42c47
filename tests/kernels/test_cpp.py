"""The C++ kernels, at every instruction set, against what operations mean."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.pages import ORDERS, requests
from vllm_kvcompress.ops import attend_pages as attention
from vllm_kvcompress.ops import compact as compaction
from vllm_kvcompress.ops import cpp
from vllm_kvcompress.ops import select as selection
from vllm_kvcompress.ops import window_scores as scores
from vllm_kvcompress.ops.pages import PagedKeys
from vllm_kvcompress.ops.providers import Pages, Setting

HERE = cpp.level()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
levels = st.sampled_from(cpp.LEVELS[: cpp.LEVELS.index(HERE) + 1])
orders, dtypes = st.sampled_from(ORDERS), st.sampled_from(DTYPES)
block_sizes = st.sampled_from([1, 16, 24, 32, 64])
head_sizes = st.sampled_from([8, 20, 64, 80])
groups, seeds = st.sampled_from([1, 2, 3, 8]), st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def widest_at_the_end() -> Iterator[None]:
    """Tests choose narrower instructions."""
    yield
    cpp.limit(HERE)


def fuzz(examples: int):
    """Hypothesis with few examples, none of which has a deadline."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


@fuzz(150)
@given(
    level=levels,
    order=orders,
    dtype=dtypes,
    block_size=block_sizes,
    head_size=head_sizes,
    group=groups,
    window=st.integers(1, 9),
    past=st.integers(0, 150),
    softcap=st.sampled_from([0.0, 3.0]),
    weighted=st.booleans(),
    past_only=st.booleans(),
    one_head=st.booleans(),
    seed=seeds,
)
def test_window_scores(
    level: str,
    order: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    group: int,
    window: int,
    past: int,
    softcap: float,
    weighted: bool,
    past_only: bool,
    one_head: bool,
    seed: int,
) -> None:
    cpp.limit(level)
    kv_heads, tokens = 2, past + window
    drawn = requests(order, dtype, block_size, head_size, kv_heads, [tokens], seed)
    cache, blocks = drawn.cache, drawn.blocks.expand(kv_heads, -1)
    if one_head and cache.is_contiguous():
        blocks = blocks * kv_heads + torch.arange(kv_heads)[:, None]
        cache = cache.view(-1, 1, *cache.shape[2:])
    keys = PagedKeys(cache, drawn.halves[0], blocks, tokens)
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(window, kv_heads * group, head_size, generator=generator)
    if dtype.itemsize == 2:
        queries = queries.to(dtype)
    options = {
        "scale": 0.3,
        "softcap": softcap,
        "weights": torch.rand(window, generator=generator) if weighted else None,
        "past_only": [i % 2 == 0 for i in range(group)] if past_only else (),
    }
    found = cpp.window_scores(queries, keys, **options)
    expected = scores.window_scores.meaning(queries, keys, **options)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    dense = cpp.window_scores(queries, keys.dense().float(), **options)
    torch.testing.assert_close(dense, expected, atol=2e-6, rtol=2e-5)


@fuzz(100)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 200),
    share=st.floats(0, 1),
    distinct=st.sampled_from([1, 3, 1000]),
    seed=seeds,
)
def test_select(rows: int, tokens: int, share: float, distinct: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-distinct, distinct + 1, (rows, tokens), generator=generator)
    rated = drawn / 7
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-42])
    where = torch.rand(rows, tokens, generator=generator) < 0.1
    chosen = torch.randint(0, len(special), (rows, tokens), generator=generator)
    rated = torch.where(where, special[chosen], rated)
    count = round(share * tokens)
    expected = selection.select.meaning(rated, count)
    assert cpp.select(rated, count).equal(expected)
    assert cpp.select(rated[:1].expand(rows, -1), count)[-1].equal(expected[0])
    assert cpp.select(rated.T.contiguous().T, count).equal(expected)


@fuzz(100)
@given(
    order=orders,
    dtype=dtypes,
    block_size=block_sizes,
    head_size=head_sizes,
    blocks=st.integers(1, 6),
    share=st.floats(0, 1),
    overlap=st.booleans(),
    seed=seeds,
)
def test_compact(
    order: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    blocks: int,
    share: float,
    overlap: bool,
    seed: int,
) -> None:
    drawn = requests(
        order, dtype, block_size, head_size, 2, [blocks * block_size], seed
    )
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(share * blocks))
    rated = torch.rand(2, blocks * block_size, generator=generator)
    kept = selection.select.meaning(rated, count * block_size)
    among = drawn.blocks if overlap else drawn.others
    target = among[torch.randperm(len(among), generator=generator)[:count]]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    mine, theirs = drawn.cache, drawn.cache.clone()
    cpp.compact(mine, drawn.halves, drawn.blocks, kept, target)
    compaction.compact.meaning(theirs, drawn.halves, drawn.blocks, kept, target)
    assert mine.view(bits).equal(theirs.view(bits))


@fuzz(100)
@given(
    level=levels,
    order=orders,
    dtype=dtypes,
    block_size=block_sizes,
    head_size=head_sizes,
    group=groups,
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    softcap=st.sampled_from([0.0, 3.0]),
    halves=st.booleans(),
    seed=seeds,
)
def test_attend_pages(
    level: str,
    order: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    group: int,
    lens: list[int],
    softcap: float,
    halves: bool,
    seed: int,
) -> None:
    cpp.limit(level)
    drawn = requests(order, dtype, block_size, head_size, 2, lens, seed)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lens), 2 * group, head_size, generator=generator)
    factors = torch.rand(2, len(drawn.cache), block_size, 2, generator=generator) + 0.5
    arguments = (
        query,
        drawn.cache,
        drawn.halves,
        drawn.blocks,
        drawn.starts,
        torch.tensor(lens),
        factors.half() if halves else factors,
    )
    found = cpp.attend_pages(*arguments, scale=0.2, softcap=softcap)
    expected = attention.attend_pages.meaning(*arguments, scale=0.2, softcap=softcap)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_every_8_bit_float_is_read() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[~codes.view(torch.float8_e4m3fn).isnan()].view(torch.float8_e4m3fn)
    for level in cpp.LEVELS[: cpp.LEVELS.index(HERE) + 1]:
        cpp.limit(level)
        keys = codes.view(1, -1, 1)
        # With one element the logits are the keys; votes of one query, unscaled.
        found = cpp.window_scores(torch.ones(1, 1, 1), keys, scale=0.01)
        expected = (codes.double() * 0.01).softmax(0).float()
        torch.testing.assert_close(found[0], expected, atol=0, rtol=1e-5)


def test_what_is_refused() -> None:
    odd = Setting(torch.device("cpu"), frozenset({Pages(torch.int8, 16, 64)}))
    assert "int8" in str(cpp.refusal(odd, "window_scores"))
    assert cpp.refusal(odd, "compact") is None
    assert "cuda" in str(cpp.refusal(Setting(torch.device("cuda")), "select"))
