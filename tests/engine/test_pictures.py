"""Prompts with pictures are compressed like all others, by every method.

Towers run as in stock vLLM; what they make of a picture are tokens among others. They
lie in the prefix that all prompts share, across the borders of chunks, and in the
windows at the prompts' ends.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import (
    Answer,
    Recording,
    engine,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from tests.engine.serving import ENGINE, SERVERS, SHARED, Request, ask, requests
from tests.engine.test_methods import APART, LENGTHS, check
from tests.engine.test_serving import (
    _clean,
    alone,
    test_chunks_among_neighbours,
    test_parallel_samples,
    test_preemptions,
    test_prefix_hits,
)
from tests.picture_models import FAMILIES, WORDS, Prompt, picture, write
from tests.sighted import Sighted
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
    return [
        Illustrated(own.config, own.method, own.length, family)
        for own in requests(SERVERS[name])
    ]


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
