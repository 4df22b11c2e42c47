"""PyramidInfer prunes every family it says it does, like transformers' own layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import BLOCK, VOCAB, engine, generate, prompt
from tests.pruned import ONE_STEP
from vllm_kvcompress import stats
from vllm_kvcompress.config import ConfigError, KVCompressionConfig
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.ops.select import select

SETTINGS = {
    "method": "pyramidinfer",
    "decay_ratio": 0.6,
    "min_context": 16,
    "layers_per_tier": 2,
}
LAYERS, LENGTH = 4, 333
FAMILIES = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model of each family, with sharp attention."""
    import transformers

    name = request.param
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        **FAMILIES[name],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0) if weight.dim() > 1 else weight.uniform_(0.5, 2.0)
    path = tmp_path_factory.mktemp(name)
    model.save_pretrained(path)
    return path


@torch.inference_mode()
def pruned_by_hand(folder: Path, tokens: list[int]) -> tuple[torch.Tensor, int]:
    """Log-probabilities behind a prompt, and tokens that layers lack in sum of tiers.

    Transformers' layers run one by one on what is left; two make a tier.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    seen: dict[str, torch.Tensor] = {}

    def attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **kw: Any):
        seen.update(query=query[0].transpose(0, 1), key=key[0])
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kw["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("recording", attention)
    whole = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="recording", dtype=torch.float32
    )
    config = KVCompressionConfig.from_dict(SETTINGS)
    tiers = config.tiers(LAYERS)
    budgets = config.tier_budgets(config.method, tiers, len(tokens), BLOCK)
    scorer, model = config.scorer, whole.model
    positions = torch.arange(len(tokens))
    hidden = model.embed_tokens(torch.tensor([tokens]))
    lost = 0
    for tier in tiers:
        if tier[0]:
            scores = scorer.score(
                seen["query"][-scorer.queries_wanted(len(tokens)) :],
                seen["key"],
                None,
                Layer(tier[0] - 1, 32**-0.5),
            )
            tail = len(tokens) % BLOCK
            end = hidden.shape[1] - tail
            kept = select(scores[:1, :end], budgets[tier] - tail)[0]
            kept = torch.cat([kept, torch.arange(end, end + tail)])
            hidden, positions = hidden[:, kept], positions[kept]
        lost += len(tokens) - budgets[tier]
        for index in tier:
            hidden = model.layers[index](
                hidden,
                position_embeddings=model.rotary_emb(hidden, positions[None]),
                attention_mask=None,
            )
    logits = whole.lm_head(model.norm(hidden[0, -1]))
    return logits.log_softmax(-1), lost


def test_first_token_is_that_of_transformers_layers(folder: Path) -> None:
    tokens = prompt(LENGTH, seed=1)
    with engine(
        folder,
        additional_config={"kv_compression": SETTINGS},
        **ONE_STEP,
    ) as llm:
        (answer,) = generate(llm, [tokens], 2)
        counted = stats(llm)
    expected, lost = pruned_by_hand(folder, tokens)
    assert counted["tokens_evicted"] == lost > 0
    assert float((answer.logprobs[0] - expected).abs().max()) < 5e-4


def test_layers_of_two_kinds_are_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"]
    config.update(layer_types=kinds, sliding_window=64)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    settings = {"method": "pyramidinfer", "layers_per_tier": 1}
    config = {"kv_compression": settings}
    refused = pytest.raises(ConfigError, match="add prune=false")
    with refused, engine(tmp_path, additional_config=config):
        pass
    config = {"kv_compression": {**settings, "prune": False}}
    with engine(tmp_path, additional_config=config) as llm:
        generate(llm, [prompt(300)], 2)
