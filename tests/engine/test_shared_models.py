"""Models that share KV across layers answer as their definitions say, everywhere."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    VOCAB,
    blocks_held,
    chunks,
    engine,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from tests.engine.shared_models import RECIPES, Made, make

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
LENGTHS = [1, 2, 3, 17, 64, 100, 300]

Served = tuple[Made, Any]


@pytest.fixture(scope="module", params=RECIPES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Each model with an engine that reads prompts exactly and skips nothing."""
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(made.path, hf_overrides=made.exact) as llm:
        yield made, llm


def all_logits(
    llm: Any, prompts: list[list[int]], count: int
) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts with their answers, and log-probabilities after all tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=count,
        temperature=0.0,
        detokenize=False,
        logprobs=-1,
        prompt_logprobs=-1,
        ignore_eos=True,
    )
    given = [{"prompt_token_ids": tokens} for tokens in prompts]
    found = []
    for tokens, output in zip(
        prompts, llm.generate(given, params, use_tqdm=False), strict=True
    ):
        answer = output.outputs[0]
        rows = [*output.prompt_logprobs[1:], *answer.logprobs]
        whole = [*tokens, *answer.token_ids]
        assert len(rows) == len(whole) - 1
        logits = torch.tensor([[row[t].logprob for t in range(VOCAB)] for row in rows])
        found.append((whole, logits))
    return found


def check_all(made: Made, llm: Any, lengths: list[int], count: int = 8) -> None:
    """Compare the logits after all tokens, of prompts and answers."""
    before = free_blocks(llm)
    prompts = [prompt(n, seed=n) for n in lengths]
    for tokens, found in all_logits(llm, prompts, count):
        assert made.error(tokens, found) < TOLERANCE, len(tokens)
    assert free_blocks(llm) == before, "blocks leaked"


def check_answers(made: Made, prompts: list[list[int]], answers: list[Any]) -> None:
    """Compare the logits of answers alone."""
    for tokens, answer in zip(prompts, answers, strict=True):
        error = made.error([*tokens, *answer.tokens], answer.logprobs)
        assert error < TOLERANCE, len(tokens)


@contextmanager
def starved(llm: Any, blocks: int) -> Iterator[list[str]]:
    """Leave so many blocks in the pool; gives the requests that are preempted."""
    pool, own = scheduler(llm).kv_cache_manager.block_pool, scheduler(llm)
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - blocks)
    seen: list[str] = []
    preempt = own._preempt_request

    def listening(request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(request.request_id)
        preempt(request, *args, **kwargs)

    own._preempt_request = listening
    try:
        yield seen
    finally:
        own._preempt_request = preempt
        pool.free_blocks(taken)


@contextmanager
def steps(llm: Any) -> Iterator[list[dict[str, int]]]:
    """Records how many tokens of which request each step schedules."""
    own, seen = scheduler(llm), []
    schedule = own.schedule

    def listening(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen.append(dict(output.num_scheduled_tokens))
        return output

    own.schedule = listening
    try:
        yield seen
    finally:
        own.schedule = schedule


def test_all_logits_are_the_definitions(served: Served) -> None:
    made, llm = served
    with steps(llm) as seen:
        check_all(made, llm, LENGTHS)
    assert len(seen[0]) == len(LENGTHS)


@pytest.mark.parametrize("step", [64, 7])
def test_chunks(served: Served, step: int) -> None:
    """Small steps, in which some requests read while others already answer."""
    made, llm = served
    with chunks(llm, step), steps(llm) as seen:
        check_all(made, llm, [3, 1, 150], 12)
    last = max(step[name] for step in seen for name in step)
    assert last < 150
    mixed = [step for step in seen if len(step) > 1 and min(step.values()) == 1]
    assert any(max(step.values()) > 1 for step in mixed)


def test_preempted(served: Served) -> None:
    made, llm = served
    prompts = [prompt(n, seed=n) for n in (100, 103, 97, 101)]
    held = blocks_held(llm, prompt(100))
    with starved(llm, 2 * held + 1) as seen:
        answers = generate(llm, prompts, 70)
    assert seen
    check_answers(made, prompts, answers)


def test_prefix_hits(served: Served) -> None:
    """Of a whole prompt but for the token that must be read, and of a longer one."""
    made, llm = served
    start = prompt(257, seed=8)
    generate(llm, [start], 2)
    prompts = [start, [*start, *prompt(90, seed=9)]]
    hits = [256, 256]
    if len(scheduler(llm).kv_cache_config.kv_cache_groups) == 1:
        prompts.append([*start[:200], *prompt(90, seed=10)])
        hits.append(192)
    answers = generate(llm, prompts, 10)
    assert [answer.cached for answer in answers] == hits
    check_answers(made, prompts, answers)


@pytest.mark.parametrize(
    "name",
    [
        "lckv",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cla2", "lckv_targets", "yoco", "yoco_retention")
        ),
    ],
)
def test_compiled(name: str, tmp_path: Path) -> None:
    made = make(name, tmp_path)
    with engine(made.path, hf_overrides=made.exact, enforce_eager=False) as llm:
        check_all(made, llm, LENGTHS)
        with chunks(llm, 64):
            check_all(made, llm, [3, 1, 150], 12)


# Controls: what the tests above compare depends on what each layer reads.


def distance(made: Made, tokens: list[int], before: torch.Tensor) -> float:
    """How far the definition's logits are from those it gave ``before``."""
    return float((made.logprobs(tokens) - before).abs().max())


LLAMAS = [name for name in RECIPES if not name.startswith("yoco")]


@pytest.mark.parametrize("name", [n for n in LLAMAS if n != "lckv_no_warmup"])
def test_other_owners_would_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before, config = made.logprobs(tokens), made.reference.config
    found = config.layer_map
    wrong = [
        (*found.owners[:reader], other, *found.owners[reader + 1 :])
        for reader, owner in enumerate(found.owners)
        for other in found.writers
        if reader not in found.writers and other != owner
    ]
    assert wrong
    for owners in wrong:
        changed = dataclasses.replace(found, owners=owners)
        monkeypatch.setattr(type(config), "layer_map", changed)
        assert distance(made, tokens, before) > 1e-2, owners


@pytest.mark.parametrize("name", [n for n in LLAMAS if "slide" in n])
def test_other_windows_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    for layer in made.reference.model.layers:
        if layer.self_attn.window:
            layer.self_attn.window -= 1
            assert distance(made, tokens, before) > 1e-2
            layer.self_attn.window += 1


@pytest.mark.parametrize("name", ["lckv", "lckv_no_warmup", "lckv_nodiag"])
def test_fewer_passes_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    with torch.no_grad():
        few = made.reference(torch.tensor([tokens]), passes=5).logits[0].log_softmax(-1)
    error = (few - before).abs().amax(1)
    assert float(error[:5].max()) < TOLERANCE
    assert float(error[5:].max()) > 1e-2


@pytest.mark.parametrize("name", ["yoco", "yoco_retention"])
def test_another_global_cache_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    below: list[torch.Tensor] = []
    reference = made.reference
    reference.self_decoder.layers[-2].register_forward_hook(
        lambda _, __, output: below.append(output)
    )
    reference.cross_decoder.kv_layer_norm.register_forward_pre_hook(
        lambda *_: (below[-1],)
    )
    assert distance(made, tokens, before) > 1e-2
