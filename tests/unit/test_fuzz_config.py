"""Whatever is written as settings is taken as it is, or refused in one line."""

import json

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.matrix import METHODS as MATRIX
from tests.unit.drawn_settings import COMMON, any_method, texts, told, values, written
from vllm_kvcompress.config import KEY, ConfigError, KVCompressionConfig
from vllm_kvcompress.engine.requests import (
    BUDGET_KEY,
    USAGE_KEY,
    RequestError,
    request_settings,
)

fuzzed = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def parsed(given):
    """The configuration, or None if it was refused properly."""
    try:
        return KVCompressionConfig.from_dict(given)
    except ConfigError as error:
        told(str(error))
        assert str(error).startswith(KEY)
        return None


def unchanged(given, model):
    """Every number and word that was written is there, with its type."""
    for key, value in given.items():
        held = getattr(model, key, getattr(getattr(model, "scorer", None), key, None))
        if isinstance(held, BaseModel) and isinstance(value, dict):
            unchanged(value, held)
        elif isinstance(value, bool | int | float):
            assert held == value
            assert isinstance(held, float) or type(held) is type(value)
        elif isinstance(value, str) and isinstance(held, str) and key != "method":
            assert held == value


@fuzzed
@given(written)
def test_settings_round_trip_or_are_refused(given):
    if (config := parsed(given)) is None:
        return
    resolved = config.settings()
    again = json.loads(json.dumps(resolved, allow_nan=False))
    assert KVCompressionConfig.from_dict(again) == config
    assert KVCompressionConfig.from_dict(again).settings() == resolved
    unchanged(given, config)


@fuzzed
@given(
    any_method(COMMON) | st.sampled_from(MATRIX),
    st.integers(1, 48),
    st.integers(1, 5000) | st.sampled_from([1, 31, 32, 33, 131_072]),
    st.sampled_from([1, 8, 16, 32, 128]),
)
def test_accepted_settings_fit_every_prompt(given, layers, prompt, block_size):
    config = parsed(given)
    assume(config is not None)
    assert config.smallest_budget(block_size) >= block_size
    try:
        tiers = config.tiers(layers)
    except ConfigError as error:
        told(str(error))
        return
    assert sorted(layer for tier in tiers for layer in tier) == [*range(layers)]
    for scorer in config.scorers:
        for fit in config.tier_fits(scorer, tiers, prompt, block_size).values():
            assert 0 <= fit.merged_blocks <= fit.kept_blocks <= fit.end_block
            assert fit.kept_blocks * block_size + fit.tail_tokens <= prompt
    for scorer in config.request_methods or [config.method]:
        times = [length for length, _ in config.due(scorer, prompt, prompt + 300)]
        assert times == sorted(times)


near_names = st.sampled_from(
    [KEY, BUDGET_KEY, USAGE_KEY, f"{KEY}_", f"{KEY}_budgets", KEY.upper(), "other"]
)
SERVERS = [
    KVCompressionConfig.from_dict(given)
    for given in (
        {"method": "snapkv", "budget": 512, "request_methods": ["keydiff"]},
        {"method": "snapkv", "keep_ratio": 0.5},
        {"method": "pyramidkv", "request_methods": ["pyramidinfer"]},
        {"method": "snapkv", "prefill": "incremental", "decode": {}},
    )
]


@fuzzed
@given(
    st.dictionaries(near_names | texts, values | st.integers(40, 600), max_size=4)
    | st.dictionaries(st.integers(), values, max_size=1),
    st.sampled_from(SERVERS),
    st.sampled_from([None, 1, 16, 128]),
)
def test_a_request_is_understood_or_refused(extra_args, server, block_size):
    try:
        wanted = request_settings(extra_args, server, block_size)
    except RequestError as error:
        told(str(error))
        assert error.field in extra_args and error.field in str(error)
        return
    assert wanted.budget == extra_args.get(BUDGET_KEY)
    assert wanted.budget is None or type(wanted.budget) is int
    assert wanted.method in (None, extra_args.get(KEY))
    assert wanted.enabled == (extra_args.get(KEY) != "off")
    assert not {k for k in extra_args if str(k).startswith(KEY)} - {
        *(KEY, BUDGET_KEY, USAGE_KEY)
    }
