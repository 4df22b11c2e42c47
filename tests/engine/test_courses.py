"""Budgets by layer and over time, against a dense model that loses the same tokens.

What is kept, and when, is worked out here again, with loops over the dense model's
own queries and keys.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from tests.dense import Cut, DenseLlama
from tests.engine.conftest import (
    BLOCK,
    Recording,
    engine,
    free_blocks,
    generate,
    preemptions,
    prompt,
    scheduler,
)
from vllm_kvcompress import stats
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods.base import Layer, Scorer
from vllm_kvcompress.methods.knorm import KNorm
from vllm_kvcompress.ops.select import select

SNAPKV = {"method": "snapkv", "window": 16}
ADA = {"method": "ada_snapkv", "window": 16, "floor": 0.0, "layers_per_tier": 1}
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
    "heads": {**ADA, "budget": 160, "decode": {"interval": 48}},
    "heads, incremental": {
        **ADA,
        "budget": 128,
        "prefill": "incremental",
        "prefill_interval": 96,
        "decode": {"interval": 48, "budget": 96},
    },
    "layers by pyramidkv, decode by tova": {
        "method": "pyramidkv",
        "window": 16,
        "budget": 160,
        "decode": {"method": "tova", "interval": 32},
    },
    "prompt by keydiff, decode by rkv": {
        "method": "keydiff",
        "budget": 128,
        "decode": {"method": "rkv", "interval": 48, "budget": 96},
    },
    **{
        f"decode by {name}": {
            "method": name,
            "budget": 128,
            "decode": {"interval": 48},
        }
        for name in ("streamingllm", "tova", "keydiff", "knorm", "rkv", "random")
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


def cuts(
    settings: dict[str, Any], length: int, method: str | None = None
) -> tuple[dict[int, Cut], list[int]]:
    """What is lost when, and how many tokens a layer then holds at the end."""
    config = KVCompressionConfig.from_dict(settings)
    tiers = config.tiers(LAYERS)
    found: dict[int, Cut] = {}
    shift = [0] * LAYERS
    for due in dues(settings, length):
        stage = "decode" if due > length else method or config.method
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
    def cut(layer: int, queries: Any, keys: Any, values: Any) -> list[torch.Tensor]:
        count = keep[layer]
        if count is None:
            return [torch.arange(len(own)) for own in keys]
        window = queries[due - scorer.needs_queries : due]
        rated = Layer(layer, keys[0].shape[1] ** -0.5)
        # The same number behind the whole blocks of every head.
        tail = len(keys[0]) % BLOCK
        if scorer.uneven:
            parts, held = window.chunk(len(keys), 1), [own[None] for own in keys]
        else:
            parts, held = [window], [torch.stack(keys)]
        scores = [
            row[: len(row) - tail]
            for part, own in zip(parts, held, strict=True)
            for row in scorer.score(part, own, None, rated)
        ]
        counts = [count] * len(keys)
        if scorer.uneven:
            padded = pad_sequence(scores, batch_first=True, padding_value=-math.inf)
            shares = scorer.head_shares([padded], count * len(keys) // BLOCK, BLOCK)
            counts = [share * BLOCK for share in shares]
        return [
            torch.cat(
                [select(own[None], best)[0], torch.arange(len(own), len(own) + tail)]
            )
            for own, best in zip(scores, counts, strict=True)
        ]

    return cut


@pytest.fixture
def model(request: pytest.FixtureRequest, name: str) -> Path:
    """The model that a course is about."""
    return request.getfixturevalue("lopsided" if "heads" in name else "llama")


def check(
    dense: DenseLlama,
    settings: dict[str, Any],
    length: int,
    answer: Any,
    method: str | None = None,
) -> int:
    """The answer is the dense model's; returns the compressions behind it."""
    found, _ = cuts(settings, length, method)
    tokens = prompt(length, seed=length) + answer.tokens
    expected = dense.run(tokens, length, found)
    assert float((expected - answer.logprobs).abs().max()) < 5e-4, (length, list(found))
    return len(found)


