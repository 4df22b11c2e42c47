"""Budgets by layer and over time, against a dense model that loses the same tokens.

What is kept, and when, is worked out here again, with loops over the dense model's
own queries and keys.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import Cut, DenseLlama
from tests.engine.conftest import (
    BLOCK,
    engine,
    free_blocks,
    generate,
    prompt,
)
from vllm_kvcompress import stats
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods.base import Layer, Scorer
from vllm_kvcompress.ops.select import select

SNAPKV = {"method": "snapkv", "window": 16}
COURSES: dict[str, dict[str, Any]] = {
    "decode": {**SNAPKV, "budget": 128, "decode": {"interval": 48}},
    "decode alone": {
        **SNAPKV,
        "keep_ratio": 1.0,
        "decode": {"method": "streamingllm", "interval": 32, "budget": 160},
    },
    "layers": {**SNAPKV, "layer_budgets": [256, 64], "decode": {"interval": 32}},
    "layers, decode": {
        "method": "pyramidkv",
        "window": 16,
        "budget": 160,
        "layers_per_tier": 1,
        "decode": {"interval": 64},
    },
    "incremental": {
        **SNAPKV,
        "budget": 128,
        "prefill": "incremental",
        "prefill_interval": 96,
        "decode": {"interval": 48, "budget": 96},
    },
}
LENGTHS = [500, 90, 231, 96]
COUNT = 100
LAYERS = 2


def dues(settings: dict[str, Any], length: int) -> list[int]:
    """After how many tokens something may be lost."""
    found = []
    if settings.get("prefill") == "incremental":
        step = settings["prefill_interval"]
        found += [n for n in range(step, length, step) if n <= length - 16]
    found.append(length)
    if "decode" in settings:
        step = settings["decode"]["interval"]
        found += range(length + step, length + COUNT - 1, step)
    return found


def cuts(settings: dict[str, Any], length: int) -> tuple[dict[int, Cut], list[int]]:
    """What is lost when, and how many tokens a layer then holds at the end."""
    config = KVCompressionConfig.from_dict(settings)
    tiers = config.tiers(LAYERS)
    found: dict[int, Cut] = {}
    shift = [0] * LAYERS
    for due in dues(settings, length):
        stage = "decode" if due > length else config.method
        budgets = config.tier_budgets(stage, tiers, length, BLOCK)
        keep: list[int | None] = []
        for layer in range(LAYERS):
            budget = next(b for tier, b in budgets.items() if layer in tier)
            held = due - shift[layer]
            whole, tail = divmod(held, BLOCK)
            kept = (budget - tail) // BLOCK
            keep.append(kept * BLOCK if kept < whole else None)
            shift[layer] += max(0, whole - kept) * BLOCK
        if any(keep):
            found[due] = _cut(config.scorers[stage], keep, due)
    return found, shift


def _cut(scorer: Scorer, keep: list[int | None], due: int) -> Cut:
    def cut(layer: int, queries: Any, keys: Any, values: Any) -> torch.Tensor:
        held = keys.shape[1]
        everything = torch.arange(held).expand(keys.shape[0], -1)
        count = keep[layer]
        if count is None:
            return everything
        window = queries[due - scorer.needs_queries : due]
        scores = scorer.score(window, keys, values, Layer(layer, keys.shape[2] ** -0.5))
        whole = held // BLOCK * BLOCK
        return torch.cat([select(scores[:, :whole], count), everything[:, whole:]], 1)

    return cut


@pytest.fixture(scope="module")
def dense(llama: Path) -> DenseLlama:
    return DenseLlama(llama)


def check(dense: DenseLlama, settings: dict[str, Any], length: int, answer: Any) -> int:
    """The answer is the dense model's; returns the compressions behind it."""
    found, _ = cuts(settings, length)
    tokens = prompt(length, seed=length) + answer.tokens
    expected = dense.run(tokens, length, found)
    assert float((expected - answer.logprobs).abs().max()) < 5e-4, (length, list(found))
    return len(found)


@pytest.mark.parametrize("name", COURSES)
def test_logits_are_the_dense_models(llama: Path, dense: DenseLlama, name: str) -> None:
    settings = COURSES[name]
    with engine(
        llama,
        additional_config={"kv_compression": settings},
        max_num_batched_tokens=208,
    ) as llm:
        before = free_blocks(llm)
        answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
        assert free_blocks(llm) == before
        counted = stats(llm)
    lost = [check(dense, settings, n, a) for n, a in zip(LENGTHS, answers, strict=True)]
    assert counted["compressions"] >= sum(lost) > 0
    freed = sum(shift for n in LENGTHS for shift in tier_shifts(settings, n))
    assert counted["tokens_evicted"] == freed


def tier_shifts(settings: dict[str, Any], length: int) -> list[int]:
    """Tokens lost by the end, once per KV cache group."""
    _, shift = cuts(settings, length)
    tiers = KVCompressionConfig.from_dict(settings).tiers(LAYERS)
    return [shift[tier[0]] for tier in tiers]
