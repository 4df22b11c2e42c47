"""YOCO's prompts skip its upper half, and nobody can tell from the answers."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import Answer, blocks_held, chunks, engine, generate, prompt
from tests.engine.shared_models import Made, make
from tests.engine.test_shared_models import check_answers, starved, steps

pytestmark = pytest.mark.vllm
LENGTHS = [1, 2, 3, 17, 64, 100, 300]
Served = tuple[Made, Any]


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


@pytest.fixture(scope="module", params=["yoco", "yoco_retention"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Made, Any, Layers, list[Answer]]]:
    """Each kind with an engine at its default, and what one without exits answers."""
    made = make(request.param, tmp_path_factory.mktemp(request.param))
    with engine(made.path, hf_overrides=made.exact) as llm:
        layers = Layers(llm)
        whole = generate(llm, [prompt(n, seed=n) for n in LENGTHS])
        assert layers.upper == layers.lower
    with engine(made.path) as llm:
        yield made, llm, Layers(llm), whole


@pytest.mark.parametrize("step", [2048, 64, 7])
def test_answers_are_the_same(served: Any, step: int) -> None:
    made, llm, _, whole = served
    llm.reset_prefix_cache()
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    with chunks(llm, step):
        answers = generate(llm, prompts)
    for mine, other in zip(answers, whole, strict=True):
        assert mine.near(other)
    check_answers(made, prompts, answers)


def test_one_token_of_a_chunk_goes_on(served: Any) -> None:
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


def test_exits_after_prefix_hits(served: Any) -> None:
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


def test_exits_after_preemptions(served: Any) -> None:
    made, llm, _, _ = served
    prompts = [prompt(n, seed=n) for n in (100, 103, 97, 101)]
    held = blocks_held(llm, prompt(100))
    with starved(llm, 2 * held + 1) as seen:
        answers = generate(llm, prompts, 70)
    assert seen
    check_answers(made, prompts, answers)