@pytest.fixture(autouse=True)
def _equal_keys_are_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation leaves them so up to rounding, and then either might be dropped."""
    exact = KNorm.score
    monkeypatch.setattr(KNorm, "score", lambda *args: exact(*args).round(decimals=2))


@pytest.mark.parametrize("name", COURSES)
def test_logits_are_the_dense_models(
    model: Path, recording: Recording, name: str
) -> None:
    settings, dense = COURSES[name], DenseLlama(model)
    with engine(
        model,
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
    differ = [len({len(head) for head in layer}) > 1 for layer in recording.kept]
    assert any(differ) == ("heads" in name)


def tier_shifts(settings: dict[str, Any], length: int) -> list[int]:
    """Tokens lost by the end, once per KV cache group."""
    _, shift = cuts(settings, length)
    tiers = KVCompressionConfig.from_dict(settings).tiers(LAYERS)
    return [shift[tier[0]] for tier in tiers]


OVER_TIME = ["decode", "layers, decode", "incremental", "heads", "heads, incremental"]


def held(llm: Any) -> list[int]:
    """Collects how many blocks are in use after each step."""
    most: list[int] = []
    original = scheduler(llm).schedule
    usable = scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks - 1

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        most.append(usable - free_blocks(llm))
        return output

    scheduler(llm).schedule = schedule
    return most


@pytest.mark.parametrize("name", OVER_TIME)
def test_preemption_chunks_and_hits_change_nothing(model: Path, name: str) -> None:
    """When and what is lost depends on the request alone."""
    config = {"kv_compression": COURSES[name]}
    prompts = [prompt(n, seed=n) for n in [*LENGTHS, 410, 333]]
    with engine(model, additional_config=config, max_num_batched_tokens=512) as llm:
        unhurried = [generate(llm, [each], COUNT)[0] for each in prompts]
        hits = generate(llm, prompts, COUNT)
        assert hits[0].cached > 0
    for mine, theirs in zip(hits, unhurried, strict=True):
        assert mine.near(theirs)
    blocks = len(KVCompressionConfig.from_dict(COURSES[name]).tiers(LAYERS))
    with engine(
        model,
        additional_config=config,
        max_num_batched_tokens=64,
        max_model_len=640,
        num_gpu_blocks_override=21 * blocks,
    ) as llm:
        before, preempted = free_blocks(llm), preemptions(llm)
        tight = generate(llm, prompts, COUNT)
        assert free_blocks(llm) == before
    assert preempted or name == "incremental"
    for mine, theirs in zip(tight, unhurried, strict=True):
        assert mine.near(theirs)


@pytest.mark.parametrize("name", ["decode", "decode by keydiff", "decode by rkv"])
def test_a_generation_of_any_length_holds_bounded_memory(
    llama: Path, name: str
) -> None:
    settings = COURSES[name]
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        most = held(llm)
        generate(llm, [prompt(40)], 900)
        compressions = stats(llm)["compressions"]
    # budget 128 and 48 tokens between compressions; copies exist for one step.
    assert max(most) <= -(-(128 + 48) // BLOCK) + 128 // BLOCK + 1
    assert compressions >= 900 // 48 - 4


def test_a_prompt_longer_than_the_kv_space(llama: Path) -> None:
    """Stock vLLM does not even start; incremental compression serves it."""
    space = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 64}
    long = prompt(1900, seed=1)
    settings = COURSES["incremental"]
    with pytest.raises(ValueError, match="max seq len"), engine(llama, **space):
        pass
    with engine(llama, additional_config={"kv_compression": settings}, **space) as llm:
        before, most = free_blocks(llm), held(llm)
        (tight,) = generate(llm, [long], COUNT)
        assert free_blocks(llm) == before
        assert max(most) < 24
    with engine(llama, additional_config={"kv_compression": settings}) as llm:
        (roomy,) = generate(llm, [long], COUNT)
    assert tight.near(roomy)


def test_a_request_chooses_its_method(llama: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    server = {**SNAPKV, "budget": 128, "request_methods": ["streamingllm", "knorm"]}
    length = [prompt(500, seed=500)]
    with engine(llama, additional_config={"kv_compression": server}) as llm:
        chosen = {
            name: generate(llm, length, 12, extra_args={"kv_compression": name})[0]
            for name in ("streamingllm", "knorm", "on")
        }
        with pytest.raises(VLLMValidationError, match="'keydiff'.*'knorm'"):
            generate(llm, length, 12, extra_args={"kv_compression": "keydiff"})
    for name, answer in chosen.items():
        method = {"method": name} if name != "on" else SNAPKV
        alone = {"kv_compression": {**method, "budget": 128}}
        with engine(llama, additional_config=alone) as llm:
            assert generate(llm, length, 12)[0].near(answer), name


def test_uneven_heads_after_an_even_prompt(lopsided: Path) -> None:
    """Requests that choose an even method meet the server's while generating."""
    settings = {**COURSES["heads"], "request_methods": ["streamingllm"]}
    with engine(lopsided, additional_config={"kv_compression": settings}) as llm:
        prompts = [prompt(n, seed=n) for n in (500, 231)]
        chosen = {"kv_compression": "streamingllm"}
        answers = generate(llm, prompts, COUNT, extra_args=chosen)
    for length, answer in zip((500, 231), answers, strict=True):
        lost = check(DenseLlama(lopsided), settings, length, answer, "streamingllm")
        assert lost > 2
