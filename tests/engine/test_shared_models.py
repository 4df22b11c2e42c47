"""Models that share KV across layers answer as their definitions say, everywhere.

And the memory of what they share is allocated once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import (
    attention,
    block_bytes,
    blocks_held,
    chunks,
    engine,
    generate,
    prompt,
    save_llama,
    scheduler,
)
from tests.engine.shared_checks import check_all, check_answers, starved, steps
from tests.engine.shared_models import RECIPES, Made, make

pytestmark = pytest.mark.vllm
LENGTHS = [1, 2, 3, 17, 64, 100, 300]
BLOCKS = 400
# Layers that store keys and values, of all.
SHARES = {
    "cla2": (3, 5),
    "cla3": (3, 7),
    "cla_ends": (4, 6),
    "lckv": (3, 6),
    "lckv_no_warmup": (1, 4),
    "lckv_middle": (3, 7),
    "lckv_targets": (4, 6),
}

Served = tuple[Made, Any]


def held(llm: Any, tokens: int) -> int:
    """Bytes of one block of every layer, times the blocks of a request."""
    return block_bytes(llm) * blocks_held(llm, prompt(tokens))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, int]:
    """Bytes per layer of a Llama of the same shape: in all, and of two requests."""
    layers = 2
    path = save_llama(tmp_path_factory.mktemp("plain"), layers=layers)
    with engine(path, num_gpu_blocks_override=BLOCKS) as llm:
        allocated = block_bytes(llm) * BLOCKS
        assert allocated == sum(layer.kv_cache.nbytes for layer in attention(llm))
        return tuple(
            found // layers for found in (allocated, held(llm, 100), held(llm, 300))
        )


@pytest.fixture(scope="module", params=RECIPES)
def served(
    request: pytest.FixtureRequest,
    plain: tuple[int, int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Each model with an engine that reads prompts exactly and skips nothing.

    The engine of ``plain`` is gone by then.
    """
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(
        made.path, hf_overrides=made.exact, num_gpu_blocks_override=BLOCKS
    ) as llm:
        yield made, llm


# First, before an engine of `served` runs.
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


@pytest.mark.parametrize("served", SHARES, indirect=True)
def test_memory_is_the_share_of_layers_that_write(
    served: Served, request: pytest.FixtureRequest, plain: tuple[int, int, int]
) -> None:
    made, llm = served
    layer_map = made.reference.config.layer_map
    writers, layers = SHARES[request.node.callspec.params["served"]]
    assert (len(layer_map.writers), len(layer_map.owners)) == (writers, layers)
    caches = [layer.kv_cache for layer in attention(llm)]
    assert len(caches) == layers
    places = [cache.data_ptr() for cache in caches]
    assert places == [places[owner] for owner in layer_map.owners]
    own = {cache.data_ptr(): cache.nbytes for cache in caches}
    assert len(own) == writers
    llm.reset_prefix_cache()
    found = sum(own.values()), held(llm, 100), held(llm, 300)
    assert found == tuple(writers * each for each in plain)
