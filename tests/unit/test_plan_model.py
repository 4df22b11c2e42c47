"""Which layers store keys and values, of models whose figures are known."""

import pytest
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.models.configs import (
    ClaLlamaConfig,
    LCKVLlamaConfig,
    OptLlamaConfig,
    YocoConfig,
)
from vllm_kvcompress.tools.errors import ToolError
from vllm_kvcompress.tools.plan.methods import refusal
from vllm_kvcompress.tools.plan.model import ModelKV, model_kv
from vllm_kvcompress.tools.plan.pool import Pool

LLAMA2 = LlamaConfig()  # 7B, as transformers has it
LLAMA3 = LlamaConfig(num_key_value_heads=8, max_position_embeddings=131072)


def planned(config) -> ModelKV:
    return model_kv("a model", config)


def full_bytes(config, tokens: int, **changes) -> int:
    fields = {"dtype": "auto", "block_size": 16, "batched_tokens": 8192, **changes}
    pool = Pool(planned(config), **fields)
    return pool.held(tokens) * pool.block_bytes


def test_llama2_7b() -> None:
    assert full_bytes(LLAMA2, 32768) == 16 * 2**30
    assert full_bytes(LLAMA2, 131072) == 64 * 2**30


def test_grouped_queries() -> None:
    assert full_bytes(LLAMA3, 4096) == 4096 * 2**17  # 0.125 MiB per token
    assert full_bytes(LLAMA3, 4096, dtype="fp8") == 4096 * 2**16
    scales = 32 * 8 * 2 * 4
    for dtype, each in (("int8_per_token_head", 2**16), ("int4_per_token_head", 2**15)):
        assert full_bytes(LLAMA3, 4096, dtype=dtype) == 4096 * (each + scales)
    wide = LlamaConfig(num_key_value_heads=8, head_dim=256)
    assert full_bytes(wide, 4096) == 4096 * 2**18


def test_multi_query() -> None:
    (shape,) = {(x.kv_heads, x.elements) for x in planned(FalconConfig()).layers}
    assert shape == (1, 2 * 64)


def test_latent() -> None:
    model = planned(DeepseekV3Config())
    assert model.mla
    assert model.refusal is not None
    assert {(x.kv_heads, x.elements) for x in model.layers} == {(1, 576)}
    assert full_bytes(DeepseekV3Config(), 16) == 16 * 61 * 576 * 2


@pytest.mark.parametrize("tokens", [100, 1024, 1040, 5000, 131072])
def test_gemma3(tokens: int) -> None:
    """Of 34 layers every sixth sees all tokens, the others 1,024."""
    sizes = {"num_hidden_layers": 34, "num_key_value_heads": 4, "head_dim": 256}
    text = Gemma3TextConfig(**sizes, sliding_window=1024)
    model = planned(text)
    assert [layer.index for layer in model.full] == [5, 11, 17, 23, 29]
    # Of 29 sliding layers vLLM makes 6 groups of 5, so one layer is padding.
    window = range(max(0, tokens - 1023) // 16, -(-tokens // 16))
    blocks = -(-tokens // 16) + 6 * len(window)
    assert full_bytes(text, tokens) == blocks * 5 * 16 * 4 * 2 * 256 * 2
    assert model.refusal is None
    assert "look ahead" in str(planned(Gemma3Config(text_config=text)).refusal)


def test_mistral_v01() -> None:
    """All layers slide, so memory stops growing at the window."""
    first = MistralConfig(sliding_window=4096)
    assert planned(first).full == ()
    assert "sliding windows" in str(planned(first).refusal)
    assert full_bytes(first, 4096) == 4096 * 2**17
    assert full_bytes(first, 32768) == 4096 * 2**17
    later = MistralConfig(sliding_window=None)
    assert full_bytes(later, 32768) == 32768 * 2**17


def test_windows_that_are_switched_off() -> None:
    assert len(planned(Qwen2Config(sliding_window=4096)).full) == 32
    on = Qwen2Config(sliding_window=4096, use_sliding_window=True, max_window_layers=8)
    assert [layer.index for layer in planned(on).full] == list(range(8))


def test_chunks() -> None:
    model = planned(Llama4TextConfig())
    assert len(model.full) == 12
    assert {x.window for x in model.layers if x.chunked} == {8192}


def test_layers_that_read_others() -> None:
    model = planned(Gemma3nTextConfig())
    assert (model.num_layers, len(model.layers), len(model.full)) == (35, 20, 4)
    assert [layer.index for layer in model.layers if layer.shared] == [18, 19]


SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SANDWICH = "_".join(["0", *["20"] * 20, "21"])


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        (ClaLlamaConfig(num_hidden_layers=22, **SIZES), 11),
        (LCKVLlamaConfig(num_hidden_layers=22, layer_types=SANDWICH, **SIZES), 3),
        (OptLlamaConfig(num_hidden_layers=22, num_warmup_layers=2, **SIZES), 3),
        (YocoConfig(n_layers=22), 1),
        (YocoConfig(n_layers=22, sliding_window=1024), 1),
    ],
    ids=["cla2", "lckv-w2", "opt-w2", "yoco-retention", "yoco"],
)
def test_our_models(config, stored: int) -> None:
    model = planned(config)
    assert (len(model.full), model.num_layers) == (stored, 22)
    slides = isinstance(config, YocoConfig) and config.sliding_window is not None
    assert len(model.layers) - stored == 11 * slides
    assert model.refusal is None


def test_window_of_shared_layers() -> None:
    config = LCKVLlamaConfig(
        num_hidden_layers=4, layer_types="0s_2s_2s_3", sliding_window=64, **SIZES
    )
    assert [(x.index, x.window) for x in planned(config).layers] == [
        (0, 64),
        (2, 64),
        (3, None),
    ]
    config.layer_types = ["0", "2s", "2", "3"]
    assert "others read all of" in str(planned(config).refusal)


def test_states_are_named() -> None:
    for config, full in ((JambaConfig(), 4), (Qwen3NextConfig(), 12)):
        model = planned(config)
        assert len(model.layers) == full
        assert "state" in model.notes[0]


def test_refused_attention() -> None:
    assert "sinks" in str(planned(GptOssConfig()).refusal)
    assert "ALiBi" in str(planned(MptConfig()).refusal)
    assert planned(LLAMA3).refusal is None


@pytest.mark.parametrize("config", [MambaConfig(), T5Config()])
def test_nothing_to_plan(config) -> None:
    with pytest.raises(ToolError, match=r"no attention|encoder-decoder"):
        planned(config)


def test_unknown_layers() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "telepathy"]
    with pytest.raises(ToolError, match="telepathy"):
        planned(config)


@pytest.mark.parametrize(("part", "prunes"), [("llama", True), ("phi", False)])
def test_multimodal_models_are_pruned_as_their_part(part: str, prunes: bool) -> None:
    pool = Pool(planned(LlavaConfig(text_config={"model_type": part})), "auto", 16, 64)
    config = KVCompressionConfig.from_dict({"method": "pyramidinfer"})
    reason = refusal(pool, config)
    assert reason is None if prunes else "cannot prune" in str(reason)
