"""Whatever is written as settings is taken as it is, or refused in one line."""

import json
import sys

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.matrix import METHODS as MATRIX
from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.engine.requests import (
    BUDGET_KEY,
    USAGE_KEY,
    RequestError,
    RequestSettings,
    request_settings,
)
from vllm_kvcompress.methods import METHODS, load_method
from vllm_kvcompress.parsing import KEY

LONGEST_MESSAGE = 2000

fuzzed = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
few = settings(fuzzed, max_examples=80)

numbers = st.sampled_from(
    [0, 1, -1, 7, 64, 100, 0.5, 1.0, 64.0, -0.0, 5e-324, 1e308, 1 - 2**-53]
    + [2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(10**400)]
    + [float("nan"), float("inf"), -float("inf"), True, False]
)
words = st.sampled_from(
    [*METHODS, "", "on", "off", "auto", "cpp", "all", "64", "2K", "true", "null"]
    + ["max", "range", "linear", "incremental", "a\nb", "\u2028", "\x00", "%s{}"]
    + ["x" * 10_000, "/nowhere.json", "\U0001f600"]
)
texts = words | st.text(max_size=8)


def nested(depth: int) -> object:
    """Lists inside lists, or mappings inside mappings."""
    value: object = []
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


scalars = st.none() | numbers | texts
values = st.recursive(
    scalars | st.integers() | st.floats() | st.integers(1, 600).map(nested),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)

# Values of the right kind, so that a good many mappings are accepted.
LIKELY = {
    "budget": st.integers(1, 4096),
    "keep_ratio": st.floats(0, 1),
    "layer_budgets": st.lists(st.integers(33, 999), max_size=6),
    "layers_per_tier": st.integers(1, 4),
    "prefill": st.sampled_from(["exact", "incremental"]),
    "prefill_interval": st.integers(1, 4096),
    "kernels": st.sampled_from(["cpp", "auto", {"select": "torch"}, {"all": "cpp"}]),
    "interval": st.none() | st.integers(1, 600),
    "start_layer": st.none() | st.integers(0, 9),
    "window": st.integers(1, 64),
    "kernel_size": st.sampled_from([1, 5, 7, 4]),
    "pooling": st.sampled_from(["max", "avg"]),
    "sinks": st.integers(0, 40),
    "prune": st.booleans(),
}
shares = st.sampled_from([0, 0.0, 0.1, 0.5, 0.9, 1 - 2**-53, 1])


def mapping(keys, methods=None, near=True):
    """Some of the keys and perhaps others; their values are mostly of their kind."""
    entries = [
        st.tuples(st.just(key), LIKELY.get(key, shares | values) if near else values)
        for key in keys
    ]
    others = st.tuples(texts, values)
    drawn = st.lists(st.one_of(*entries), max_size=4)
    drawn |= st.lists(st.one_of(*entries, others), max_size=4)
    if methods is None:
        return drawn.map(dict)
    return st.tuples(methods, drawn).map(lambda d: {**dict(d[1]), "method": d[0]})


def of_method(name, common=(), near=True):
    """A method with parameters, and keys that are not its own."""
    keys = [*load_method(name).model_fields, *common]
    return mapping(keys, st.just(name), near) if keys else st.just({"method": name})


def any_method(common=(), near=True):
    names = st.sampled_from(sorted(METHODS))
    return names.flatmap(lambda name: of_method(name, common, near))


LIKELY["decode"] = st.none() | any_method(("interval", "budget")) | st.just({})
LIKELY["over"] = any_method() | st.sampled_from(sorted(METHODS))
LIKELY["request_methods"] = (
    st.lists(st.sampled_from(sorted(METHODS)), max_size=3)
    | st.dictionaries(
        st.sampled_from(sorted(METHODS)), any_method().map(
            lambda own: {k: v for k, v in own.items() if k != "method"}
        ), max_size=2,
    )
    | st.dictionaries(texts, any_method() | values, max_size=2)
)
COMMON = sorted({*KVCompressionConfig.model_fields} - {"scorer"})
written = st.one_of(
    any_method(COMMON),
    any_method(COMMON, near=False),
    mapping(COMMON, texts),
    st.sampled_from(MATRIX),
    st.dictionaries(texts | st.integers(), values, max_size=3),
    values,
)


def told(message):
    """It is one short line."""
    assert message
    assert len(message.splitlines()) == 1
    assert len(message) < LONGEST_MESSAGE


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
