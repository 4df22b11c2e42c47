"""YOCO's prompts skip its upper half, and nobody can tell from the answers."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import (
    Answer,
    attention,
    blocks_held,
    chunks,
    engine,
    generate,
    prompt,
    scheduler,
)
from tests.engine.shared_checks import check_answers, starved, steps
from tests.engine.shared_models import Made, make

pytestmark = pytest.mark.vllm
LENGTHS = [1, 2, 3, 17, 64, 100, 300]


class Layers:
    """Counts the tokens that enter the last layer of each half, step by step."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.model.model
        self.lower: list[int] = []
        self.upper: list[int] = []
        for half, seen in (
            (model.self_decoder, self.lower),
            (model.cross_decoder, self.upper),
        ):
            half.layers[-1].register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(len(args[0]))
            )

    def clear(self) -> None:
        """Forget what was counted."""
        del self.lower[:], self.upper[:]


Served = tuple[Made, Any, Layers, list[Answer]]


@pytest.fixture(scope="module", params=["yoco", "yoco_retention"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Each kind with an engine at its default, and what one without exits answers."""
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(made.path, hf_overrides=made.exact) as llm:
        layers = Layers(llm)
        whole = generate(llm, [prompt(n, seed=n) for n in LENGTHS])
        assert layers.upper == layers.lower
    with engine(made.path) as llm:
        yield made, llm, Layers(llm), whole


@pytest.mark.parametrize("step", [2048, 64, 7])
def test_answers_are_the_same(served: Served, step: int) -> None:
    made, llm, _, whole = served
    llm.reset_prefix_cache()
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    with chunks(llm, step):
        answers = generate(llm, prompts)
    for mine, other in zip(answers, whole, strict=True):
        assert mine.near(other)
    check_answers(made, prompts, answers)


def test_one_token_of_a_chunk_goes_on(served: Served) -> None:
    _, llm, layers, _ = served
    llm.reset_prefix_cache()
    layers.clear()
    with chunks(llm, 64), steps(llm) as seen:
        generate(llm, [prompt(n, seed=n) for n in (3, 150)], 8)
    run = [step for step in seen if step]
    assert layers.lower == [sum(step.values()) for step in run]
    assert layers.upper == [len(step) for step in run]
    # The first request answers while the second is read.
    both = [step for step in run if len(step) == 2]
    assert any(min(step.values()) == 1 < max(step.values()) for step in both)


def test_exits_after_prefix_hits(served: Served) -> None:
    made, llm, layers, _ = served
    start = prompt(257, seed=8)
    generate(llm, [start], 2)
    layers.clear()
    prompts = [start, [*start, *prompt(90, seed=9)]]
    with steps(llm) as seen:
        answers = generate(llm, prompts, 3)
    assert [answer.cached for answer in answers] == [256, 256]
    run = [step for step in seen if step]
    assert sum(layers.lower) == 1 + 91 + 2 * 2
    assert layers.upper == [len(step) for step in run]
    check_answers(made, prompts, answers)


def test_exits_after_preemptions(served: Served) -> None:
    made, llm, _, _ = served
    prompts = [prompt(n, seed=n) for n in (100, 103, 97, 101)]
    held = blocks_held(llm, prompt(100))
    with starved(llm, 2 * held + 1) as seen:
        answers = generate(llm, prompts, 70)
    assert seen
    check_answers(made, prompts, answers)


def counts(llm: Any, tokens: int) -> list[int]:
    """Blocks of every group that a request holds one step after its prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
    given = {"prompt_token_ids": prompt(tokens)}
    name = llm.llm_engine.add_request("77", given, params)
    requests = scheduler(llm).requests
    while not (requests and requests[name].num_output_tokens > 1):
        llm.llm_engine.step()
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    found = [
        sum(not block.is_null for block in manager.req_to_blocks[name])
        for manager in managers
    ]
    llm.llm_engine.abort_request([name], internal=True)
    return found


def test_caches_once(served: Served) -> None:
    """One layer's pages grow with a request, whatever the depth of the model."""
    made, llm, _, _ = served
    half = made.reference.config.n_layers // 2
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    (full,) = [
        index
        for index, group in enumerate(groups)
        if type(group.kv_cache_spec).__name__ == "FullAttentionSpec"
    ]
    readers = attention(llm)[-half:]
    assert groups[full].layer_names == [readers[0].layer_name]
    assert sum(len(group.layer_names) for group in groups) == half + 1
    assert len({reader.kv_cache.data_ptr() for reader in readers}) == 1
    size = groups[full].kv_cache_spec.block_size
    taken = {n: counts(llm, n) for n in (100, 484, 996)}
    for tokens, count in taken.items():
        assert count[full] == -(-(tokens + 1) // size)
    rest = [sum(count) - count[full] for count in taken.values()]
    # A window's blocks, or a state's.
    assert len(set(rest)) == 1
