"""Flags and settings of models that share KV, checked before an engine starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress import register
from vllm_kvcompress.config import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}
CLA = {**LLAMA, "architectures": ["ClaLlamaForCausalLM"], "model_type": "cla-llama"}
LCKV = {
    **LLAMA,
    "architectures": ["LCKVLlamaForCausalLM"],
    "model_type": "lckv-llama",
    "layer_types": "0_2_2_3",
}
YOCO = {
    "architectures": ["YocoForCausalLM"],
    "model_type": "yoco",
    "dim": 64,
    "n_layers": 4,
    "hidden_dim": 64,
    "n_self_heads": 2,
    "n_attn_heads": 2,
    "n_attn_kv_heads": 2,
    "vocab_size": 128,
    "max_seq_len": 1024,
    "sliding_window": 32,
    "torch_dtype": "float32",
}
MODELS = {"cla": CLA, "lckv": LCKV, "yoco": YOCO}


def _config(path: Path, model: dict[str, Any], **kwargs: Any) -> Any:
    register()
    from vllm.engine.arg_utils import EngineArgs

    (path / "config.json").write_text(json.dumps(model))
    args = EngineArgs(model=str(path), skip_tokenizer_init=True, **kwargs)
    return args.create_engine_config()


@pytest.mark.parametrize("name", MODELS)
def test_a_flag_that_is_true(name: str, tmp_path: Path) -> None:
    config = _config(tmp_path, MODELS[name], kv_compression=name)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls != "auto"
    assert "Compressed" not in config.parallel_config.worker_cls


@pytest.mark.parametrize("flag", MODELS)
@pytest.mark.parametrize("model", ["llama", *MODELS])
def test_a_flag_that_is_not(flag: str, model: str, tmp_path: Path) -> None:
    if flag == model:
        return
    given = MODELS.get(model, LLAMA)
    with pytest.raises(ConfigError, match=f"{flag} needs a model that is built so"):
        _config(tmp_path, given, kv_compression=flag)


def test_an_architecture_has_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no settings; drop budget"):
        _config(
            tmp_path,
            CLA,
            kv_compression="cla",
            kv_compression_config={"budget": 64},
        )


@pytest.mark.parametrize("name", MODELS)
def test_eviction_may_come_on_top(name: str, tmp_path: Path) -> None:
    settings = {"method": "snapkv", "budget": 512}
    config = _config(
        tmp_path, MODELS[name], additional_config={"kv_compression": settings}
    )
    assert config.parallel_config.worker_cls.endswith("CompressedCPUWorker")


def test_prefixes_are_cached_where_they_are_exact(tmp_path: Path) -> None:
    exact = {"hf_overrides": {"use_sequential": True}}
    asked = {"enable_prefix_caching": True}
    for model, options, cached in [
        (CLA, {}, True),
        (YOCO, {}, True),
        (LCKV, {}, False),
        (LCKV, exact, True),
        (LCKV, {**exact, **asked}, True),
        (LCKV, {"enable_prefix_caching": False}, False),
    ]:
        config = _config(tmp_path, model, **options)
        assert config.cache_config.enable_prefix_caching == cached
    with pytest.raises(ConfigError, match="add --hf-overrides .*use_sequential"):
        _config(tmp_path, LCKV, **asked)


@pytest.mark.parametrize("name", MODELS)
def test_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="KV offloading on CPUs"):
        _config(tmp_path, MODELS[name], kv_offloading_size=1.0)
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ConfigError, match="the KV connector ExampleConnector"):
        _config(tmp_path, MODELS[name], kv_transfer_config=example)


def test_what_yoco_does_not_do(tmp_path: Path) -> None:
    from vllm_kvcompress.engine.shared_models import prompt_logprobs_refusal

    config = _config(tmp_path, YOCO)
    assert "early_exit" in (prompt_logprobs_refusal(config) or "")
    config = _config(tmp_path, YOCO, hf_overrides={"early_exit": False})
    assert prompt_logprobs_refusal(config) is None
    retention = _config(tmp_path, {**YOCO, "sliding_window": None})
    assert retention.model_config.architecture == "YocoRetentionForCausalLM"
    assert retention.model_config.is_hybrid
