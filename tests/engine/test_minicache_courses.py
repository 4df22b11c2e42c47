"""What MiniCache leaves as it is, what it holds, and that only a request decides."""

from collections.abc import Iterator
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
    preemptions,
    prompt,
    save_llama,
    scheduler,
)
from tests.merged import Merges
from vllm_kvcompress import stats

COUNT, LAYERS = 80, 4
LENGTHS = [500, 90, 231, 97]
SELECTED = {
    "method": "minicache",
    "over": {"method": "snapkv", "window": 16},
    "budget": 192,
    "interval": 32,
}
COURSES: dict[str, dict[str, Any]] = {
    "alone": {"method": "minicache", "interval": 48},
    "selected": SELECTED,
}


class Watch:
    """Looks at the scheduler's blocks after each step.

    Attributes:
        used: Blocks that are in use.
        private: Whether any private block has ever been hashed.
        pages: Layer -> its pages of the first request's prompt, at the latest step.
    """

    def __init__(self, llm: Any, whole: int = 0) -> None:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self._layers = runner.vllm_config.compilation_config.static_forward_context
        self._scheduler, self._whole = scheduler(llm), whole
        self.used: list[int] = []
        self.hashed = False
        self.pages: dict[str, torch.Tensor] = {}
        self._original = self._scheduler.update_from_output
        self._scheduler.update_from_output = self._look

    def _look(self, *args: Any, **kwargs: Any) -> Any:
        found = self._original(*args, **kwargs)
        cache = self._scheduler.kv_cache_manager
        pool = cache.block_pool
        if self._scheduler.running:
            self.used.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        managers = cache.coordinator.single_type_managers
        groups = self._scheduler.kv_cache_config.kv_cache_groups
        for manager, group in zip(managers, groups, strict=True):
            for state in getattr(manager, "_compressed", {}).values():
                self.hashed |= any(block.block_hash for block in state.destination)
            for blocks in list(manager.req_to_blocks.values())[:1]:
                ids = [b.block_id for b in blocks[: self._whole] if not b.is_null]
                for name in group.layer_names if len(ids) == self._whole else ():
                    self.pages[name] = self._layers[name].kv_cache[ids].clone()
        return found


