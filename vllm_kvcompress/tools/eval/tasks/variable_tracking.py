"""RULER's variable tracking (arXiv 2404.06654): a value handed on from hop to hop."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import ClassVar

from .base import Draft, Task, Text
from .haystack import Growing, Haystack, place

INTRO = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n"
)
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text "
    "above, {count} variables are assigned the value {value}, they are: "
)
HOPS = 4
EXAMPLE_UNITS = 12
"""Of noise in the example, which then takes about 500 tokens, as RULER's does."""


@dataclass(frozen=True)
class VariableTracking(Task):
    """One chain of assignments, after a solved example.

    Attributes:
        haystack: Where the assignments are hidden.
    """

    haystack: Haystack

    max_tokens: ClassVar[int] = 30

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        example = self._chain(rng, letters=3)(EXAMPLE_UNITS)
        solved = f"{example.context}{example.question} {' '.join(example.answers)}\n\n"
        chain = self._chain(rng, letters=5, depth=depth)

        def render(units: int) -> Text:
            text = chain(units)
            return Text(solved + text.context, text.question, text.answers, text.depth)

        return Draft(render, least=HOPS + 1)

    def _chain(
        self, rng: Random, letters: int, depth: float | None = None
    ) -> Callable[[int], Text]:
        """Draw a chain; returns what makes its text with a number of units."""
        value = rng.randint(10_000, 99_999)
        names: list[str] = []
        while len(names) <= HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        steps = [f"VAR {names[0]} = {value}"]
        steps += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
        # Between sentences in a line an assignment has to be one as well.
        end = "" if self.haystack.joint == "\n" else "."
        depths = sorted(rng.random() for _ in steps)
        if depth is not None:
            rest = [depth + (1 - depth) * share for share in depths[1:]]
            depths = [depth, *rest]
        needles = [(at, step + end) for at, step in zip(depths, steps, strict=True)]
        hay = Growing(self.haystack.units(rng))
        question = QUESTION.format(value=value, count=len(names))

        def render(units: int) -> Text:
            text = self.haystack.joint.join(place(hay.first(units), needles))
            return Text(INTRO + text, question, tuple(names), depths[0])

        return render
