"""RULER's common words extraction (arXiv 2404.06654): count words of a long list."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import ClassVar

from .base import Draft, Task, Text
from .haystack import Growing
from .words import shuffled_words

INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n"
)
QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top "
    "10 words that appear most often in the list are:"
)
COMMON = 10
SHORT = 4096
"""Tokens below which RULER repeats words less often."""


@dataclass(frozen=True)
class CommonWords(Task):
    """A list of words, ten of them more common than the others, after an example."""

    max_tokens: ClassVar[int] = 120
    has_depth: ClassVar[bool] = False

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        if length < SHORT:
            example_words, example_times, times = 20, (3, 1), (6, 1)
        else:
            example_words, example_times, times = 40, (10, 3), (30, 3)
        example = list(islice(shuffled_words(rng), example_words))
        solved = (
            f"{INTRO}{_list(rng, example, *example_times)}{QUESTION} "
            f"{_numbered(example[:COMMON])}\n"
        )
        words = Growing(shuffled_words(rng))
        order = rng.getrandbits(64)

        def render(units: int) -> Text:
            chosen = words.first(COMMON + units)
            listed = _list(Random(order), chosen, *times)
            return Text(f"{solved}{INTRO}{listed}", QUESTION, tuple(chosen[:COMMON]))

        return Draft(render, least=1)


def _list(rng: Random, words: list[str], often: int, seldom: int) -> str:
    """The first ten words so many times, the others so many, in any order."""
    listed = [*words[:COMMON] * often, *words[COMMON:] * seldom]
    rng.shuffle(listed)
    return _numbered(listed)


def _numbered(words: Iterable[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