@pytest.fixture(scope="module")
def stock(deep_llama: Path) -> Iterator[tuple[list[Answer], dict[str, torch.Tensor]]]:
    """vLLM's own answers, and its pages of the first prompt."""
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    with engine(deep_llama) as llm:
        watch = Watch(llm, LENGTHS[0] // BLOCK)
        (first,) = generate(llm, prompts[:1], COUNT)
        yield [first, *generate(llm, prompts[1:], COUNT)], watch.pages


def test_what_does_not_merge_is_stocks(deep_llama: Path, stock: Any) -> None:
    """Pages of lower layers bit for bit, and the first token."""
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    config = {"kv_compression": COURSES["alone"]}
    with engine(deep_llama, additional_config=config) as llm:
        watch = Watch(llm, LENGTHS[0] // BLOCK)
        (first,) = generate(llm, prompts[:1], COUNT)
        answers = [first, *generate(llm, prompts[1:], COUNT)]
    lower = [name for name in stock[1] if int(name.split(".")[2]) < LAYERS // 2]
    assert len(lower) == LAYERS // 2
    for name in lower:
        assert watch.pages[name].equal(stock[1][name]), name
    for mine, theirs in zip(answers, stock[0], strict=True):
        assert mine.logprobs[0].equal(theirs.logprobs[0])
    assert not any(a.same(b) for a, b in zip(answers, stock[0], strict=True))


def test_all_retained_is_stock(deep_llama: Path, stock: Any) -> None:
    settings = {"method": "minicache", "retain": 1.0, "interval": None}
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    with engine(deep_llama, additional_config={"kv_compression": settings}) as llm:
        answers = generate(llm, prompts[:1], COUNT)
        answers += generate(llm, prompts[1:], COUNT)
        assert stats(llm)["compressions"] == 0
    assert all(a.same(b) for a, b in zip(answers, stock[0], strict=True))


def test_a_generated_token_is_exact_until_its_merge(deep_llama: Path) -> None:
    found = []
    for interval in (48, None):
        config = {"kv_compression": {"method": "minicache", "interval": interval}}
        with engine(deep_llama, additional_config=config) as llm:
            found += generate(llm, [prompt(231, seed=1)], COUNT)
    merged, exact = (answer.logprobs for answer in found)
    assert merged[: 48 + 1].equal(exact[: 48 + 1])
    assert not merged[48 + 1].equal(exact[48 + 1])


def test_a_last_layer_stays_alone(tmp_path: Path) -> None:
    model, settings = save_llama(tmp_path, layers=5), COURSES["alone"]
    with engine(model, additional_config={"kv_compression": settings}) as llm:
        assert len(scheduler(llm)._planner.owners) == 1
        answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
    dense = DenseLlama(model)
    for length, answer in zip(LENGTHS, answers, strict=True):
        tokens = prompt(length, seed=length) + answer.tokens
        found = Merges(settings, 5, length, COUNT, BLOCK)
        expected = dense.run(tokens, length, found.cuts, found.edits)
        assert float((expected - answer.logprobs).abs().max()) < 5e-4, length


@pytest.mark.parametrize("name", COURSES)
def test_a_request_holds_what_the_formula_says(deep_llama: Path, name: str) -> None:
    """The product of both ratios; two lone groups, one of each kind of a pair."""
    settings, length = {**COURSES[name], "interval": None}, 500
    with engine(deep_llama, additional_config={"kv_compression": settings}) as llm:
        watch = Watch(llm)
        generate(llm, [prompt(length)], 8)
        counted = stats(llm)
    found = Merges(settings, LAYERS, length, 8, BLOCK)
    whole, kept, apart = length // BLOCK, found.kept, found.retained
    assert (whole, kept, apart) == (15, 15 if name == "alone" else 5, 1)
    held = 2 * kept + kept + apart
    assert watch.used[-1] == held + LAYERS  # and a tail each
    assert counted["blocks_freed"] == LAYERS * whole - held
    assert counted["tokens_merged"] == (kept - apart) * BLOCK
    assert counted["tokens_evicted"] == LAYERS * (whole - kept) * BLOCK


@pytest.mark.parametrize("name", COURSES)
def test_preemption_chunks_and_hits_change_nothing(deep_llama: Path, name: str) -> None:
    """When and what merges depends on the request alone."""
    config = {"kv_compression": COURSES[name]}
    # The shortest first: several then grow at once.
    prompts = [prompt(n, seed=n) for n in sorted([*LENGTHS, 100, 410, 333])]
    roomy = {"additional_config": config, "max_num_batched_tokens": 512}
    with engine(deep_llama, **roomy) as llm:
        watch = Watch(llm)
        unhurried = [generate(llm, [each], COUNT)[0] for each in prompts]
        hits = generate(llm, prompts, COUNT)
        assert hits[0].cached > 0
        assert not watch.hashed
    for mine, theirs in zip(hits, unhurried, strict=True):
        assert mine.near(theirs)
    with engine(
        deep_llama,
        additional_config=config,
        max_num_batched_tokens=64,
        max_model_len=640,
        num_gpu_blocks_override=21 * LAYERS,
    ) as llm:
        before, preempted = free_blocks(llm), preemptions(llm)
        tight = generate(llm, prompts, COUNT)
        assert free_blocks(llm) == before
    assert any(preempted)
    for mine, theirs in zip(tight, unhurried, strict=True):
        assert mine.near(theirs)


def test_a_budget_without_a_whole_block(deep_llama: Path) -> None:
    """A long tail leaves nothing to merge."""
    over = {"method": "streamingllm", "sinks": 0}
    settings = {"method": "minicache", "over": over, "budget": BLOCK, "interval": None}
    with engine(deep_llama, additional_config={"kv_compression": settings}) as llm:
        before = free_blocks(llm)
        generate(llm, [prompt(3 * BLOCK - 1)], 8)
        assert free_blocks(llm) == before
        counted = stats(llm)
    assert counted["tokens_merged"] == 0
    assert counted["tokens_evicted"] == LAYERS * 2 * BLOCK
