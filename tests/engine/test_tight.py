"""A pool far too small: preemption, resume and aborts, and every block comes back.

The rule for preempted requests: a resumed prompt is cut where it was cut before,
compressed there again, and the generated tokens are recomputed behind it. So its
kept tokens and its answer equal the unhurried run's up to the order of float
additions, which the tests bound.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import (
    BLOCK,
    Answer,
    engine,
    free_blocks,
    generate,
    preemptions,
    prompt,
    scheduler,
)
from vllm_kvcompress import stats
from vllm_kvcompress.budget import fit

POOL = 44
SETTINGS = {"method": "snapkv", "budget": 96, "window": 16}
LENGTHS = [900, 640, 333, 1025, 64, 480, 257, 700]


@pytest.fixture(scope="module")
def unhurried(llama: Any) -> list[Answer]:
    """Each request alone in ample space."""
    with engine(llama, additional_config={"kv_compression": SETTINGS}) as llm:
        return [generate(llm, [prompt(n, seed=n)], 150)[0] for n in LENGTHS]


@pytest.fixture(
    scope="module", params=[True, False], ids=["prefix-cache", "no-prefix-cache"]
)
def tight(llama: Any, unhurried: Any, request: Any) -> Iterator[Any]:
    with engine(
        llama,
        additional_config={"kv_compression": SETTINGS},
        enable_prefix_caching=request.param,
        num_gpu_blocks_override=POOL,
        max_model_len=1200,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        disable_log_stats=False,
    ) as llm:
        yield llm


def test_preempted_answers_equal_unhurried(tight: Any, unhurried: list[Answer]) -> None:
    before, preempted = free_blocks(tight), preemptions(tight)
    answers = generate(tight, [prompt(n, seed=n) for n in LENGTHS], 150)
    assert preempted, "the pool was not tight enough to test anything"
    assert stats(tight)["compressions"] > len(LENGTHS) - 1
    assert free_blocks(tight) == before
    for length, mine, theirs in zip(LENGTHS, answers, unhurried, strict=True):
        assert mine.near(theirs), length


def test_preempted_requests_are_told_of_one_life(tight: Any) -> None:
    from vllm import SamplingParams

    asked = SamplingParams(
        max_tokens=150,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_compression_usage": True},
    )
    preempted = preemptions(tight)
    prompts = [{"prompt_token_ids": prompt(n, seed=n)} for n in LENGTHS]
    outputs = tight.generate(prompts, asked, use_tqdm=False)
    assert any(preempted), "no compression was undone"
    for length, output in zip(LENGTHS, outputs, strict=True):
        told = output.kv_transfer_params["kv_compression"]
        freed = fit(length, SETTINGS["budget"], BLOCK).freed_blocks
        assert told == {
            "method": "snapkv",
            "skipped": None if freed else "short",
            "waited": 0,
            "compressions": int(freed > 0),
            "blocks_freed": freed,
            "logical_tokens": length + 149,
            "retained_tokens": length + 149 - freed * BLOCK,
            "retained_by_layer": None,
        }


def test_more_requests_run_at_once(tight: Any) -> None:
    """Uncompressed, two prompts of 18 blocks fill the pool."""
    running = []
    step = scheduler(tight).schedule

    def watching(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        running.append(len(scheduler(tight).running))
        return output

    scheduler(tight).schedule = watching
    try:
        prompts = [prompt(18 * BLOCK, seed=100 + i) for i in range(6)]
        generate(tight, prompts, 60)
        compressed, running[:] = max(running), []
        generate(tight, prompts, 60, extra_args={"kv_compression": "off"})
        stock = max(running)
    finally:
        scheduler(tight).schedule = step
    assert stock <= 2
    assert compressed >= 3 * stock / 2


def test_abort_storm(tight: Any, unhurried: list[Answer]) -> None:
    """Aborts in the middle of prefill and decode leak nothing."""
    from vllm import SamplingParams

    before = free_blocks(tight)
    rng = random.Random(0)
    llm_engine, finished = tight.llm_engine, {}
    alive: dict[str, int] = {}
    submitted = 0
    while submitted < 40 or alive:
        if submitted < 40 and rng.random() < 0.5:
            which = rng.randrange(len(LENGTHS))
            name = llm_engine.add_request(
                f"storm-{submitted}",
                {"prompt_token_ids": prompt(LENGTHS[which], seed=LENGTHS[which])},
                SamplingParams(
                    max_tokens=rng.choice([1, 5, 20, 40]),
                    temperature=0,
                    ignore_eos=True,
                    detokenize=False,
                ),
            )
            alive[name] = which
            submitted += 1
        if alive and rng.random() < 0.15:
            name = rng.choice(list(alive))
            llm_engine.abort_request([name], internal=True)
            del alive[name]
        for output in llm_engine.step():
            if output.finished:
                names = [n for n in alive if n.startswith(output.request_id)]
                for name in names:
                    finished[name] = (alive.pop(name), output.outputs[0].token_ids)
        if not llm_engine.has_unfinished_requests():
            alive.clear()
    assert free_blocks(tight) == before
    assert len(finished) > 10
    for which, tokens in finished.values():
        expected = unhurried[which].tokens
        assert list(tokens) == expected[: len(tokens)]


def test_pool_dry_is_counted_or_served(tight: Any) -> None:
    """Prompts that fill the pool find private blocks among their own."""
    before = free_blocks(tight)
    tokens = prompt(37 * BLOCK, seed=77)
    counted = stats(tight)["compressions"]
    generate(tight, [tokens], 4)
    assert stats(tight)["compressions"] == counted + 1
    assert free_blocks(tight) == before
