"""How a layer's budget is dealt out between its KV heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.ops.head_shares import head_shares

INF = float("inf")
few = settings(max_examples=100, deadline=None)


def _scores(
    layers: int, heads: int, tokens: int, *, window: int = 0, steps: int = 0, seed=0
) -> list[torch.Tensor]:
    """Random scores; ``steps`` makes them few, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, heads, tokens, generator=generator)
    scores *= torch.rand(heads, 1, generator=generator)
    if steps:
        scores = (scores * steps).floor()
    scores[..., tokens - window :] = INF
    return list(scores)


def _loops(scores: torch.Tensor, total: int, floor: float) -> list[float]:
    """Tokens that each head of one layer without ties is due."""
    heads = len(scores)
    due = [float((row == INF).sum()) for row in scores]
    room = total - sum(due)
    ranked = sorted(
        ((s, h) for h, row in enumerate(scores.tolist()) for s in row if s < INF),
        reverse=True,
    )
    for head in range(heads):
        best = sum(1 for _, h in ranked[: int(room)] if h == head)
        due[head] += floor * (total / heads - due[head]) + (1 - floor) * best
    return due


@few
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 8),
    blocks=st.integers(1, 12),
    page=st.sampled_from([1, 4, 32]),
    window=st.integers(0, 40),
    floor=st.floats(0, 1),
    steps=st.sampled_from([0, 1, 3]),
    data=st.data(),
)
def test_shares_are_whole_and_sum_up(
    layers, heads, blocks, page, window, floor, steps, data
) -> None:
    tokens = blocks * page
    window = min(window, tokens)
    least = -(-window // page)
    kept = data.draw(st.integers(max(least, 1), blocks))
    scores = _scores(layers, heads, tokens, window=window, steps=steps, seed=kept)
    shares = head_shares(scores, kept * heads, page, floor)
    assert sum(shares) == kept * heads
    assert all(least <= share <= blocks for share in shares)
    assert all(share >= int(floor * kept * (1 - 1e-9)) for share in shares)


@few
@given(
    heads=st.integers(1, 5),
    kept=st.integers(2, 9),
    floor=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_one_layer_equals_the_loops(heads, kept, floor, seed) -> None:
    (scores,) = _scores(1, heads, 40, window=3, seed=seed)
    due = [tokens / 4 for tokens in _loops(scores, kept * 4 * heads, floor)]
    shares = head_shares([scores], kept * heads, 4, floor)
    for share, wanted in zip(shares, due, strict=True):
        assert abs(share - wanted) < 1 + 1e-6


def test_pages_of_one_token_are_the_best_of_all_heads() -> None:
    scores = torch.tensor([[9.0, 8, 7, 1], [6, 2, 0, 0], [5, 4, 3, 0]])
    assert head_shares([scores], 6, 1, 0.0) == [3, 1, 2]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
@pytest.mark.parametrize("heads", [2, 3, 7])
def test_equal_scores_are_even_shares(value: float, heads: int) -> None:
    scores = torch.full((heads, 64), value)
    scores[:, 60:] = INF
    assert head_shares([scores], 5 * heads, 8, 0.2) == [5] * heads


def test_a_floor_of_one_is_even() -> None:
    scores = _scores(2, 4, 64, window=5)
    assert head_shares(scores, 12, 8, 1.0) == [3] * 4


def test_the_floor_holds_a_useless_head() -> None:
    scores = torch.rand(2, 320) + torch.tensor([[0.0], [1.0]])
    assert head_shares([scores], 20, 16, 0.2) == [2, 18]
    assert head_shares([scores], 20, 16, 0.0) == [0, 20]


def test_the_window_holds_a_useless_head() -> None:
    scores = torch.rand(2, 320) + torch.tensor([[0.0], [1.0]])
    scores[:, 303:] = INF  # 17 tokens, two pages
    assert head_shares([scores], 20, 16, 0.0) == [2, 18]


@few
@given(
    blocks=st.lists(st.integers(0, 6), min_size=2, max_size=5),
    page=st.sampled_from([1, 8]),
    floor=st.floats(0, 1),
    data=st.data(),
)
def test_no_head_gets_more_than_it_holds(blocks, page, floor, data) -> None:
    """Rows are filled with -inf where heads hold unequally many tokens."""
    pages = data.draw(st.integers(0, sum(blocks)))
    scores = torch.rand(2, len(blocks), max(blocks) * page)
    for head, count in enumerate(blocks):
        scores[:, head, count * page :] = -INF
    shares = head_shares(list(scores), pages, page, floor)
    assert sum(shares) == pages
    assert all(share <= held for share, held in zip(shares, blocks, strict=True))


def test_layers_count_alike() -> None:
    low, high = torch.rand(32), torch.rand(32) + 1
    scores = [torch.stack([low, high]), torch.stack([high, low])]
    assert head_shares(scores[:1], 8, 4, 0.0) == [0, 8]
    assert head_shares(scores, 8, 4, 0.0) == [4, 4]
    assert head_shares([1e9 * scores[0], scores[1]], 8, 4, 0.0) == [4, 4]


@pytest.mark.parametrize(
    ("given_settings", "told"),
    [
        (
            {"method": "ada_snapkv", "decode": {"method": "tova"}},
            ["decode.method=tova", "method=ada_snapkv"],
        ),
        (
            {"method": "snapkv", "decode": {"method": "ada_snapkv"}},
            ["decode.method=ada_snapkv", "method=snapkv"],
        ),
        (
            {"method": "snapkv", "request_methods": ["ada_snapkv"]},
            ["request_methods", "ada_snapkv"],
        ),
        (
            {"method": "ada_snapkv", "request_methods": ["pyramidinfer"]},
            ["request_methods", "pyramidinfer", "prune=false"],
        ),
        ({"method": "ada_snapkv", "floor": 1.5}, ["floor=1.5"]),
    ],
    ids=str,
)
def test_refused_in_one_sentence(given_settings, told) -> None:
    with pytest.raises(ConfigError) as caught:
        KVCompressionConfig.from_dict({"budget": 512, **given_settings})
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message
