"""Speculative decoding with models that share KV: drafts change no answer."""

from pathlib import Path

import pytest

from tests.engine.conftest import engine, generate, prompt
from tests.engine.shared_models import make
from tests.engine.test_shared_models import check_answers, steps

pytestmark = pytest.mark.vllm
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}


@pytest.mark.parametrize("name", ["cla2", "lckv", "yoco"])
def test_drafts_change_nothing(name: str, tmp_path: Path) -> None:
    """Prompts are short enough for condensed layers to be exact without more ado."""
    made = make(name, tmp_path)
    prompts = [prompt(n, seed=n) * 2 for n in (1, 2)]
    with engine(made.path, speculative_config=DRAFTS) as llm, steps(llm) as seen:
        answers = generate(llm, prompts, 60)
    assert any(max(step.values()) == 4 for step in seen[2:] if step)
    check_answers(made, prompts, answers)


def test_states_cannot_take_drafts_back(tmp_path: Path) -> None:
    made = make("yoco_retention", tmp_path)
    said = "speculative decoding"
    with (
        pytest.raises(ValueError, match=said),
        engine(made.path, speculative_config=DRAFTS),
    ):
        pass
