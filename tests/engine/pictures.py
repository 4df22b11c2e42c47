"""Engines and requests with pictures."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.conftest import prompt
from tests.engine.serving import SHARED, Request
from tests.picture_models import FAMILIES, WORDS, Prompt, picture, write

TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision"
)
EVERY_FAMILY = [
    pytest.param(name, marks=[TORCHVISION] if family.torchvision else [])
    for name, family in FAMILIES.items()
]


def words(count: int, seed: int = 0) -> list[int]:
    """Random tokens that stand for no picture."""
    return [token % WORDS for token in prompt(count, seed)]


def illustrated(family: str, length: int, seed: int, *, first: int = 0) -> Prompt:
    """A prompt of two pictures, one early and one just before its end.

    Args:
        family: Which model reads it.
        length: Tokens that it reads.
        seed: Other seeds, other words and another second picture.
        first: The first picture.
    """
    kind = FAMILIES[family]
    shown = [picture(first, "small"), picture(1000 + seed, "wide")]
    read = [len(kind.read(own.height, own.width)) for own in shown]
    start = words(SHARED - read[0])
    middle = words(length - SHARED - read[1] - 5, seed)
    return write(
        kind, start[:20], shown[0], start[20:], middle, shown[1], words(5, seed + 1)
    )


def flags(family: str) -> dict[str, Any]:
    """Keywords of an engine for pictures."""
    limits = {"image": 2, **({"video": 0} if FAMILIES[family].torchvision else {})}
    return {"skip_tokenizer_init": False, "limit_mm_per_prompt": limits}


@dataclass(frozen=True)
class Illustrated(Request):
    """A request with pictures; every fifth has none."""

    family: str = ""

    @property
    def given(self) -> dict[str, Any]:
        own = list(self.config.scorers).index(self.method) * 1000 + self.length
        if own // 1000 % 5 == 4:
            return {"prompt_token_ids": words(self.length, own)}
        found = illustrated(self.family, self.length, own)
        assert len(found.tokens) == self.length
        return found.given


def illustrate(asked: list[Request], family: str) -> list[Request]:
    """The same requests with pictures."""
    return [Illustrated(own.config, own.method, own.length, family) for own in asked]
