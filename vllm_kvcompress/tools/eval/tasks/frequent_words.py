"""RULER's frequent words extraction (arXiv 2404.06654): count words of a coded text."""

import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .base import Draft, Task, Text
from .haystack import Growing

INTRO = (
    "Read the following coded text and track the frequency of each coded word. Find "
    "the three most frequently appeared coded words. "
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text? Answer: "
    "According to the coded text above, the three most frequently appeared words are:"
)
NOISE = "..."
ASKED = 3
ZETA_2 = math.pi**2 / 6
LETTERS = 6
LEAST = 150
"""Words that are drawn at least: then the four most frequent differ in number."""


@dataclass(frozen=True)
class FrequentWords(Task):
    """Made-up words, the k-th as often as a zeta distribution (alpha = 2) has it."""

    max_tokens: ClassVar[int] = 50
    has_depth: ClassVar[bool] = False

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        order = rng.getrandbits(64)
        vocabulary = Growing(_coded_words(rng))

        def render(units: int) -> Text:
            text: list[str] = []
            # Of a rank beyond the root there is less than one word.
            words = vocabulary.first(math.isqrt(units))
            for rank, word in enumerate([NOISE, *words], 1):
                text += [word] * int(units / (rank**2 * ZETA_2))
            Random(order).shuffle(text)
            return Text(INTRO + " ".join(text), QUESTION, tuple(words[:ASKED]))

        return Draft(render, least=LEAST)


def _coded_words(rng: Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=LETTERS))
        if word not in seen:
            seen.add(word)
            yield word
