"""Models that mix full attention with sliding windows: only the first shrinks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    VOCAB,
    engine,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from vllm_kvcompress import stats

BUDGET = 64
SETTINGS = {"method": "snapkv", "budget": BUDGET, "window": 16}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: Any) -> Path:
    """A random Gemma-3-like model: one full layer after two sliding ones."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hybrid")
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        layer_types=layer_types,
        max_position_embeddings=4096,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(5.0)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["snapkv", "ada_snapkv"])
def llm(request: Any, hybrid: Path) -> Iterator[Any]:
    settings = {**SETTINGS, "method": request.param}
    with engine(hybrid, additional_config={"kv_compression": settings}) as e:
        yield e


def test_groups(llm: Any) -> None:
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    names = [type(g.kv_cache_spec).__name__ for g in groups]
    assert names.count("CompressedAttentionSpec") == 1
    assert set(names) == {"CompressedAttentionSpec", "SlidingWindowSpec"}


def test_only_full_attention_is_compressed(llm: Any) -> None:
    before, counted = free_blocks(llm), stats(llm)
    prompts = [prompt(12 * BLOCK, seed=1), prompt(300, seed=2)]
    (first, second) = generate(llm, prompts, 20)
    after = stats(llm)
    assert after["compressions"] == counted["compressions"] + 2
    assert free_blocks(llm) == before
    again = generate(llm, prompts, 20)
    assert again[0].near(first) and again[1].near(second)
    (off,) = generate(llm, prompts[:1], 20, extra_args={"kv_compression": "off"})
    assert torch.allclose(off.logprobs[0], first.logprobs[0], atol=2e-4)
    assert not off.near(first)


def test_generous_budget_is_stock(hybrid: Path) -> None:
    prompts = [prompt(12 * BLOCK, seed=1), prompt(300, seed=2)]
    with engine(hybrid) as stock:
        expected = generate(stock, prompts, 12)
    generous = {**SETTINGS, "budget": 1000}
    with engine(hybrid, additional_config={"kv_compression": generous}) as e:
        answers = generate(e, prompts, 12)
    assert all(a.same(b) for a, b in zip(answers, expected, strict=True))
