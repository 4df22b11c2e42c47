"""What tests of models that share KV compare depends on what each layer reads."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import prompt
from tests.engine.shared_checks import TOLERANCE
from tests.engine.shared_models import RECIPES, Made, make


def distance(made: Made, tokens: list[int], before: torch.Tensor) -> float:
    """How far the definition's logits are from those it gave ``before``."""
    return float((made.logprobs(tokens) - before).abs().max())


LLAMAS = [name for name in RECIPES if not name.startswith("yoco")]


@pytest.mark.parametrize("name", [n for n in LLAMAS if n != "lckv_no_warmup"])
def test_other_owners_would_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before, config = made.logprobs(tokens), made.reference.config
    found = config.layer_map
    wrong = [
        (*found.owners[:reader], other, *found.owners[reader + 1 :])
        for reader, owner in enumerate(found.owners)
        for other in found.writers
        if reader not in found.writers and other != owner
    ]
    assert wrong
    for owners in wrong:
        changed = dataclasses.replace(found, owners=owners)
        monkeypatch.setattr(type(config), "layer_map", changed)
        assert distance(made, tokens, before) > 1e-2, owners


@pytest.mark.parametrize("name", [n for n in LLAMAS if "slide" in n])
def test_other_windows_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    for layer in made.reference.model.layers:
        if layer.self_attn.window:
            layer.self_attn.window -= 1
            assert distance(made, tokens, before) > 1e-2
            layer.self_attn.window += 1


@pytest.mark.parametrize("name", ["lckv", "lckv_no_warmup", "lckv_nodiag"])
def test_fewer_passes_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    with torch.no_grad():
        few = made.reference(torch.tensor([tokens]), passes=5).logits[0].log_softmax(-1)
    error = (few - before).abs().amax(1)
    assert float(error[:5].max()) < TOLERANCE
    assert float(error[5:].max()) > 1e-2


@pytest.mark.parametrize("name", ["yoco", "yoco_retention"])
def test_another_global_cache_would_show(name: str, tmp_path: Path) -> None:
    made, tokens = make(name, tmp_path), prompt(60)
    before = made.logprobs(tokens)
    below: list[torch.Tensor] = []
    reference = made.reference
    reference.self_decoder.layers[-2].register_forward_hook(
        lambda _, __, output: below.append(output)
    )
    reference.cross_decoder.kv_layer_norm.register_forward_pre_hook(
        lambda *_: (below[-1],)
    )
    assert distance(made, tokens, before) > 1e-2
