"""Lengths: what a prompt keeps, in tokens and blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.matrix import METHODS
from vllm_kvcompress.budget import fit, smallest_budget, tiers, whole_block_budgets
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import Counters, StepPlan


@given(
    tokens=st.integers(1, 5000),
    block_size=st.sampled_from([16, 32, 128]),
    extra=st.integers(0, 600),
    protected=st.integers(0, 80),
)
def test_fit(tokens: int, block_size: int, extra: int, protected: int) -> None:
    budget = smallest_budget(block_size, protected) + extra
    found = fit(tokens, budget, block_size)
    retained = found.kept_blocks * block_size + found.tail_tokens
    assert found.end_block * block_size + found.tail_tokens == tokens
    assert retained <= max(budget, found.tail_tokens)
    assert retained % block_size == tokens % block_size
    if found.shrinks:
        assert budget - block_size < retained <= budget
        # What a method protects is never pushed out.
        assert retained >= min(protected, tokens)
        assert found.freed_blocks == found.end_block - found.kept_blocks > 0
    else:
        assert retained == tokens


def test_blocks_held_never_exceed_the_budget() -> None:
    for tokens in range(300, 700):
        found = fit(tokens, 256, 32)
        assert found.kept_blocks + bool(found.tail_tokens) == 8


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_prompt_budget(settings: dict) -> None:
    config = KVCompressionConfig.from_dict(settings)
    smallest = config.smallest_budget(32)
    for tokens in (1, 100, 1000, 10_000):
        budget = config.prompt_budget(tokens, 32)
        if config.budget is not None:
            assert budget == config.budget
        elif config.scorer.owns_budget:
            assert budget == tokens  # nothing but its own parameters bounds it
        else:
            assert budget == max(int(tokens * config.keep_ratio), smallest)
        assert config.prompt_budget(tokens, 32, requested=smallest) <= budget


@given(
    st.lists(st.integers(0, 900), min_size=6, max_size=6),
    st.integers(900, 1000),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([0, 0, 300]),
)
def test_lengths_are_rounded_to_blocks_in_sum(
    lengths: list[int], tokens: int, size: int, least: int
) -> None:
    lengths = sorted((length + tokens % 32 for length in lengths), reverse=True)
    found = whole_block_budgets(lengths, tiers(6, size), tokens, least, 32)
    held = list(found.values())
    assert held == sorted(held, reverse=True)
    assert all((length - tokens) % 32 == 0 for length in held)
    assert all(length >= least for length in held)
    if not least:
        assert abs(sum(held) * size - sum(lengths)) <= 32 * size / 2
        for tier, length in found.items():
            assert abs(length - sum(lengths[i] for i in tier) / size) < 32


def test_counters_add_up() -> None:
    totals = Counters()
    totals.add(Counters(compressions=1, seconds=0.5, skipped={"off": 1}))
    totals.add(Counters(compressions=2, seconds=0.25, skipped={"off": 1, "short": 3}))
    assert totals == Counters(
        compressions=3, seconds=0.75, skipped={"off": 2, "short": 3}
    )
    assert not StepPlan()
    assert StepPlan(skipped={"off": 1})
