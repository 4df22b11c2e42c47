"""Checkpoints as LCKV's authors publish them: their configuration, their names."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.conftest import VOCAB, engine
from tests.engine.shared_checks import check_all
from tests.engine.shared_models import LLAMA, make

pytestmark = pytest.mark.vllm

COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "use_cache": True,
    **LLAMA,
}
PUBLISHED = {
    "lckv": {
        "architectures": ["LCKVLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lckv.LCKVLlamaConfig",
            "AutoModelForCausalLM": "modeling_lckv.LCKVLlamaForCausalLM",
        },
        "model_type": "lckv-llama",
        "num_hidden_layers": 6,
        "layer_types": "0_4_4_4_4_5",
        "forward_passes": 7,
        "backward_passes": 2,
        "sliding_window": 4096,
        "use_sequential": False,
        "force_nodiag": False,
    },
    "opt": {
        "architectures": ["OptLlamaForCausalLM"],
        "model_type": "opt-llama",
        "num_hidden_layers": 5,
        "layer_types": "0_1_1_2_0",
        "target_layer": -2,
        "num_encoders": 8,
        "num_trained_encoders": 1,
        "train_kv": False,
    },
}
OWNERS = {"lckv": {0, 4, 5}, "opt": {0, 3, 4}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_format(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path)
    config = {**COMMON, **PUBLISHED[name], "vocab_size": VOCAB}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    attention, mlp = "self_attn.", "mlp."
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(config["num_hidden_layers"]):
        parts = [f"{attention}q_proj", f"{attention}o_proj"]
        parts += [f"{mlp}{part}_proj" for part in ("gate", "up", "down")]
        parts += ["input_layernorm", "post_attention_layernorm"]
        if layer in OWNERS[name]:
            parts += [f"{attention}k_proj", f"{attention}v_proj"]
        expected |= {f"model.layers.{layer}.{part}.weight" for part in parts}
    assert set(weights) == expected
    with engine(tmp_path, hf_overrides=made.exact) as llm:
        check_all(made, llm, [1, 9, 40])
