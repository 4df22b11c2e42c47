"""KV heads that hold unequally many tokens, against a dense model with the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import DenseLlama
from tests.engine.conftest import (
    BLOCK,
    Answer,
    engine,
    free_blocks,
    generate,
    prompt,
    save_lopsided,
    scheduler,
)
from vllm_kvcompress import stats
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.methods.snapkv import SnapKV
from vllm_kvcompress.ops.head_shares import head_shares

BUDGET, WINDOW = 160, 16
SETTINGS = {
    "method": "ada_snapkv",
    "budget": BUDGET,
    "window": WINDOW,
    "floor": 0.0,
    "request_methods": ["streamingllm"],
}
LENGTHS = [500, 90, 231, 640, 335]


@pytest.fixture(scope="module", params=[2, 4], ids=["GQA4", "GQA2"])
def model(request: Any, tmp_path_factory: Any) -> Path:
    return save_lopsided(tmp_path_factory.mktemp("heads"), kv_heads=request.param)


def visible(dense: DenseLlama, state: Any, tier_size: int) -> list[torch.Tensor] | None:
    """What is left of a prompt, ``[kv_heads, prompt]`` in each layer."""
    heads, length, head_size = state.keys[0].shape
    whole, tail = divmod(length, BLOCK)
    kept = (BUDGET - tail) // BLOCK
    if kept >= whole:
        return None
    snapkv = SnapKV(window=WINDOW)
    scores = [
        snapkv.score(
            state.queries[layer][length - WINDOW : length],
            state.keys[layer],
            None,
            Layer(layer, head_size**-0.5),
        )[:, : whole * BLOCK]
        for layer in range(dense.layers)
    ]
    masks = []
    for layer in range(dense.layers):
        first = layer // tier_size * tier_size
        tier = scores[first : first + tier_size]
        mask = torch.zeros(heads, length, dtype=torch.bool)
        mask[:, whole * BLOCK :] = True
        shares = head_shares(tier, kept * heads, BLOCK, 0.0)
        for head, share in enumerate(shares):
            row = scores[layer][head].tolist()
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))
            mask[head, best[: share * BLOCK]] = True
        masks.append(mask)
    return masks


def check(model: Path, length: int, answer: Answer, tier_size: int = 1) -> bool:
    """The answer is the dense model's; returns whether heads differ in it."""
    dense = DenseLlama(model)
    state = dense.prefill(prompt(length, seed=length))
    masks = visible(dense, state, tier_size)
    expected = dense.decode(state, answer.tokens, masks)
    assert float((expected - answer.logprobs).abs().max()) < 5e-4, length
    return masks is not None and any(mask.sum(1).unique().numel() > 1 for mask in masks)


@pytest.mark.parametrize("tier_size", [1, 2])
def test_logits_are_the_dense_models(model: Path, tier_size: int) -> None:
    """Mixed batches in chunks, then the same prompts from the prefix cache."""
    settings = {**SETTINGS, "layers_per_tier": tier_size}
    with engine(
        model,
        additional_config={"kv_compression": settings},
        max_num_batched_tokens=208,
    ) as llm:
        before = free_blocks(llm)
        prompts = [prompt(n, seed=n) for n in LENGTHS]
        counts = [40, 30, 45, 12, 37]
        for run in range(2):
            answers = generate(llm, prompts, counts)
            assert free_blocks(llm) == before
            assert run == 0 or answers[0].cached >= 400
            uneven = [
                check(model, n, a, tier_size)
                for n, a in zip(LENGTHS, answers, strict=True)
            ]
            assert any(uneven)
        tiers = 2 // tier_size
        assert stats(llm)["compressions"] == 2 * tiers * (len(LENGTHS) - 1)


def test_beside_requests_of_other_kinds(model: Path) -> None:
    """Uncompressed and evenly compressed requests run in the same batches."""
    from vllm import SamplingParams

    modes = ["on", "off", "streamingllm", "on"]
    lengths = [500, 500, 500, 335]
    sampling = [
        SamplingParams(
            max_tokens=24,
            temperature=0,
            detokenize=False,
            ignore_eos=True,
            extra_args={"kv_compression": mode},
        )
        for mode in modes
    ]
    prompts = [{"prompt_token_ids": prompt(n, seed=n)} for n in lengths]
    with engine(
        model,
        additional_config={"kv_compression": SETTINGS},
        enable_prefix_caching=False,
    ) as llm:
        before = free_blocks(llm)
        together = llm.generate(prompts, sampling, use_tqdm=False)
        assert free_blocks(llm) == before
        alone = [
            generate(llm, [p["prompt_token_ids"]], 24, extra_args=s.extra_args)[0]
            for p, s in zip(prompts, sampling, strict=True)
        ]
    for one, other in zip(together, alone, strict=True):
        assert list(one.outputs[0].token_ids) == other.tokens
    assert len({tuple(answer.tokens) for answer in alone[:3]}) == 3
    check(model, 500, alone[0])
    check(model, 335, alone[3])


def test_preempted_answers_are_the_dense_models(model: Path) -> None:
    lengths = [300, 260, 333, 1025, 64, 280, 257, 310]
    with engine(
        model,
        additional_config={"kv_compression": SETTINGS},
        num_gpu_blocks_override=80,
        max_model_len=1200,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        disable_log_stats=False,
    ) as llm:
        before, preempted = free_blocks(llm), set()
        original = scheduler(llm)._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.add(request.num_prompt_tokens)
            original(request, *args, **kwargs)

        scheduler(llm)._preempt_request = counting
        answers = generate(llm, [prompt(n, seed=n) for n in lengths], 120)
        assert preempted, "the pool was not tight enough to test anything"
        assert free_blocks(llm) == before
    for length, answer in zip(lengths, answers, strict=True):
        if length in preempted:
            check(model, length, answer)
