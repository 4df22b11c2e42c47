"""What is kept of prompts with pictures, and answered, is transformers' model's.

PaddleOCR-VL is left out: stock vLLM's tower and transformers' differ.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import Recording, engine, generate
from tests.engine.pictures import EVERY_FAMILY, flags, illustrated, words
from tests.engine.serving import ENTRIES, SHARED, fits
from tests.engine.test_methods import APART, LENGTHS, check
from tests.picture_models import FAMILIES, write
from tests.pruned import ONE_STEP
from tests.sighted import Sighted
from vllm_kvcompress import stats
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.engine.pruner import Pruner

pytestmark = pytest.mark.timeout(600)

PLAIN = "idefics3"
COMPARED = [family for family in EVERY_FAMILY if family.values != ("paddleocr_vl",)]
OTHERS = [family for family in COMPARED if family.values != (PLAIN,)]
LEFT = [own for own in APART if own in ENTRIES.values() and own["method"] != "snapkv"]
PRUNING = {
    "method": "pyramidinfer",
    "decay_ratio": 0.6,
    "min_context": 16,
    "layers_per_tier": 1,
}
LENGTH = 333
Saved = Callable[[str], Path]


def _right(
    folder: Path, family: str, settings: dict[str, Any], recording: Recording
) -> None:
    """Memory, counters, kept sets and answers; the shortest prompt has no picture."""
    prompts = {
        n: illustrated(family, n, n)
        if n > SHARED
        else write(FAMILIES[family], words(n))
        for n in LENGTHS
    }
    model = Sighted(folder)

    def decode(length: int, tokens: list[int], visible: list[torch.Tensor]) -> Any:
        return model.answer(prompts[length], tokens, visible)

    config = {"kv_compression": settings}
    with engine(folder, additional_config=config, **flags(family)) as llm:
        given = [prompts[n].given for n in LENGTHS]
        check(llm, given, decode, settings, recording, 5e-4)


def test_pictures_are_compressed(saved: Saved, recording: Recording) -> None:
    _right(saved(PLAIN), PLAIN, ENTRIES["snapkv"], recording)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_every_family(family: str, saved: Saved, recording: Recording) -> None:
    _right(saved(family), family, ENTRIES["snapkv"], recording)


@pytest.mark.slow
@pytest.mark.parametrize("settings", LEFT, ids=lambda settings: settings["method"])
def test_every_method(
    settings: dict[str, Any], saved: Saved, recording: Recording
) -> None:
    _right(saved(PLAIN), PLAIN, settings, recording)


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPARED)
def test_pruning(
    family: str, saved: Saved, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the upper layer does not compute, it does not see."""
    entered: list[torch.Tensor] = []
    choose = Pruner._choose

    def recording_choose(self: Pruner, *args: Any) -> torch.Tensor:
        entered.append(choose(self, *args))
        return entered[-1]

    monkeypatch.setattr(Pruner, "_choose", recording_choose)
    read = illustrated(family, LENGTH, 1)
    config = {"kv_compression": PRUNING}
    with engine(
        saved(family), additional_config=config, **ONE_STEP, **flags(family)
    ) as llm:
        (answer,) = generate(llm, [read.given], 8)
        evicted = stats(llm)["tokens_evicted"]
    model = Sighted(saved(family))
    seen = torch.zeros(model.kv_heads, LENGTH, dtype=torch.bool)
    (left,) = entered
    seen[:, left] = True
    lowest = torch.ones_like(seen)
    assert [*fits(KVCompressionConfig.from_dict(PRUNING), "pyramidinfer", LENGTH)] == [
        (1,)
    ]
    assert evicted == LENGTH - len(left) > 0
    found = model.answer(read, answer.tokens, [lowest, seen], pruned=True)
    assert float((found - answer.logprobs).abs().max()) < 5e-4
    unpruned = model.answer(read, answer.tokens, [lowest, seen])
    assert float((unpruned - answer.logprobs).abs().max()) > 1e-2
