"""PyramidInfer's schedules, as its authors' code computes them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.methods.pyramidinfer import PyramidInfer

# Of 2,048 tokens and 32 layers, and of every 16 generated tokens.
ENTERING = """
2048 2048 2047 2045 2041 2034 2024 2010 1991 1967 1938 1904 1864 1819 1769 1714
1655 1592 1527 1460 1392 1324 1256 1190 1126 1064 1006 951 900 852 808 768"""
KEPT = "14 14 14 14 13 13 13 12 12 12 11 10 10 9 9 8 7 7 6 6 5 4 4 3 3 2 2 2 1 1 1 1"


def test_lengths_fall_with_depth_as_published() -> None:
    lengths = PyramidInfer(strategy="cosine").layer_budgets(2048, 0, 32)
    assert lengths == [int(length) for length in ENTERING.split()]


def test_nothing_is_dropped_at_a_ratio_of_one_or_from_a_short_context() -> None:
    assert PyramidInfer(decay_ratio=1.0).layer_budgets(500, 0, 8) == [500] * 8
    assert PyramidInfer(min_context=64).layer_budgets(80, 0, 8) == [80] * 8


def test_generated_tokens_are_lost_as_published() -> None:
    """The first 16 when as many have left the recent ones; the prompt is counted."""
    scorer = PyramidInfer()
    recent = scorer.queries_wanted(661)
    assert recent == 133
    assert next(scorer.decisions(512, 1024)) == 661 == 512 + 16 + recent
    assert scorer.generated_lost(512, 660, 32) == [0] * 32
    lost = scorer.generated_lost(512, 661, 32)
    assert [16 - tokens for tokens in lost] == [int(kept) for kept in KEPT.split()]


@given(
    st.integers(1, 300),
    st.integers(0, 200),
    st.integers(1, 40),
    st.floats(0.01, 0.95),
)
def test_decisions_are_where_losses_rise(
    prompt: int, more: int, interval: int, share: float
) -> None:
    scorer = PyramidInfer(gen_interval=interval, gen_keep_ratio=0, recent_ratio=share)
    if interval == 1:  # the last one is always kept
        return
    end = prompt + more
    lost = [scorer.generated_lost(prompt, n, 3) for n in range(prompt, end)]
    rising = [n for n, (a, b) in enumerate(pairwise(lost), prompt + 1) if b != a]
    assert list(scorer.decisions(prompt, end)) == rising
