"""RULER's needles in a haystack (arXiv 2404.06654): values to be found by their keys.

RULER's names: ``niah_single`` in noise is its niah_single_1, in a text niah_single_2;
``niah_multikey`` in a text is its niah_multikey_1. What is hidden in needles alone
takes no haystack.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import ClassVar

from .base import Draft, Task, Text
from .haystack import Growing, Haystack, place
from .words import distinct

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Niah(Task):
    """Needles in a haystack.

    Attributes:
        haystack: None = other needles.
        keys: Keys in the text.
        values: Values of each key.
        asked: Keys that are asked for.
        key_kind: ``words``, ``numbers`` or ``uuids``.
        value_kind: Likewise.
    """

    haystack: Haystack | None
    keys: int = 1
    values: int = 1
    asked: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"

    max_tokens: ClassVar[int] = 128

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        new_keys = distinct(rng, self.key_kind)
        new_values = distinct(rng, self.value_kind)
        facts = {
            key: list(islice(new_values, self.values))
            for key in islice(new_keys, self.keys)
        }
        asked = rng.sample(list(facts), self.asked)
        # Keys that are asked for come first, so the first needle is the asked one.
        order = [*asked, *(key for key in facts if key not in asked)]
        needles = [
            (rng.random(), self._needle(key, value))
            for key in order
            for value in facts[key]
        ]
        if depth is not None:
            needles[0] = (depth, needles[0][1])
        if self.haystack is None:
            others: Iterator[str] = map(self._needle, new_keys, new_values)
            hay, joint = Growing(others), "\n"
        else:
            hay, joint = Growing(self.haystack.units(rng)), self.haystack.joint

        answers = tuple(value for key in asked for value in facts[key])
        intro, question = self._frame(asked, len(answers))

        def render(units: int) -> Text:
            text = joint.join(place(hay.first(units), needles))
            return Text(intro + text, question, answers, needles[0][0])

        return Draft(render, least=len(needles))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _frame(self, asked: list[str], answers: int) -> tuple[str, str]:
        """What stands before and after the text."""
        kind = self.value_kind if answers > 1 else self.value_kind.removesuffix("s")
        query = ", and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        intro, question = SEVERAL if answers > 1 else ONE
        return intro.format(kind=kind), question.format(kind=kind, query=query)
