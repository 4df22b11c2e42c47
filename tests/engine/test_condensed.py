"""Layer-condensed KV reads a prompt in so many passes, and decodes in one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import chunks, engine, generate, prompt
from tests.engine.shared_checks import TOLERANCE, all_logits, check_all
from tests.engine.shared_models import Made, make

pytestmark = pytest.mark.vllm
PASSES = 5
"""Of each model here, over the layers that read a later one."""
NAMES = ["lckv", "lckv_no_warmup", "opt"]
Served = tuple[Made, Any]


@pytest.fixture(scope="module", params=NAMES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Each model with an engine that is at its default."""
    more = {"num_encoders": PASSES - 1} if request.param == "opt" else {}
    made = make(request.param, tmp_path_factory.mktemp(request.param), **more)
    assert made.reference.config.passes == PASSES
    with engine(made.path) as llm:
        yield made, llm


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Listens to our own runner: layers and tokens of every pass over a span."""
    from vllm_kvcompress.models.layer_span import SpanRunner

    seen: list[tuple[int, int]] = []
    forward = SpanRunner.forward

    def listening(self: Any, span: Any, positions: torch.Tensor, *rest: Any) -> Any:
        seen.append((len(span.layers), len(positions)))
        return forward(self, span, positions, *rest)

    monkeypatch.setattr(SpanRunner, "forward", listening)
    return seen


# First, before an engine of `served` runs.
def test_exact_reading_stops_when_nothing_changes(
    tmp_path: Path, runs: list[tuple[int, int]]
) -> None:
    """Here because what condensed layers read weighs nothing."""
    made = make("lckv", tmp_path)
    with torch.no_grad():
        for layer in made.reference.model.layers[1:5]:
            layer.self_attn.o_proj.weight.zero_()
    made.reference.save_pretrained(tmp_path)
    with engine(made.path, hf_overrides=made.exact) as llm:
        del runs[:]
        ((tokens, found),) = all_logits(llm, [prompt(300)], 3)
    took = [n for size, n in runs if size == 4]
    assert took == [300, 300, 1, 1]
    assert made.error(tokens, found) < TOLERANCE


def test_a_lone_prompt_is_as_in_so_many_passes(served: Served) -> None:
    """Up to the first answer; later ones read what these passes left."""
    made, llm = served
    tokens = prompt(100, seed=100)
    (found,) = all_logits(llm, [tokens], 1)
    with torch.no_grad():
        wanted = made.reference(torch.tensor([tokens]), passes=PASSES).logits[0]
    assert float((wanted.log_softmax(-1) - found[1]).abs().max()) < TOLERANCE
    assert made.error(found[0], found[1]) > 1e-2


def test_short_chunks_are_exact(served: Served) -> None:
    made, llm = served
    with chunks(llm, PASSES):
        check_all(made, llm, [23, 1, 3, 40])


def test_passes(served: Served, runs: list[tuple[int, int]]) -> None:
    """As the longest chunk has tokens, five at most; one for answers."""
    made, llm = served
    spans = made.reference.config.layer_map.spans
    sizes = {span.end - span.first: span.repeats for span in spans}
    (most,) = [size for size, repeats in sizes.items() if repeats]
    llm.reset_prefix_cache()
    generate(llm, [prompt(100, seed=1)], 4)
    assert [n for size, n in runs if size == most] == [100] * PASSES + [1] * 3
    once = len(spans) - 1
    assert [n for size, n in runs if size != most] == [100] * once + [1] * 3 * once
    del runs[:]
    generate(llm, [prompt(3, seed=2), prompt(2, seed=3)], 3)
    assert [n for size, n in runs if size == most] == [5] * 3 + [2] * 2
