"""What does not work with compression is refused before an engine starts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress import register
from vllm_kvcompress.config import ConfigError, KVCompressionConfig

SETTINGS = {"method": "snapkv", "budget": 256, "window": 32}
CUSTOM = {"method": "custom_class", "model": "somewhere.Proposer"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A Llama's config.json: enough for a configuration."""
    path = tmp_path_factory.mktemp("config")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings if "method" in settings else {**SETTINGS, **settings}


def _config(model: Path, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    register()
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        additional_config={"kv_compression": _settings(settings or {})},
        **{"block_size": 32, **kwargs},
    )
    return args.create_engine_config()


def test_accepted(model: Path) -> None:
    config = _config(model)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "CompressedScheduler"
    assert config.parallel_config.worker_cls.endswith("CompressedCPUWorker")
    assert config.additional_config["kv_compression"]["kernel_size"] == 7


def test_offloading_is_accepted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU; by the connector that can be used."""
    from vllm_kvcompress.engine import connectors

    device = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(connectors, "current_platform", device)
    transfer = _config(model, kv_offloading_size=2.0).kv_transfer_config
    assert transfer.kv_connector == "SimpleCPUOffloadConnector"
    assert transfer.kv_connector_extra_config["cpu_bytes_to_use"] == 2 * 2**30
    assert transfer.kv_role == "kv_both"
    with pytest.raises(ConfigError, match="KV offloading, method=minicache and"):
        _config(
            model,
            {"method": "minicache"},
            kv_offloading_size=2.0,
            kv_cache_dtype="int8_per_token_head",
        )


def test_drafts_are_accepted(model: Path) -> None:
    drafts = {"num_speculative_tokens": 2}
    for source in ({"method": "ngram"}, {"method": "draft_model", "model": str(model)}):
        config = _config(model, speculative_config={**drafts, **source})
        assert config.num_speculative_tokens == 2


@pytest.mark.parametrize(
    ("layers", "draft", "v2", "refused"),
    [
        (["a.0", "a.1"], ["d.0", "d.1"], False, False),
        (["a.0", "a.1"], ["d.0"], False, False),
        (["a.0"], ["d.0", "d.1"], False, True),
        (["a.0"], ["d.0", "d.1"], True, False),
    ],
)
def test_draft_models_have_one_group(
    monkeypatch: pytest.MonkeyPatch,
    layers: list[str],
    draft: list[str],
    v2: bool,
    refused: bool,
) -> None:
    register()
    from vllm_kvcompress.engine import layers as seam
    from vllm_kvcompress.engine.spec import CompressedAttentionSpec, DraftAttentionSpec

    monkeypatch.setattr(seam, "_unsupported", lambda layer: None)
    named = {name.replace(".", "_"): 2 for name in (*layers, *draft)}
    config = _model("snapkv", "FLASH_ATTN", **named)
    config.use_v2_model_runner = v2
    if refused:
        with pytest.raises(ConfigError, match="2 layers are cut to groups of 1"):
            seam.compress_layers(config, draft)
        return
    seam.compress_layers(config, draft)
    found = config.compilation_config.static_forward_context
    for name, layer in found.items():
        expected = DraftAttentionSpec if name in draft else CompressedAttentionSpec
        assert type(layer.get_kv_cache_spec(config)) is expected


@pytest.mark.parametrize(
    ("settings", "kwargs", "words"),
    [
        ({"budget": 50}, {}, ["budget=50", "at least 63", "--block-size"]),
        (
            {"method": "pyramidinfer"},
            {"pipeline_parallel_size": 2},
            ["--pipeline-parallel-size 2 and method=pyramidinfer", "prune=false"],
        ),
        (
            {},
            {"speculative_config": {**CUSTOM, "num_speculative_tokens": 2}},
            ["speculative decoding by custom_class", "ngram", "--speculative-config"],
        ),
        (
            {},
            {
                "pipeline_parallel_size": 2,
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            },
            ["--pipeline-parallel-size 2 and --speculative-config together"],
        ),
        (
            {"method": "pyramidinfer"},
            {"enable_lora": True},
            ["--enable-lora and method=pyramidinfer", "prune=false"],
        ),
        (
            {},
            {"kv_offloading_size": 1.0},
            ["KV offloading on CPUs", "drop --kv-offloading-size"],
        ),
        *(
            (
                {},
                {"kv_transfer_config": {"kv_connector": name, "kv_role": "kv_both"}},
                [f"the KV connector {name}; use SimpleCPUOffloadConnector"],
            )
            for name in ("OffloadingConnector", "ExampleConnector", "NixlConnector")
        ),
        (
            {},
            {"disable_hybrid_kv_cache_manager": True},
            ["--disable-hybrid-kv-cache-manager"],
        ),
        (
            {},
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            ["--scheduler-cls"],
        ),
        ({}, {"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill"]),
        ({}, {"long_prefill_token_threshold": 8}, ["chunks of 8", "window of 32"]),
        ({}, {"runner": "pooling"}, ["pooling models"]),
        (
            {},
            {"kv_cache_dtype": "int4_per_token_head"},
            ["int4_per_token_head and method=snapkv", "auto or fp8", "minicache"],
        ),
        (
            {"method": "ada_snapkv"},
            {"kv_cache_dtype": "int8_per_token_head"},
            ["int8_per_token_head and method=ada_snapkv", "auto or fp8"],
        ),
        (
            {},
            {"kv_cache_dtype": "fp8_e5m2"},
            ["--kv-cache-dtype fp8_e5m2", "auto"],
        ),
    ],
    ids=lambda value: "",
)
def test_refused(
    model: Path, settings: dict[str, Any], kwargs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        _config(model, settings, **kwargs)
    message = str(error.value)
    assert message.startswith("kv_compression does not work with ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("backend", "environment", "words"),
    [
        ("external_launcher", "1", ["external_launcher", "--pipeline-parallel-size 2"]),
        ("ray", "0", ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0", "leave it out"]),
    ],
)
def test_executors_that_hide_what_stages_did(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    environment: str,
    words: list[str],
) -> None:
    config = _config(model, {}, pipeline_parallel_size=2)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "CompressedScheduler"
    from vllm_kvcompress.engine.enable import enable

    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", environment)
    config.scheduler_config.scheduler_cls = None
    config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    config.parallel_config.distributed_executor_backend = backend
    with pytest.raises(ConfigError) as error:
        enable(config, KVCompressionConfig.from_dict(SETTINGS))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "own", "words"),
    [
        ({"method": "snapkv"}, [0, 1, 2], None),
        ({"method": "pyramidkv", "layers_per_tier": 6}, [0, 1, 2], None),
        ({"method": "minicache", "start_layer": 2}, [2, 3], None),
        ({"method": "minicache"}, [0, 1, 2], None),
        ({"method": "minicache"}, [3], ["minicache merges the layers 3, 4"]),
        ({"method": "ada_snapkv", "layers_per_tier": 3}, [0, 1, 2], None),
        ({"method": "ada_snapkv", "layers_per_tier": 2}, [0, 1, 2], ["layers 2, 3,"]),
    ],
    ids=str,
)
def test_layers_that_need_one_another_share_a_stage(
    settings: dict[str, Any], own: list[int], words: list[str] | None
) -> None:
    register()
    from vllm_kvcompress.engine.stages import check_stages

    budget = {} if settings["method"] == "minicache" else {"budget": 256}
    config = KVCompressionConfig.from_dict({**settings, **budget})
    layers = dict.fromkeys(own)
    if words is None:
        check_stages(config, layers, 6)
        return
    with pytest.raises(ConfigError) as error:
        check_stages(config, layers, 6)
    for word in [*words, "VLLM_PP_LAYER_PARTITION", "--pipeline-parallel-size 1"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def _model(method: str, backend: str, **layers: int) -> Any:
    """A configuration for a model with such layers and KV heads, on some backend."""
    import torch
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    class Layer(AttentionLayerBase):
        attn_backend = SimpleNamespace(get_name=lambda: backend)
        kv_cache_dtype = "auto"

        def __init__(self, layer_name: str, kv_heads: int) -> None:
            self.layer_name, self.num_kv_heads = layer_name, kv_heads

        def get_attn_backend(self) -> Any:
            return self.attn_backend

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return FullAttentionSpec(
                block_size=32,
                num_kv_heads=self.num_kv_heads,
                head_size=64,
                dtype=torch.float32,
            )

    named = {name.replace("_", "."): kv_heads for name, kv_heads in layers.items()}
    found = {name: Layer(name, kv_heads) for name, kv_heads in named.items()}
    return SimpleNamespace(
        additional_config={"kv_compression": {"method": method}},
        compilation_config=SimpleNamespace(static_forward_context=found),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1
        ),
    )


@pytest.mark.parametrize(
    ("backend", "layers", "words"),
    [
        ("FLASHINFER", {"layers_0": 2, "layers_1": 2}, ["FLASHINFER", "TRITON_ATTN"]),
        ("FLASH_ATTN", {"layers_0": 2, "layers_1": 2}, ["FLASH_ATTN", "TRITON_ATTN"]),
        ("TRITON_ATTN", {"layers_0": 2, "layers_1": 4}, ["layers.0 and layers.1"]),
        ("TRITON_ATTN", {"layers_0": 2, "layers_2": 2}, ["layers.0 and layers.2"]),
        ("TRITON_ATTN", {"layers_0": 2}, ["no two layers to merge among 1"]),
    ],
    ids=str,
)
def test_pairs_that_cannot_merge(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    layers: dict[str, int],
    words: list[str],
) -> None:
    register()
    from vllm_kvcompress.engine import layers as seam

    monkeypatch.setattr(seam, "_unsupported", lambda layer: None)
    config = _model("minicache", backend, **layers)
    config.additional_config["kv_compression"]["start_layer"] = 0
    with pytest.raises(ConfigError) as error:
        seam.compress_layers(config)
    assert "\n" not in str(error.value)
    for word in ["minicache", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("backend", "layout", "words"),
    [
        ("FLASHINFER", None, ["FLASHINFER", "--attention-backend", "FLASH_ATTN"]),
        ("FLASHINFER", "HND", ["FLASHINFER", "--attention-backend"]),
        ("TRITON_ATTN", "NHD", ["VLLM_KV_CACHE_LAYOUT=NHD", "HND"]),
    ],
)
def test_uneven_heads_need_one_head_pages(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    layout: str | None,
    words: list[str],
) -> None:
    register()
    from vllm_kvcompress.engine import layers

    monkeypatch.setattr(layers, "_unsupported", lambda layer: None)
    if layout:
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with pytest.raises(ConfigError) as error:
        layers.compress_layers(_model("ada_snapkv", backend, layers_0=2))
    assert "\n" not in str(error.value)
    for word in ["method=ada_snapkv", *words]:
        assert word in str(error.value)
