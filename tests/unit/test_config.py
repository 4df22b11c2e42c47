"""KVCompressionConfig: what users may write, and what they are told otherwise."""

import json
from typing import Any

import pytest

from tests.matrix import METHODS as MATRIX
from vllm_kvcompress.config import DEFAULT_BUDGET, ConfigError, KVCompressionConfig


def parse(**settings):
    return KVCompressionConfig.from_dict({"method": "snapkv", **settings})


def test_defaults():
    config = parse()
    assert config.method == "snapkv"
    assert (config.budget, config.keep_ratio) == (DEFAULT_BUDGET, None)
    assert (config.scorer.window, config.scorer.kernel_size) == (32, 7)


@pytest.mark.parametrize("settings", MATRIX, ids=str)
def test_settings_round_trip_through_json(settings):
    config = KVCompressionConfig.from_dict(settings)
    resolved = config.settings()
    over = resolved.get("over")  # with its own parameters filled in
    written = {**resolved, "over": over["method"]} if over else resolved
    assert settings.items() <= written.items()
    assert KVCompressionConfig.from_dict(json.loads(json.dumps(resolved))) == config


def test_from_dict_leaves_its_argument_alone():
    settings = {"method": "snapkv", "budget": 512}
    KVCompressionConfig.from_dict(settings)
    assert settings == {"method": "snapkv", "budget": 512}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "nope"}, ["'nope'", "snapkv", "streamingllm"]),
        ({"method": None}, ["None", "snapkv"]),
        ({"budgt": 1}, ["'budgt'", "snapkv", "budget", "window"]),
        ({"sinks": 4}, ["'sinks'", "snapkv", "window"]),
        ({"budget": "2048"}, ["budget='2048'", "integer"]),
        ({"budget": True}, ["budget=True", "integer"]),
        ({"budget": 0}, ["budget=0", "greater than or equal to 1"]),
        ({"budget": 32}, ["budget=32", "larger than", "32", "snapkv"]),
        ({"keep_ratio": 0}, ["keep_ratio=0", "greater than 0"]),
        ({"keep_ratio": 1.5}, ["keep_ratio=1.5", "less than or equal to 1"]),
        ({"budget": 512, "keep_ratio": 0.5}, ["budget=512", "keep_ratio=0.5"]),
        ({"window": 0}, ["window=0", "greater than or equal to 1"]),
        ({"layer_budgets": [512, 32]}, ["budget=32", "larger than", "32"]),
        ({"layer_budgets": "none.json"}, ["'none.json'", "readable JSON"]),
        ({"layer_budgets": "/dev/zero"}, ["'/dev/zero'", "no file"]),
        (
            {"window": 16, "request_methods": {"snapkv": {"window": 8}}},
            ["request_methods.snapkv", "other parameters", "drop it"],
        ),
        (
            {"decode": {"method": "pyramidkv"}},
            ["decode.method=pyramidkv", "method=snapkv", "both"],
        ),
        ({"layer_budgets": [9], "budget": 512}, ["budget=512", "layer_budgets"]),
        ({"layers_per_tier": 2}, ["layers_per_tier=2", "layer_budgets"]),
        ({"decode": 128}, ["decode must be a mapping"]),
        ({"decode": {"interval": 8}}, ["decode.interval=8", "window of 32"]),
        ({"decode": {"every": 8}}, ["'decode.every'", "interval"]),
        ({"decode": {"budget": 9}}, ["budget=9", "larger than"]),
        ({"prefill": "fast"}, ["prefill='fast'", "exact", "incremental"]),
        ({"prefill": "incremental"}, ["prefill='incremental'", "decode"]),
        (
            {
                "prefill": "incremental",
                "decode": {},
                "method": "pyramidkv",
                "request_methods": ["pyramidinfer"],
            },
            ["prefill='incremental'", "for all methods"],
        ),
        ({"request_methods": ["nope"]}, ["'nope'", "snapkv"]),
        ({"request_methods": {"knorm": 1}}, ["request_methods.knorm", "mapping"]),
        ({"request_methods": ["pyramidkv"]}, ["pyramidkv", "method=snapkv"]),
        ({"method": "pyramidinfer", "budget": 512}, ["budget", "pyramidinfer"]),
        (
            {
                "method": "pyramidinfer",
                "prefill": "incremental",
                "decode": {"method": "snapkv"},
            },
            ["prefill='incremental'", "for all methods"],
        ),
        (
            {"method": "pyramidinfer", "decode": {"interval": 64}},
            ["decode.interval", "pyramidinfer"],
        ),
        (
            {"decode": {"method": "pyramidinfer", "gen_interval": 0}},
            ["decode.method=pyramidinfer", "drop decode"],
        ),
        ({"kernel_size": 4}, ["kernel_size=4", "odd"]),
        ({"window": True}, ["window=True", "integer"]),
        ({"window": "16"}, ["window='16'", "integer"]),
        ({"keep_ratio": "0.5"}, ["keep_ratio='0.5'", "number"]),
        ({"budget": 10**400}, ["budget=1000", "less than or equal"]),
        ({"kernels": {"sort": "cpp"}}, ["kernels", "'sort'", "select"]),
        ({"kernels": {"a\nb": "x"}}, ["kernels.a\\nb='x'"]),
        ({"request_methods": {"knorm": {"method": "tova"}}}, ["knorm.method='tova'"]),
        ({"request_methods": ["minicache"]}, ["minicache", "method=snapkv"]),
        (
            {"decode": {"method": "minicache", "over": "tova"}},
            ["minicache", "method=snapkv"],
        ),
        ({"kernels": "fast"}, ["kernels.all='fast'", "cpp", "triton"]),
        ({"kernels": {"select": "fast"}}, ["kernels.select='fast'", "cpp"]),
        ({"pooling": "mean"}, ["pooling='mean'", "max", "avg"]),
    ],
    ids=str,
)
def test_refused_in_one_sentence(settings, told):
    with pytest.raises(ConfigError) as caught:
        parse(**settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"over": "pyramidkv"}, ["over=pyramidkv", "snapkv"]),
        ({"over": "ada_snapkv"}, ["over=ada_snapkv", "snapkv"]),
        ({"over": "pyramidinfer"}, ["over=pyramidinfer", "snapkv"]),
        ({"over": "minicache"}, ["over=minicache", "snapkv"]),
        ({"over": {"method": "snapkv", "sinks": 1}}, ["over.sinks", "window"]),
        ({"over": "nope"}, ["'nope'", "snapkv"]),
        ({"request_methods": ["pyramidkv"]}, ["request_methods=pyramidkv"]),
        ({"decode": {"method": "snapkv"}}, ["decode", "minicache", "drop it"]),
        ({"over": "snapkv", "layer_budgets": [99, 99]}, ["layer_budgets", "minicache"]),
        ({"layers_per_tier": 2}, ["layers_per_tier", "minicache"]),
        ({"over": "snapkv", "prefill": "incremental"}, ["prefill='incremental'"]),
        ({"budget": 512}, ["budget", "minicache", "drop it"]),
        ({"over": "snapkv", "budget": 32}, ["budget=32", "larger than the 32"]),
        ({"t": 1.5}, ["t=1.5", "less than or equal to 1"]),
        ({"retain": -0.1}, ["retain=-0.1", "greater than or equal to 0"]),
        ({"retention": "literal"}, ["retention='literal'", "rank", "range"]),
        ({"interval": 0}, ["interval=0", "greater than or equal to 1"]),
    ],
    ids=str,
)
def test_merging_is_refused_in_one_sentence(settings, told):
    with pytest.raises(ConfigError) as caught:
        KVCompressionConfig.from_dict({"method": "minicache", **settings})
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("start", "layers", "way_out"),
    [
        (None, 1, "choose another"),
        (1, 2, "start_layer=0 or"),
        (31, 32, "=30 or"),
        (40, 32, "=30 or"),
    ],
)
def test_a_model_without_a_pair(start, layers, way_out):
    config = KVCompressionConfig.from_dict(
        {"method": "minicache", "start_layer": start}
    )
    told = f"no two layers to merge among {layers} .*{way_out}"
    with pytest.raises(ConfigError, match=told):
        config.tiers(layers)


