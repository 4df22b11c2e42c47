"""The task that the bundled model was built for, in its own words."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from ...needle import RECALL, least_tokens, needle_prompts
from .base import Draft, Task, Text

NEEDLES = 8


@dataclass(frozen=True)
class Needle(Task):
    """Facts to remember, one of which is to be recalled.

    No needle lies in the last 600 words (see `tools.needle`): depth 1 is the last place
    before them. A unit is a word, which the bundled tokenizer makes one token of.
    """

    max_tokens: ClassVar[int] = 8

    def _draft(self, rng: Random, length: int, depth: float | None) -> Draft:
        seed = rng.getrandbits(64)

        def render(units: int) -> Text:
            (prompt,) = needle_prompts(
                num_tokens=units, needles=NEEDLES, count=1, seed=seed, depth=depth
            )
            context, recall, key = prompt.prompt.rpartition(f" {RECALL} ")
            at = prompt.depth if depth is None else depth
            return Text(context, f"{recall}{key}", (prompt.answer,), at)

        return Draft(render, least=least_tokens(NEEDLES))
