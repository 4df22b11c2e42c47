"""Every method is served alike: what a request gets depends on the request alone.

Servers and requests are in `serving`, which asks for every method of the matrix.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    Answer,
    chunks,
    engine,
    free_blocks,
    preemptions,
    scheduler,
)
from tests.engine.leftovers import holders, ours
from tests.engine.serving import (
    COUNT,
    ENGINE,
    ENTRIES,
    SERVERS,
    STEP,
    Request,
    ask,
    little_space,
    requests,
)
from tests.engine.test_v2 import RUNNERS
from vllm_kvcompress import stats

CASES = Path(__file__).with_name("serving_cases.py")


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(llama: Path, name: str) -> Iterator[Any]:
    config = {"kv_compression": SERVERS[name]}
    with engine(llama, additional_config=config, **ENGINE) as e:
        yield e


@pytest.fixture(scope="module")
def asked(name: str) -> list[Request]:
    return requests(SERVERS[name])


@pytest.fixture(scope="module")
def alone(llm: Any, asked: list[Request]) -> list[Answer]:
    """Each request in one step, with nobody else."""
    answers, before, counted = [], free_blocks(llm), stats(llm)["compressions"]
    for request in asked:
        scheduler(llm).reset_prefix_cache()
        answers += ask(llm, [request])
    assert not any(answer.cached for answer in answers)
    assert free_blocks(llm) == before
    expected = sum(request.compressions for request in asked)
    assert stats(llm)["compressions"] == counted + expected
    return answers


@pytest.fixture(autouse=True)
def _clean(llm: Any, alone: list[Answer]) -> Iterator[None]:
    """Start with an empty prefix cache, and leave no block behind."""
    assert scheduler(llm).reset_prefix_cache()
    before = free_blocks(llm)
    yield
    assert free_blocks(llm) == before


def check(asked: list[Request], found: list[Answer], alone: list[Answer]) -> None:
    for request, mine, theirs in zip(asked, found, alone, strict=True):
        assert mine.near(theirs), (request.method, request.length)


def test_every_method_is_served_and_compresses() -> None:
    asked = [request for settings in SERVERS.values() for request in requests(settings)]
    assert {request.method for request in asked if request.compressions} == {*ENTRIES}


def test_chunks_among_neighbours(
    llm: Any, name: str, asked: list[Request], alone: list[Answer]
) -> None:
    for tokens in [STEP] if name == "pruning" else [21, 150]:
        scheduler(llm).reset_prefix_cache()
        counted = stats(llm)["compressions"]
        with chunks(llm, tokens):
            check(asked, ask(llm, asked), alone)
        expected = sum(request.compressions for request in asked)
        assert stats(llm)["compressions"] == counted + expected


def test_prefix_hits(llm: Any, asked: list[Request], alone: list[Answer]) -> None:
    """They reach up to the window, and change nothing."""
    ask(llm, asked)
    again = ask(llm, asked)
    assert [answer.cached for answer in again] == [request.hits for request in asked]
    check(asked, again, alone)


def test_preemptions(llm: Any, asked: list[Request], alone: list[Answer]) -> None:
    """Who resumes is compressed once more, with the same outcome."""
    preempted, counted = preemptions(llm), stats(llm)["compressions"]
    with little_space(llm, asked):
        found = ask(llm, asked)
    assert any(preempted)
    expected = sum(request.compressions for request in asked) + sum(preempted)
    assert stats(llm)["compressions"] == counted + expected
    check(asked, found, alone)


def test_parallel_samples(llm: Any, asked: list[Request]) -> None:
    """Each is compressed like a request of its own."""
    counted = stats(llm)["compressions"]
    both = ask(llm, asked, n=2, seed=7, temperature=1.0)
    expected = 2 * sum(request.compressions for request in asked)
    assert stats(llm)["compressions"] == counted + expected
    for number, samples in enumerate((both[::2], both[1::2])):
        check(asked, samples, ask(llm, asked, seed=7 + number, temperature=1.0))
    assert any(a.tokens != b.tokens for a, b in zip(both[::2], both[1::2], strict=True))


def test_streams_and_aborts(
    llm: Any, asked: list[Request], alone: list[Answer]
) -> None:
    """Who stays streams the same tokens; who leaves leaves nothing behind."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    streamed: dict[str, list[int]] = {}
    for number, request in enumerate(asked):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=COUNT,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **request.params,
        )
        llm.llm_engine.add_request(str(number), request.given, params)
        streamed[str(number)] = []
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            streamed[output.request_id] += output.outputs[0].token_ids
        steps += 1
        if steps % 3 == 0 and steps // 3 < len(asked):
            llm.llm_engine.abort_request([str(steps // 3)])
    whole = 0
    for tokens, theirs in zip(streamed.values(), alone, strict=True):
        assert tokens == theirs.tokens[: len(tokens)]
        whole += len(tokens) == COUNT
    assert 0 < whole < len(asked)


def _come_and_go(llm: Any, asked: list[Request], leave: bool = False) -> set[str]:
    """Serve requests, some of which may leave early; their names."""
    from vllm import SamplingParams

    names = []
    for number, request in enumerate(asked):
        settings = {**request.params["extra_args"], "kv_compression_usage": True}
        params = SamplingParams(
            max_tokens=COUNT, ignore_eos=True, detokenize=False, extra_args=settings
        )
        tokens = {"prompt_token_ids": request.tokens}
        names.append(llm.llm_engine.add_request(str(number), tokens, params))
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        steps += 1
        if leave and steps % 4 == 0 and steps // 4 < len(names):
            llm.llm_engine.abort_request([names[steps // 4]], internal=True)
    return {*names}


def test_nothing_remembers_requests(llm: Any, asked: list[Request]) -> None:
    """Neither answered nor aborted nor preempted ones; the last step may be known."""
    _come_and_go(llm, asked[-1:])
    before, preempted = ours(), preemptions(llm)
    with little_space(llm, asked):
        names = _come_and_go(llm, asked) | _come_and_go(llm, asked, leave=True)
    assert any(preempted)
    _come_and_go(llm, asked[-1:])
    assert not holders(names)
    assert ours() == before


@pytest.fixture(scope="session", params=RUNNERS)
def asynchronous(
    llama: Path, request: pytest.FixtureRequest, tmp_path_factory: Any
) -> dict[str, Any]:
    """What a runner answers in little space, by server."""
    runner = request.param
    output = tmp_path_factory.mktemp(runner) / "answers.pt"
    done = subprocess.run(
        [sys.executable, str(CASES), runner, str(llama), str(output), "", *SERVERS],
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(output)
    assert {case["runner"] for case in found.values()} == {RUNNERS[runner]}
    return found


@pytest.mark.timeout(600)
def test_asynchronous_scheduling_and_both_runners(
    asynchronous: dict[str, Any], name: str, asked: list[Request], alone: list[Answer]
) -> None:
    case = asynchronous[name]
    assert case["scheduler"] == "CompressedAsyncScheduler"
    check(asked, [Answer(**answer) for answer in case["answers"]], alone)
    assert case["undone"]
    expected = sum(request.compressions for request in asked) + sum(case["undone"])
    assert case["compressions"] == expected
    assert case["leaked"] == 0
