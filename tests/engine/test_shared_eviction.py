"""Eviction of KV that several layers read: all of them see what is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    VOCAB,
    Recording,
    chunks,
    engine,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from tests.engine.shared_models import Made, make
from tests.engine.shared_oracle import (
    Evicted,
    lckv_votes,
    llama_logprobs,
    yoco_logprobs,
)
from vllm_kvcompress import stats
from vllm_kvcompress.config import ConfigError
from vllm_kvcompress.engine.spec import CompressedAttentionSpec
from vllm_kvcompress.ops.select import select

WINDOW, KERNEL, COUNT = 16, 7, 12
SETTINGS = {"method": "snapkv", "budget": 96, "window": WINDOW, "kernel_size": KERNEL}
LENGTHS = [300, 231, 20, 97]


@pytest.fixture(scope="module", params=["cla2", "lckv", "yoco", "yoco_retention"])
def served(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, Made]]:
    model = make(request.param, tmp_path_factory.mktemp(request.param))
    exact = {k: v for k, v in model.exact.items() if k != "early_exit"}
    config = {"kv_compression": SETTINGS}
    with engine(model.path, additional_config=config, hf_overrides=exact) as llm:
        yield llm, model


def _logprobs(model: Made, tokens: list[int], evicted: Evicted) -> torch.Tensor:
    if hasattr(model.reference, "sequential"):
        return llama_logprobs(model.reference, tokens, evicted)
    return yoco_logprobs(model.reference, tokens, evicted)


def _evicted(llm: Any, record: Recording, length: int) -> Evicted | None:
    """What was kept of the one prompt that has run; None if it was left alone."""
    if not record.kept:
        return None
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    (block,) = {s.block_size for s in specs if isinstance(s, CompressedAttentionSpec)}
    return Evicted(length, list(record.kept), block)


def test_all_readers_see_the_kept_tokens(
    served: tuple[Any, Made], recording: Recording
) -> None:
    llm, model = served
    free = free_blocks(llm)
    before = stats(llm)["tokens_evicted"]
    alone = []
    for seed, length in enumerate(LENGTHS):
        recording.kept.clear()
        tokens = prompt(length, seed)
        (answer,) = generate(llm, [tokens], COUNT)
        evicted = _evicted(llm, recording, length)
        assert (evicted is None) == (length < SETTINGS["budget"])
        wanted = _logprobs(model, tokens + answer.tokens, evicted)
        error = (answer.logprobs - wanted[length - 1 : -1]).abs().max()
        assert error < 1e-4, length
        if evicted:
            dense = model.logprobs(tokens + answer.tokens)[length - 1 : -1]
            assert (answer.logprobs[0] - dense[0]).abs().max() < 1e-4
            assert (answer.logprobs[1:] - dense[1:]).abs().max() > 1e-2
        alone.append(answer)
    assert stats(llm)["tokens_evicted"] > before
    llm.reset_prefix_cache()
    with chunks(llm, 70):  # some decode while others are still being read
        together = generate(llm, [prompt(n, s) for s, n in enumerate(LENGTHS)], COUNT)
    for answer, same in zip(alone, together, strict=True):
        assert answer.near(same)
    assert free_blocks(llm) == free


METHODS = {
    "tova": {"budget": 96},
    "keydiff": {"budget": 96},
    "pyramidkv": {"budget": 96, "window": 16, "layers_per_tier": 1},
    "pyramidinfer": {"prune": False, "decay_ratio": 0.5, "min_context": 16},
    "ada_snapkv": {"budget": 96, "window": 16, "layers_per_tier": 1},
}


@pytest.mark.parametrize("name", ["cla2", "lckv"])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods(
    method: str, name: str, tmp_path: Path, recording: Recording
) -> None:
    made, length = make(name, tmp_path), 300
    tokens = prompt(length)
    config = {"kv_compression": {"method": method, **METHODS[method]}}
    with engine(made.path, additional_config=config, hf_overrides=made.exact) as llm:
        (answer,) = generate(llm, [tokens], 6)
        evicted = _evicted(llm, recording, length)
    assert evicted
    owners = len(made.reference.config.layer_map.writers)
    missing = owners - len(evicted.kept)  # PyramidInfer's lowest layer keeps all
    assert missing == (method == "pyramidinfer")
    everything = [torch.arange(evicted.end)] * 2
    evicted.kept = [everything] * missing + evicted.kept
    wanted = llama_logprobs(made.reference, tokens + answer.tokens, evicted)
    assert (answer.logprobs - wanted[length - 1 : -1]).abs().max() < 1e-4
    dense = made.logprobs(tokens + answer.tokens)[length - 1 : -1]
    assert (answer.logprobs - dense).abs().max() > 1e-2


def test_merging_is_refused(tmp_path: Path) -> None:
    made = make("cla2", tmp_path)
    config = {"kv_compression": {"method": "minicache"}}
    refused = pytest.raises(ConfigError, match="choose another method")
    with refused, engine(made.path, additional_config=config):
        pass


def test_all_readers_vote(served: tuple[Any, Made], recording: Recording) -> None:
    llm, model = served
    if not hasattr(model.reference, "sequential"):
        pytest.skip("the votes of YOCO's readers are those of CLA's")
    tokens = prompt(200, 7)
    llm.reset_prefix_cache()
    generate(llm, [tokens], 2)
    votes = lckv_votes(model.reference, tokens, WINDOW, KERNEL)
    assert len(votes) == len(recording.kept)
    for scores, kept in zip(votes, recording.kept, strict=True):
        candidates = scores[:, : 200 // BLOCK * BLOCK]
        assert torch.equal(select(candidates, kept.shape[1]), kept)


def _gemma(path: Path) -> Any:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3nTextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=128,
        hidden_size_per_layer_input=32,
        intermediate_size=[256] * 6,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=[*kinds, *kinds[-2:]],
        num_kv_shared_layers=2,
        sliding_window=32,
        max_position_embeddings=2048,
        activation_sparsity_pattern=[0.0] * 6,
        altup_num_inputs=2,
        laurel_rank=8,
        attn_implementation="eager",
    )
    model = Gemma3nForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


@torch.no_grad()
def test_gemma_reads_the_kept_tokens(tmp_path: Path, recording: Recording) -> None:
    """vLLM's own KV sharing: layer 5 has queries only, and reads layer 3."""
    model, length = _gemma(tmp_path), 300
    tokens = [token or 1 for token in prompt(length)]  # 0 is padding, all zeros
    config = {"kv_compression": {**SETTINGS, "budget": 64}}
    with engine(tmp_path, additional_config=config) as llm:
        (answer,) = generate(llm, [tokens], COUNT)
        assert stats(llm)["blocks_freed"] > 0
    (kept,) = recording.kept
    ids = torch.tensor([tokens + answer.tokens])
    size = ids.shape[1]
    visible = torch.ones(1, 4, size, size, dtype=torch.bool).tril()
    for head in range(4):
        lost = torch.ones(length // BLOCK * BLOCK, dtype=torch.bool)
        lost[kept[head // 2]] = False
        visible[:, head, length:, : len(lost)] &= ~lost
    near = torch.ones(1, 1, size, size, dtype=torch.bool).tril().triu(-31)
    lowest = torch.finfo(torch.float32).min
    masks = {
        "full_attention": torch.zeros(visible.shape).masked_fill(~visible, lowest),
        "sliding_attention": torch.zeros(near.shape).masked_fill(~near, lowest),
    }
    logits = model(ids, attention_mask=masks).logits[0].log_softmax(-1)
    assert (answer.logprobs - logits[length - 1 : -1]).abs().max() < 1e-4
    dense = model(ids).logits[0].log_softmax(-1)
    assert (answer.logprobs - dense[length - 1 : -1]).abs().max() > 1e-2
