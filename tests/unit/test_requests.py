"""Per-request settings, and where vLLM checks them."""

from types import SimpleNamespace

import pytest

from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.engine.requests import (
    RequestError,
    RequestSettings,
    request_settings,
)

FIXED = KVCompressionConfig.from_dict({"method": "snapkv", "budget": 512})
SHARE = KVCompressionConfig.from_dict({"method": "snapkv", "keep_ratio": 0.5})


@pytest.mark.parametrize(
    ("extra_args", "wanted"),
    [
        (None, RequestSettings(True, None)),
        ({}, RequestSettings(True, None)),
        ({"kv_transfer_params": {}, "x": 1}, RequestSettings(True, None)),
        ({"kv_compression": "on"}, RequestSettings(True, None)),
        ({"kv_compression": "snapkv"}, RequestSettings(True, None)),
        ({"kv_compression": None}, RequestSettings(True, None)),
        ({"kv_compression": "off"}, RequestSettings(False, None)),
        ({"kv_compression_budget": 512}, RequestSettings(True, 512)),
        ({"kv_compression_budget": 47}, RequestSettings(True, 47)),
        ({"kv_compression_usage": True}, RequestSettings()),
        ({"kv_compression_usage": 0}, RequestSettings()),  # JSON's false, by vLLM
        (
            {"kv_compression": "off", "kv_compression_budget": 128},
            RequestSettings(False, 128),
        ),
    ],
    ids=str,
)
def test_accepted(extra_args, wanted):
    assert request_settings(extra_args, FIXED, 16) == wanted


def test_a_method_that_the_server_offers():
    offers = KVCompressionConfig.from_dict(
        {"method": "snapkv", "request_methods": ["keydiff"]}
    )
    chosen = request_settings({"kv_compression": "keydiff"}, offers, 16)
    assert chosen == RequestSettings(True, None, "keydiff")
    with pytest.raises(RequestError, match="'off', 'on', 'snapkv', 'keydiff'"):
        request_settings({"kv_compression": "knorm"}, offers, 16)


def test_layer_budgets_bound_a_request():
    layers = KVCompressionConfig.from_dict(
        {"method": "snapkv", "layer_budgets": [512, 128]}
    )
    assert request_settings({"kv_compression_budget": 512}, layers, 16).budget == 512
    with pytest.raises(RequestError, match="47 to 512"):
        request_settings({"kv_compression_budget": 513}, layers, 16)


def test_a_method_with_its_own_budget_takes_none():
    own = KVCompressionConfig.from_dict({"method": "pyramidinfer"})
    with pytest.raises(RequestError, match="none with pyramidinfer"):
        request_settings({"kv_compression_budget": 512}, own, 16)
    offers = KVCompressionConfig.from_dict(
        {"method": "pyramidkv", "request_methods": ["pyramidinfer"]}
    )
    asked = {"kv_compression_budget": 512}
    assert request_settings(asked, offers, 16).budget == 512
    with pytest.raises(RequestError, match="none with pyramidinfer"):
        request_settings({**asked, "kv_compression": "pyramidinfer"}, offers, 16)


def test_incremental_prompts_cannot_stay_whole():
    server = KVCompressionConfig.from_dict(
        {"method": "snapkv", "prefill": "incremental", "decode": {}}
    )
    assert request_settings({"kv_compression": "on"}, server, 16).enabled
    with pytest.raises(RequestError, match="'on', 'snapkv'"):
        request_settings({"kv_compression": "off"}, server, 16)


def test_keep_ratio_has_no_upper_bound():
    wanted = RequestSettings(True, 100_000)
    assert request_settings({"kv_compression_budget": 100_000}, SHARE, 16) == wanted


def test_unknown_block_size():
    wanted = RequestSettings(True, 32)
    assert request_settings({"kv_compression_budget": 32}, FIXED, None) == wanted


@pytest.mark.parametrize(
    ("extra_args", "told"),
    [
        ({"kv_compression": "nope"}, ["kv_compression='nope'", "'off'", "'snapkv'"]),
        ({"kv_compression": "streamingllm"}, ["'streamingllm'", "'snapkv'"]),
        ({"kv_compression": 0}, ["kv_compression=0", "'off'"]),
        ({"kv_compression": ["off"]}, ["kv_compression=['off']"]),
        ({"kv_compression_budget": 513}, ["=513", "47 to 512"]),
        ({"kv_compression_budget": 46}, ["=46", "47 to 512"]),
        ({"kv_compression_budget": 128.0}, ["=128.0", "whole numbers"]),
        ({"kv_compression_budget": "128"}, ["='128'", "whole numbers"]),
        ({"kv_compression_budget": True}, ["=True", "whole numbers"]),
        ({"kv_compression_usage": "true"}, ["_usage='true'", "true and false"]),
        ({"kv_compression_usage": 2}, ["_usage=2", "true and false"]),
        ({"kv_compression_usage": [1]}, ["_usage=[1]", "true and false"]),
        ({"kv_compression_window": 8}, ["kv_compression_window=8", "_budget"]),
    ],
    ids=str,
)
def test_refused(extra_args, told):
    with pytest.raises(RequestError) as caught:
        request_settings(extra_args, FIXED, 16)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.field in extra_args
    for part in told:
        assert part in message


@pytest.fixture(scope="module")
def hooked():
    pytest.importorskip("vllm")
    from vllm_kvcompress.engine import requests

    requests.install()
    requests.install()
    return requests


def vllm_config(additional_config):
    return SimpleNamespace(
        additional_config=additional_config,
        cache_config=SimpleNamespace(block_size=16),
    )


@pytest.mark.vllm
def test_bad_value_is_the_clients_fault(hooked):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    config = vllm_config({"kv_compression": FIXED.settings()})
    engine = SimpleNamespace(vllm_config=config)
    params = SamplingParams(extra_args={"kv_compression_budget": 5})
    for check in (
        lambda: InputProcessor._validate_params(engine, params, ("generate",)),
        lambda: AsyncLLM.generate(engine, "prompt", params, "id"),
    ):
        with pytest.raises(VLLMValidationError, match="kv_compression_budget=5"):
            check()


@pytest.mark.vllm
def test_a_session_that_might_never_fit_is_refused(hooked):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    async def prompts():
        yield "prompt"

    settings = {"prefill": "incremental", "decode": {"interval": 64}}
    config = KVCompressionConfig.from_dict({**FIXED.settings(), **settings})
    engine = SimpleNamespace(vllm_config=vllm_config({KEY: config.settings()}))
    with pytest.raises(VLLMValidationError, match="prefill='exact'"):
        AsyncLLM.generate(engine, prompts(), SamplingParams(), "id")


@pytest.mark.vllm
def test_engine_without_compression_is_left_alone(hooked):
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(extra_args={"kv_compression_budget": 5})
    hooked._check(vllm_config({}), params)


@pytest.mark.vllm
def test_parallel_samples_keep_their_settings():
    pytest.importorskip("vllm")
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.parallel_sampling import ParentRequest

    extra_args = {"kv_compression": "off"}
    params = SamplingParams(n=3, seed=1, extra_args=extra_args)
    request = SimpleNamespace(request_id="a", external_req_id="b", params=params)
    parent = ParentRequest(request)
    for index in range(3):
        assert parent.get_child_info(index)[1].extra_args == extra_args
