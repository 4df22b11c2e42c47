"""MiniCache against a dense model whose keys and values are merged in loops."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dense import DenseLlama
from tests.engine.conftest import (
    BLOCK,
    engine,
    free_blocks,
    generate,
    prompt,
)
from tests.merged import Merges
from vllm_kvcompress import stats

LAYERS, COUNT = 4, 80
LENGTHS = [500, 90, 231, 97]
COURSES: dict[str, dict[str, Any]] = {
    "default": {"interval": 48},
    "range": {"retention": "range", "retain": 0.25, "gamma": 0.4, "interval": 16},
    "all layers": {"start_layer": 0, "retain": 0.0, "t": 0.3, "interval": None},
    "selected": {
        "over": {"method": "snapkv", "window": 16},
        "budget": 192,
        "retain": 0.2,
        "interval": 32,
    },
}


@pytest.fixture(scope="module", params=COURSES)
def served(request: Any, deep_llama: Path) -> Iterator[tuple[Any, Any]]:
    settings = {"method": "minicache", **COURSES[request.param]}
    config = {"kv_compression": settings}
    with engine(deep_llama, additional_config=config) as llm:
        yield llm, settings


def test_logits_are_the_dense_models(served: Any, deep_llama: Path) -> None:
    llm, settings = served
    before, dense = free_blocks(llm), DenseLlama(deep_llama)
    answers = generate(llm, [prompt(n, seed=n) for n in LENGTHS], COUNT)
    assert free_blocks(llm) == before
    assert stats(llm)["tokens_merged"] > 0
    for length, answer in zip(LENGTHS, answers, strict=True):
        tokens = prompt(length, seed=length) + answer.tokens
        found = Merges(settings, LAYERS, length, COUNT, BLOCK)
        expected = dense.run(tokens, length, found.cuts, found.edits)
        assert float((expected - answer.logprobs).abs().max()) < 5e-4, length