def test_not_a_mapping():
    with pytest.raises(ConfigError, match="mapping"):
        KVCompressionConfig.from_dict("snapkv")


def test_prompt_budget():
    assert parse(budget=512).prompt_budget(10_000, 16) == 512
    assert parse(budget=512).prompt_budget(10_000, 16, requested=128) == 128
    share = parse(keep_ratio=0.25)
    assert share.prompt_budget(10_000, 16) == 2_500
    assert share.prompt_budget(10_000, 16, requested=128) == 128
    assert share.prompt_budget(10_000, 16, requested=9_000) == 2_500
    assert share.prompt_budget(40, 16) == share.smallest_budget(16) == 47


def test_the_own_method_named_again_is_the_same():
    for again in (["snapkv", "tova"], {"snapkv": {}, "tova": {}}):
        config = parse(window=16, request_methods=again)
        assert config.request_methods["snapkv"] == config.scorer
        assert KVCompressionConfig.from_dict(config.settings()) == config


def test_layer_budgets_from_a_file(tmp_path):
    file = tmp_path / "budgets.json"
    file.write_text("[512, 256]")
    config = parse(layer_budgets=str(file))
    assert config.layer_budgets == (512, 256)
    assert config.settings()["layer_budgets"] == [512, 256]
    assert config.tiers(2) == [(0,), (1,)]
    with pytest.raises(ConfigError, match="2 entries; this model has 3 layers"):
        config.tiers(3)


def test_tiers_have_equal_sizes():
    config = KVCompressionConfig.from_dict({"method": "pyramidkv"})
    assert [len(tier) for tier in config.tiers(32)] == [4] * 8
    assert [len(tier) for tier in config.tiers(22)] == [11] * 2
    uneven = KVCompressionConfig.from_dict(
        {"method": "pyramidkv", "layers_per_tier": 5}
    )
    with pytest.raises(ConfigError, match="layers_per_tier=5 must divide the 32"):
        uneven.tiers(32)


@pytest.mark.parametrize(
    "more", [{"request_methods": ["knorm"]}, {"decode": {"method": "rkv"}}], ids=str
)
def test_a_budget_is_for_the_methods_that_take_one(more: dict[str, Any]) -> None:
    settings = {"method": "pyramidinfer", **more}
    assert KVCompressionConfig.from_dict(settings).budget == 2048
    config = KVCompressionConfig.from_dict({**settings, "budget": 512})
    assert KVCompressionConfig.from_dict(config.settings()) == config
    assert config.budget == 512
    layered = KVCompressionConfig.from_dict({**settings, "layer_budgets": [512, 1024]})
    budgets = layered.tier_budgets("pyramidinfer", layered.tiers(2), 2048, 16)
    assert budgets == {(0,): 2048, (1,): 1888}, "its own, which fall with depth"
