"""Chunks, batches, prefix hits, preemption and aborts change no kept set."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    Recording,
    chunks,
    engine,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from vllm_kvcompress import stats

WINDOW, BUDGET = 16, 64
SETTINGS = {"method": "snapkv", "budget": BUDGET, "window": WINDOW, "kernel_size": 5}


@pytest.fixture(scope="module")
def llm(llama: Any) -> Iterator[Any]:
    with engine(
        llama,
        additional_config={"kv_compression": SETTINGS},
        max_num_batched_tokens=512,
    ) as e:
        yield e


@pytest.fixture(autouse=True)
def _clean(llm: Any) -> Iterator[None]:
    """Start with an empty prefix cache, and leave no block behind."""
    assert scheduler(llm).reset_prefix_cache()
    before = free_blocks(llm)
    yield
    assert free_blocks(llm) == before
    assert all(
        block.ref_cnt == 0
        for block in scheduler(llm).kv_cache_manager.block_pool.blocks
        if not block.is_null
    )


def test_every_chunk_size(llm: Any, recording: Recording) -> None:
    length = 4 * BLOCK + 3
    tokens = prompt(length, seed=1)
    (whole,) = generate(llm, [tokens], 4)
    kept = list(recording.kept)
    for chunk in range(1, length + 1):
        scheduler(llm).reset_prefix_cache()
        recording.kept.clear()
        with chunks(llm, chunk):
            (answer,) = generate(llm, [tokens], 4)
        assert answer.near(whole), chunk
        assert len(kept) == len(recording.kept)
        for mine, theirs in zip(recording.kept, kept, strict=True):
            assert torch.equal(mine, theirs), chunk


def test_mixed_batch_equals_alone(llm: Any) -> None:
    lengths = [333, 40, 200, BUDGET, 128, 500, 95, 257]
    prompts = [prompt(n, seed=n) for n in lengths]
    alone = []
    for tokens in prompts:
        alone += generate(llm, [tokens], 20)
        scheduler(llm).reset_prefix_cache()
    together = generate(llm, prompts, 20)
    assert all(a.near(b) for a, b in zip(alone, together, strict=True))


def test_prefix_hits(llm: Any, recording: Recording) -> None:
    """Hits reach up to the window; what is kept is the same as on a miss."""
    base = prompt(10 * BLOCK, seed=5)
    (first,) = generate(llm, [base], 8)
    missed, recording.kept = recording.kept, []
    (again,) = generate(llm, [base], 8)
    assert again.cached == (10 * BLOCK - WINDOW) // BLOCK * BLOCK == 9 * BLOCK
    assert again.near(first)
    assert all(torch.equal(a, b) for a, b in zip(recording.kept, missed, strict=True))
    longer = [*base, *prompt(40, seed=6)]
    (hit,) = generate(llm, [longer], 8)
    assert hit.cached == 10 * BLOCK
    scheduler(llm).reset_prefix_cache()
    (miss,) = generate(llm, [longer], 8)
    assert miss.cached == 0
    assert hit.near(miss)


def test_compressed_blocks_are_never_hit(llm: Any) -> None:
    """A next turn reuses the prompt's exact blocks, not those of the answer."""
    base = prompt(5 * BLOCK + 7, seed=8)
    (first,) = generate(llm, [base], 3 * BLOCK)
    turn = [*base, *first.tokens, *prompt(9, seed=9)]
    (hit,) = generate(llm, [turn], 8)
    assert hit.cached == 5 * BLOCK
    scheduler(llm).reset_prefix_cache()
    (miss,) = generate(llm, [turn], 8)
    assert hit.near(miss)


def test_blocks_held(llm: Any) -> None:
    """A decoding request holds budget // block blocks and its new tail."""
    from vllm import SamplingParams

    length = 12 * BLOCK
    sampling = SamplingParams(
        max_tokens=BLOCK, temperature=0, ignore_eos=True, detokenize=False
    )
    before = free_blocks(llm)
    llm.llm_engine.add_request(
        "held", {"prompt_token_ids": prompt(length, seed=3)}, sampling
    )
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        held.append(before - free_blocks(llm))
    # All blocks and the private ones while the step runs; freed in the next.
    assert held[0] == length // BLOCK + BUDGET // BLOCK
    assert set(held[1:-1]) == {BUDGET // BLOCK + 1}
    assert held[-1] == 0


def test_parallel_sampling(llm: Any) -> None:
    from vllm import SamplingParams

    counted = stats(llm)["compressions"]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt(300, seed=4)}],
        SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, detokenize=False),
        use_tqdm=False,
    )
    assert len(outputs[0].outputs) == 3
    assert stats(llm)["compressions"] == counted + 3


def test_penalties_and_prompt_logprobs(llm: Any) -> None:
    """Features that look at the prompt still see all of it."""
    from vllm import SamplingParams

    tokens = prompt(200, seed=11)
    (output,) = llm.generate(
        [{"prompt_token_ids": tokens}],
        SamplingParams(
            max_tokens=4,
            temperature=0,
            prompt_logprobs=1,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    assert len(output.prompt_logprobs) == len(tokens)


def test_per_request_settings(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    tokens = prompt(12 * BLOCK, seed=12)
    counted = stats(llm)
    (off,) = generate(llm, [tokens], 6, extra_args={"kv_compression": "off"})
    after = stats(llm)
    assert after["compressions"] == counted["compressions"]
    assert after["skipped"]["off"] == counted["skipped"].get("off", 0) + 1
    (on,) = generate(llm, [tokens], 6)
    assert not on.near(off)
    freed = stats(llm)["blocks_freed"] - after["blocks_freed"]
    generate(llm, [tokens], 6, extra_args={"kv_compression_budget": BUDGET - 16})
    lower = stats(llm)["blocks_freed"] - after["blocks_freed"] - freed
    assert lower == freed + 1
    for bad in ({"kv_compression_budget": BUDGET + 1}, {"kv_compression": "x"}):
        with pytest.raises(VLLMValidationError, match="kv_compression"):
            generate(llm, [tokens], 6, extra_args=bad)
    assert generate(llm, [tokens], 6)[0].near(on)


def test_short_prompts_are_left_alone(llm: Any) -> None:
    counted = stats(llm)
    generate(llm, [prompt(BUDGET, seed=2), prompt(5, seed=3)], 4)
    after = stats(llm)
    assert after["compressions"] == counted["compressions"]
    assert after["skipped"]["short"] == counted["skipped"].get("short", 0) + 2


def test_compress_again_with_the_same_request_id(llm: Any) -> None:
    """State of an aborted request does not reach its namesake."""
    from vllm import SamplingParams

    tokens = prompt(300, seed=21)
    (expected,) = generate(llm, [tokens], 8)
    sampling = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, detokenize=False
    )
    engine_ = llm.llm_engine
    for _ in range(2):
        name = engine_.add_request("same", {"prompt_token_ids": tokens}, sampling)
        engine_.step()
        engine_.step()
        engine_.abort_request([name], internal=True)
    engine_.add_request("same", {"prompt_token_ids": tokens}, sampling)
    while engine_.has_unfinished_requests():
        outputs = engine_.step()
    assert list(outputs[0].outputs[0].token_ids) == expected.tokens
