"""What engines answer, against what the models' definitions say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.engine.conftest import VOCAB, free_blocks, prompt, scheduler
from tests.engine.shared_models import Made

TOLERANCE = 1e-4


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
