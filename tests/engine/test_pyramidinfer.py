"""PyramidInfer's pruned prefill, against a dense model that drops the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    engine,
    free_blocks,
    generate,
    prompt,
    save_llama,
)
from tests.pruned import Choice, PrunedLlama
from vllm_kvcompress import stats
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.ops.select import select

SETTINGS = {
    "method": "pyramidinfer",
    "decay_ratio": 0.6,
    "min_context": 16,
    "layers_per_tier": 1,
}
LAYERS = 4
LENGTHS = [500, 37, 200, 333]
COUNT = 12


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("deep"), layers=LAYERS)


def entering(settings: dict[str, Any], length: int) -> list[int]:
    """Tokens that enter each layer: the schedule's, rounded up to whole blocks."""
    scorer = KVCompressionConfig.from_dict(settings).scorer
    recent = 1 + int(0.2 * length)
    least = min(16, length - recent)
    wanted, found = length, [length]
    for _ in range(LAYERS - 1):
        context = int((wanted - recent) * scorer.decay_ratio)
        wanted = context + recent if context > least else wanted
        missing = -(wanted - length) // BLOCK * BLOCK
        found.append(length - missing)
    return found[:: settings["layers_per_tier"]]


def choice(settings: dict[str, Any], length: int) -> Choice:
    """What enters the next layer, by the scorer and a stable sort."""
    scorer = KVCompressionConfig.from_dict(settings).scorer
    wanted, tail = entering(settings, length), length % BLOCK

    def choose(layer: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        scores = scorer.score(
            queries[-scorer.queries_wanted(length) :],
            keys,
            None,
            Layer(layer, keys.shape[2] ** -0.5),
        )
        whole = keys.shape[1] - tail
        kept = select(scores[:1, :whole], wanted[layer + 1] - tail)[0]
        return torch.cat([kept, torch.arange(whole, keys.shape[1])])

    return choose


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_prefill_and_decode_are_the_dense_models(deep: Path, compiled: bool) -> None:
    with engine(
        deep,
        additional_config={"kv_compression": SETTINGS},
        enforce_eager=not compiled,
        max_num_batched_tokens=800,
        max_num_seqs=8,
    ) as llm:
        before = free_blocks(llm)
        answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
        assert free_blocks(llm) == before
        counted = stats(llm)
    dense = PrunedLlama(deep)
    for length, answer in zip(LENGTHS, answers, strict=True):
        expected = dense.answer(
            prompt(length, seed=length), answer.tokens, choice(SETTINGS, length)
        )
        held = entering(SETTINGS, length)
        assert dense.held() == [tokens + COUNT - 1 for tokens in held]
        assert float((expected - answer.logprobs).abs().max()) < 5e-4, length
    assert counted["tokens_evicted"] == sum(
        length - held for length in LENGTHS for held in entering(SETTINGS, length)
    )
    assert counted["tokens_evicted"] > 0


def test_without_pruning_only_kv_is_dropped(deep: Path) -> None:
    """The first token is then full attention's, at the price of a full prefill."""
    long = [prompt(500, seed=500)]
    settings = {**SETTINGS, "prune": False}
    with engine(deep, additional_config={"kv_compression": settings}) as llm:
        (kept,) = generate(llm, long, COUNT)
        evicted = stats(llm)["tokens_evicted"]
    with engine(deep) as llm:
        (stock,) = generate(llm, long, 1)
    with engine(
        deep,
        additional_config={"kv_compression": SETTINGS},
        max_num_batched_tokens=800,
        max_num_seqs=8,
    ) as llm:
        (pruned,) = generate(llm, long, 1)
    assert evicted == sum(500 - held for held in entering(SETTINGS, 500))
    first = kept.logprobs[0] - stock.logprobs[0]
    assert float(first.abs().max()) < 2e-4
    assert float((pruned.logprobs[0] - stock.logprobs[0]).abs().max()) > 1e-2


def test_a_prompt_too_long_for_one_step_is_read_whole(deep: Path) -> None:
    """It keeps as many tokens, chosen after a full prefill, and fills the cache."""
    prompts = [prompt(500, seed=500), prompt(100, seed=1)]
    with engine(
        deep,
        additional_config={"kv_compression": SETTINGS},
        max_num_batched_tokens=256,
        max_num_seqs=8,
    ) as llm:
        first = generate(llm, prompts, 2)
        again = generate(llm, prompts, 2)
        evicted = stats(llm)["tokens_evicted"]
    with engine(deep) as llm:
        stock = generate(llm, prompts, 1)
    assert float((first[0].logprobs[0] - stock[0].logprobs[0]).abs().max()) < 2e-4
    assert again[0].cached > 0
    assert again[1].cached == 0, "what was pruned must not be hit"
    assert evicted == 2 * sum(
        length - held for length in (500, 100) for held in entering(SETTINGS, length)
    )
