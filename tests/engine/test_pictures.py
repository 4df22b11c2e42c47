"""Prompts with pictures are compressed like all others, by every method.

Towers run as in stock vLLM; what they make of a picture are tokens among others. They
lie in the prefix that all prompts share, across the borders of chunks, and in the
windows at the prompts' ends.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import Answer, engine, generate, scheduler
from tests.engine.pictures import EVERY_FAMILY, flags, illustrate, illustrated
from tests.engine.serving import ENGINE, SERVERS, SHARED, Request, ask, requests
from tests.engine.test_serving import (
    _clean,
    alone,
    check,
    test_chunks_among_neighbours,
    test_parallel_samples,
    test_preemptions,
    test_prefix_hits,
)
from vllm_kvcompress import stats

# Fixtures and tests of all prompts, on the engines below.
__all__ = [
    "_clean",
    "alone",
    "test_chunks_among_neighbours",
    "test_parallel_samples",
    "test_preemptions",
    "test_prefix_hits",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(saved: Any, family: str, name: str) -> Iterator[Any]:
    config = {"kv_compression": SERVERS[name]}
    with engine(
        saved(family), additional_config=config, **{**ENGINE, **flags(family)}
    ) as e:
        yield e


@pytest.fixture(scope="module")
def asked(family: str, name: str) -> list[Request]:
    return illustrate(requests(SERVERS[name]), family)


def test_all_at_once(llm: Any, asked: list[Request], alone: list[Answer]) -> None:
    """Each is compressed, and answered as if it were alone."""
    counted = stats(llm)["compressions"]
    check(asked, ask(llm, asked), alone)
    expected = sum(request.compressions for request in asked)
    assert stats(llm)["compressions"] == counted + expected > counted


def test_towers_take_turns(
    llm: Any, asked: list[Request], alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has room for one prompt's pictures; one that is pruned waits for it."""
    llm.llm_engine.reset_encoder_cache()
    monkeypatch.setattr(scheduler(llm), "max_num_encoder_input_tokens", 36)
    check(asked, ask(llm, asked), alone)


def test_pictures_matter(
    llm: Any, family: str, asked: list[Request], alone: list[Answer]
) -> None:
    """Another one at the same place gets no hit behind it, and another answer."""
    ask(llm, asked)
    longest = asked[-1]
    other = illustrated(family, longest.length, len(asked), first=1)
    again = illustrated(family, longest.length, len(asked))
    params = [longest.params]
    (mine,) = generate(llm, [other.given], 8, each=params)
    (theirs,) = generate(llm, [again.given], 8, each=params)
    assert mine.cached == 0
    if not longest.scorer.prunes:
        assert theirs.cached == SHARED
    assert float((mine.logprobs[0] - theirs.logprobs[0]).abs().max()) > 0.05
