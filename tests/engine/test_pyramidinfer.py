"""PyramidInfer against a dense model that drops the same tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    engine,
    free_blocks,
    generate,
    preemptions,
    prompt,
    save_llama,
)
from tests.pruned import ONE_STEP, Choice, PrunedLlama, Shed
from vllm_kvcompress import stats
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.ops.select import select

Tensor = torch.Tensor
SETTINGS: dict[str, Any] = {
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
    """Tokens that enter each layer: the schedule's, in sum to the nearest block."""
    scorer = KVCompressionConfig.from_dict(settings).scorer
    recent = 1 + int(0.2 * length)
    least = min(16, length - recent)
    wanted = [length]
    for _ in range(LAYERS - 1):
        context = int((wanted[-1] - recent) * scorer.decay_ratio)
        wanted.append(context + recent if context > least else wanted[-1])
    held = [length % BLOCK] * LAYERS
    while sum(wanted) - sum(held) >= BLOCK // 2:
        held[max(range(LAYERS), key=lambda layer: wanted[layer] - held[layer])] += BLOCK
    protected = recent + 4 + 1
    return [tokens if tokens >= protected else tokens + BLOCK for tokens in held]


def choice(
    settings: dict[str, Any], length: int, wanted: list[int] | None = None
) -> Choice:
    """What enters the next layer, by the scorer and a stable sort."""
    scorer = KVCompressionConfig.from_dict(settings).scorer
    wanted, tail = wanted or entering(settings, length), length % BLOCK

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
        **ONE_STEP,
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


def test_the_lowest_tier_loses_what_it_has_computed(deep: Path) -> None:
    """Tiers of two layers: nobody has pruned the lowest one's tokens before it."""
    settings, length = {**SETTINGS, "layers_per_tier": 2}, 500
    with engine(
        deep,
        additional_config={"kv_compression": settings},
        **ONE_STEP,
    ) as llm:
        (answer,) = generate(llm, [prompt(length)], COUNT)
    config, dense = KVCompressionConfig.from_dict(settings), PrunedLlama(deep)
    budgets = config.tier_budgets("pyramidinfer", config.tiers(LAYERS), length, BLOCK)
    low, high = budgets.values()
    assert length > low > high

    def choose(layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        def best(count: int) -> Tensor:
            return choice(settings, length, [count] * LAYERS)(layer, queries, keys)

        if layer < 2:
            dense.lose(layer, best(low))
        return best(high) if layer == 1 else torch.arange(keys.shape[1])

    expected = dense.answer(prompt(length), answer.tokens, choose)
    assert dense.held() == [n + COUNT - 1 for n in (low, low, high, high)]
    assert float((expected - answer.logprobs).abs().max()) < 5e-4


def shedding(length: int, interval: int) -> Shed:
    """What generated tokens stay, as published, but by whole blocks; with loops."""
    tokens = [length] * LAYERS
    lost, decided = [0] * LAYERS, [length] * LAYERS

    def shed(layer: int, queries: Tensor, keys: Tensor) -> Tensor | None:
        tokens[layer] += 1
        recent = 1 + int(0.2 * tokens[layer])
        left = max(0, tokens[layer] - recent - length) // interval
        share = 0.9 * (1 + math.cos(math.pi * layer / LAYERS)) / 2 + 0.1
        each = interval - max(1, int(interval * 0.9 * share))
        go = left * each // BLOCK * BLOCK - lost[layer]
        if go == 0:
            return None
        held = keys.shape[1]
        missing = tokens[layer] - held
        votes = torch.zeros(held)
        heads, group = queries.shape[1], queries.shape[1] // keys.shape[0]
        for row, query in enumerate(queries[-recent:]):
            seen = held - recent + row + 1
            for head in range(heads):
                logits = keys[head // group, :seen] @ query[head] * 32**-0.5
                weight = 1 + 0.2 * row / (recent - 1)
                votes[:seen] += weight * logits.softmax(0) / heads / recent
        first, end = decided[layer] - missing, held - recent
        worst = votes[first:end].argsort()[:go] + first
        lost[layer] += go
        decided[layer] = end + missing
        stay = torch.ones(held, dtype=torch.bool)
        stay[worst] = False
        return stay.nonzero()[:, 0]

    return shed


GENERATED = 330


@pytest.mark.parametrize("prune", [True, False], ids=["prune", "keep"])
def test_generated_tokens_go_as_published(deep: Path, prune: bool) -> None:
    """A share of every 16 tokens that leave the recent ones, less with depth."""
    settings = {**SETTINGS, "prune": prune, "decay_ratio": 0.6 if prune else 1.0}
    lengths = [150, 61]
    prompts = [prompt(n, seed=n) for n in lengths]
    config = {"kv_compression": settings}
    with engine(deep, additional_config=config, **ONE_STEP) as llm:
        before = free_blocks(llm)
        answers = generate(llm, prompts, GENERATED)
        assert free_blocks(llm) == before
        counted = stats(llm)
    held = 0
    for length, answer in zip(lengths, answers, strict=True):
        dense = PrunedLlama(deep)
        expected = dense.answer(
            prompt(length, seed=length),
            answer.tokens,
            choice(settings, length),
            shedding(length, 16),
        )
        assert float((expected - answer.logprobs).abs().max()) < 5e-4, length
        held += sum(dense.held())
        if not prune:  # nothing but generated tokens is lost, most of it high up
            assert length + GENERATED - 1 - dense.held()[-1] > GENERATED // 3
    everything = LAYERS * sum(n + GENERATED - 1 for n in lengths)
    assert counted["tokens_evicted"] == everything - held
    with engine(
        deep,
        additional_config=config,
        max_num_batched_tokens=224,
        max_num_seqs=8,
        max_model_len=512,
        num_gpu_blocks_override=72,
    ) as llm:
        before, preempted = free_blocks(llm), preemptions(llm)
        tight = generate(llm, prompts, GENERATED)
        assert free_blocks(llm) == before
    assert preempted
    for mine, theirs in zip(tight, answers, strict=True):
        assert mine.near(theirs)


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
        **ONE_STEP,
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
