"""Each method against a definition with loops, and where it must not be wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.matrix import METHODS
from tests.oracle import (
    keydiff_scores,
    knorm_scores,
    pyramidkv_budgets,
    rkv_scores,
    tova_scores,
)
from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.methods.base import Layer, Scorer
from vllm_kvcompress.methods.keydiff import KeyDiff
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.methods.pyramidkv import PyramidKV
from vllm_kvcompress.methods.random import Random
from vllm_kvcompress.methods.rkv import RKV
from vllm_kvcompress.methods.tova import TOVA
from vllm_kvcompress.ops.redundancy import redundancy
from vllm_kvcompress.ops.select import select

HEAD_SIZE = 8
LAYER = Layer(0, HEAD_SIZE**-0.5)

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
groups = st.sampled_from([1, 4])
seeds = st.integers(0, 1000)
few = settings(max_examples=25, deadline=None)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def _kept(
    scorer: Scorer, queries: torch.Tensor | None, keys: torch.Tensor, count: int
) -> list[list[int]]:
    return select(scorer.score(queries, keys, None, LAYER), count).tolist()


@pytest.mark.parametrize("entry", METHODS, ids=str)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_method_keeps_its_word(entry: dict, group: int, dtype: torch.dtype) -> None:
    """It sees no more than it asks for, and protects as much as it says."""
    scorer = KVCompressionConfig.from_dict(entry).scorer
    window, tokens = scorer.needs_queries, 70
    keys = _random(2, tokens, HEAD_SIZE, seed=0, dtype=dtype)
    queries = _random(window, 2 * group, HEAD_SIZE, seed=1, dtype=dtype)
    before = keys.clone(), queries.clone()
    scores = scorer.score(queries if window else None, keys, None, LAYER)
    assert torch.equal(keys, before[0]) and torch.equal(queries, before[1])
    assert scores.shape == (2, tokens)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    protected = scores == float("inf")
    assert (protected.sum(1) == scorer.always_kept).all()
    if window:
        assert protected[:, -window:].all()
        with pytest.raises(ValueError, match="quer"):
            scorer.score(None, keys, None, LAYER)


@pytest.mark.parametrize(
    ("method", "field", "value", "told"),
    [
        ("pyramidkv", "beta", 0, "greater than or equal to 1"),
        ("pyramidkv", "kernel_size", 4, "odd"),
        ("rkv", "window", 0, "greater than or equal to 1"),
        ("rkv", "kernel_size", 6, "odd"),
        ("rkv", "kernel_size", -1, "greater than or equal to 1"),
        ("rkv", "mix_lambda", 1.5, "less than or equal to 1"),
        ("rkv", "threshold", -0.1, "greater than or equal to 0"),
        ("rkv", "recent", -1, "greater than or equal to 0"),
        ("random", "seed", -1, "greater than or equal to 0"),
        ("random", "seed", 2**16, "less than 65536"),
    ],
)
def test_bad_parameters(method: str, field: str, value: float, told: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value} .*{told}"):
        KVCompressionConfig.from_dict({"method": method, field: value})


# KeyDiff -------------------------------------------------------------------


@few
@given(tokens=st.integers(1, 40), dtype=dtypes, seed=seeds)
def test_keydiff_equals_the_loops(tokens: int, dtype: torch.dtype, seed: int) -> None:
    keys = _random(2, tokens, HEAD_SIZE, seed=seed, dtype=dtype)
    found = KeyDiff().score(None, keys, None, LAYER)
    torch.testing.assert_close(found, torch.tensor(keydiff_scores(keys)))


def test_keydiff_keeps_the_odd_one() -> None:
    keys = torch.ones(2, 20, HEAD_SIZE) + 0.01 * _random(2, 20, HEAD_SIZE, seed=0)
    keys[0, 5] *= -1
    keys[1, 11] *= -100
    assert _kept(KeyDiff(), None, keys, 1) == [[5], [11]]


def test_keydiff_lives_with_zeros() -> None:
    keys = torch.zeros(1, 4, HEAD_SIZE)
    assert KeyDiff().score(None, keys, None, LAYER).tolist() == [[0.0] * 4]


# K-norm --------------------------------------------------------------------


@few
@given(tokens=st.integers(1, 40), dtype=dtypes, seed=seeds)
def test_knorm_equals_the_loops(tokens: int, dtype: torch.dtype, seed: int) -> None:
    keys = _random(2, tokens, HEAD_SIZE, seed=seed, dtype=dtype)
    found = KNorm().score(None, keys, None, LAYER)
    torch.testing.assert_close(found, torch.tensor(knorm_scores(keys)))


def test_knorm_keeps_the_shortest() -> None:
    keys = _random(2, 20, HEAD_SIZE, seed=0)
    keys[0, 3] *= 1e-3
    keys[1, 17] *= 1e-3
    keys[:, 7] *= 1e3
    assert _kept(KNorm(), None, keys, 1) == [[3], [17]]
    assert all(7 not in head for head in _kept(KNorm(), None, keys, 19))


# TOVA ----------------------------------------------------------------------


@few
@given(group=groups, tokens=st.integers(2, 40), dtype=dtypes, seed=seeds)
def test_tova_equals_the_loops(
    group: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    queries = _random(1, 2 * group, HEAD_SIZE, seed=seed, dtype=dtype)
    keys = _random(2, tokens, HEAD_SIZE, seed=seed + 1, dtype=dtype)
    found = TOVA().score(queries, keys, None, LAYER)
    expected = tova_scores(queries[0], keys, scale=LAYER.scale)
    torch.testing.assert_close(found[0, :-1], torch.tensor(expected[:-1]))
    assert torch.equal(found[0], found[1])


def test_tova_keeps_what_one_head_needs_in_all() -> None:
    queries = torch.zeros(1, 8, HEAD_SIZE)
    queries[0, 7] = 10.0
    keys = 0.01 * _random(2, 20, HEAD_SIZE, seed=0)
    keys[1, 6] += 10.0
    assert _kept(TOVA(), queries, keys, 2) == [[6, 19]] * 2


# Random --------------------------------------------------------------------


def test_random_is_the_same_everywhere() -> None:
    """Written out: what another process, run or machine has to find."""
    keys = torch.empty(2, 12, HEAD_SIZE)
    assert _kept(Random(seed=3), None, keys, 4) == [[2, 8, 9, 10], [2, 5, 6, 11]]


def test_random_of_some_heads_is_that_of_all() -> None:
    keys = torch.zeros(8, 1001, HEAD_SIZE)
    whole = Random().score(None, keys, None, Layer(1, 1.0))
    for first in range(8):
        part = Random().score(None, keys[:2], None, Layer(1, 1.0, first_head=first))
        assert part[: 8 - first].equal(whole[first : first + 2])


def test_random_sees_no_content() -> None:
    first, second = (_random(2, 30, HEAD_SIZE, seed=seed) for seed in (0, 1))
    assert _kept(Random(), None, first, 9) == _kept(Random(), None, second, 9)


def test_random_differs_by_head_layer_and_seed() -> None:
    keys = torch.empty(2, 64, HEAD_SIZE)
    rows = [
        Random(seed=seed).score(None, keys, None, Layer(layer, 1.0))
        for seed in (0, 1, 2**16 - 1)
        for layer in (0, 1)
    ]
    assert len({tuple(row.tolist()) for row in torch.cat(rows)}) == 12


def test_random_is_fair() -> None:
    """Early and late tokens, and both KV heads, are kept equally often."""
    keys = torch.empty(2, 10, HEAD_SIZE)
    counts = torch.zeros(2, 10)
    for seed in range(2000):
        scores = Random(seed=seed).score(None, keys, None, LAYER)
        counts.scatter_add_(1, select(scores, 5), torch.ones(2, 5))
    # 1000 expected; the standard deviation is 22.
    assert ((counts - 1000).abs() < 110).all()


# R-KV ----------------------------------------------------------------------


@few
@given(
    group=groups,
    window=st.integers(1, 5),
    past=st.integers(1, 20),
    kernel_size=st.sampled_from([1, 3, 7]),
    threshold=st.sampled_from([0.0, 0.31, 0.5, 0.97]),
    recent=st.integers(0, 4),
    mix_lambda=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    copies=st.integers(0, 6),
    dtype=dtypes,
    seed=seeds,
)
def test_rkv_equals_the_loops(
    group: int,
    window: int,
    past: int,
    kernel_size: int,
    threshold: float,
    recent: int,
    mix_lambda: float,
    copies: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tokens = past + window
    queries = _random(window, 2 * group, HEAD_SIZE, seed=seed, dtype=dtype)
    keys = _random(2, tokens, HEAD_SIZE, seed=seed + 1, dtype=dtype)
    keys[:, :copies] = keys[:, tokens // 2, None]
    options = {"threshold": threshold, "recent": recent, "mix_lambda": mix_lambda}
    scorer = RKV(window=window, kernel_size=kernel_size, **options)
    found = scorer.score(queries, keys, None, LAYER)
    expected = rkv_scores(
        queries, keys, kernel_size=kernel_size, scale=LAYER.scale, **options
    )
    torch.testing.assert_close(found[:, :past], torch.tensor(expected))


def test_rkv_drops_old_repetitions() -> None:
    """Of one key three times the last survives; nothing else tells them apart."""
    keys = torch.eye(16)[None].clone()
    keys[0, 2] = keys[0, 5] = keys[0, 9]
    queries = torch.zeros(4, 2, 16)
    scorer = RKV(window=4, kernel_size=1)
    missing = [
        set(range(16)) - set(_kept(scorer, queries, keys, count)[0])
        for count in (15, 14)
    ]
    assert missing == [{2}, {2, 5}]


def test_rkv_keeps_what_is_looked_at() -> None:
    keys = normalize(_random(1, 24, HEAD_SIZE, seed=0), dim=-1)
    queries = 20 * keys[0, 6].expand(4, 1, HEAD_SIZE)
    scorer = RKV(window=4, kernel_size=3, mix_lambda=1.0)
    assert _kept(scorer, queries, keys, 7) == [[5, 6, 7, 20, 21, 22, 23]]


@pytest.mark.parametrize("most_pairs", [1, 33, 64, 1000])
def test_redundancy_is_the_same_in_pieces(most_pairs: int) -> None:
    keys = _random(2, 32, HEAD_SIZE, seed=0)
    options = {"threshold": 0.3, "recent": 2}
    torch.testing.assert_close(
        redundancy(keys, most_pairs=most_pairs, **options), redundancy(keys, **options)
    )


# PyramidKV -----------------------------------------------------------------


@settings(deadline=None)
@given(
    window=st.integers(1, 64),
    above=st.integers(1, 3000),
    tokens=st.integers(1, 40_000),
    layers=st.integers(1, 80),
    beta=st.integers(1, 40),
)
def test_pyramidkv_budgets(
    window: int, above: int, tokens: int, layers: int, beta: int
) -> None:
    budget = window + above
    scorer = PyramidKV(window=window, beta=beta)
    found = scorer.layer_budgets(tokens, budget, layers)
    assert len(found) == layers
    assert found == sorted(found, reverse=True)
    assert all(window <= layer <= 2 * budget for layer in found)
    if tokens >= 2 * above:
        assert max(found) <= max(tokens, budget)
    # Ours: never more than asked for, and less only by what fractions cost.
    assert budget * layers - layers < sum(found) <= budget * layers
    if layers > 1 and tokens >= budget:
        theirs = pyramidkv_budgets(tokens, budget, layers, window=window, beta=beta)
        assert found[0] == theirs[0]
        # They cut the step off, so that each layer above the first gains on ours.
        assert all(
            0 <= their - our <= number
            for number, (our, their) in enumerate(zip(found, theirs, strict=True))
        )


def test_pyramidkv_budgets_written_out() -> None:
    """KVCache-Factory's numbers, whose mean is 133.5, and ours, whose mean is 128."""
    theirs = pyramidkv_budgets(8000, 128, 32, window=8, beta=20)
    ours = PyramidKV(window=8).layer_budgets(8000, 128, 32)
    assert (theirs[0], theirs[-1], sum(theirs) / 32) == (242, 25, 133.5)
    assert (ours[0], ours[-1]) == (242, 14)
    assert 127 < sum(ours) / 32 <= 128


@pytest.mark.parametrize(
    ("tokens", "layers", "beta"),
    [(1000, 1, 20), (441, 8, 20), (9, 8, 20), (9000, 8, 1)],
)
def test_pyramidkv_falls_back_to_equal_layers(
    tokens: int, layers: int, beta: int
) -> None:
    """One layer, a prompt of less than twice the past's mean, or beta=1."""
    scorer = PyramidKV(window=32, beta=beta)
    assert scorer.layer_budgets(tokens, 253, layers) == [253] * layers


def test_pyramidkv_gives_no_layer_more_than_the_prompt() -> None:
    found = PyramidKV(window=32).layer_budgets(480, 256, 3)
    assert found[0] <= 480
