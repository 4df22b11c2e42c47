"""The text that needles are hidden in, and how they get to their depth."""

import re
import textwrap
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice, repeat
from pathlib import Path
from random import Random

from ...errors import ToolError
from .words import adjectives, nouns

_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
_ESSAY = [
    "Most people think that a {a} {n} matters more than a {b} {m}.",
    "What surprised me about the {n} was how {a} it looked beside the {m}.",
    "If you want to understand a {n}, start with its {m}.",
    "The {a} ones rarely say so, but every {n} begins as a {m}.",
    "There is nothing {a} about a {n} that stays {b}.",
    "I used to believe that the {n} would replace the {m}, and in a {a} way it did.",
    "So the question is not whether the {n} is {a}, but who pays for the {m}.",
    "A {n} is like a {m}: the more {a} it gets, the harder it is to see.",
    "When the {a} {n} came to town, nobody asked about the {m}.",
    "It took years until someone noticed that the {n} had no {m} at all.",
    "You can tell a {a} {n} from a {b} one by looking at the {m}.",
    "That is why I would rather have one {a} {n} than three {b} ones.",
]
_LONGEST = 400
"""Characters of a unit; what has no full stops, such as code, is cut."""


@dataclass(frozen=True)
class Haystack:
    """Text without end.

    Attributes:
        units: Makes it, in pieces between which a needle can lie.
        joint: What stands between two of them.
    """

    units: Callable[[Random], Iterator[str]]
    joint: str


class Growing:
    """The first items of an endless iterator, as many as were asked for so far."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._made: list[str] = []

    def first(self, count: int) -> list[str]:
        """Return the first ``count`` items, the same ones each time."""
        self._made += islice(self._source, max(0, count - len(self._made)))
        return self._made[:count]


def find_haystack(name: str) -> Haystack:
    """Return the haystack called ``noise`` or ``essay``, or the one in a text file.

    Raises:
        ToolError: The file cannot be used.
    """
    if name == "noise":
        return Haystack(lambda rng: repeat(_NOISE), "\n")
    if name == "essay":
        return Haystack(_essay, " ")
    units = _cut(_read(Path(name)))
    if not units:
        raise ToolError(f"haystack {name}: there is no text in it")
    return Haystack(lambda rng: cycle(units), " ")


def place(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Put needles between units.

    Args:
        units: The text.
        needles: Depth and text of each: 0 = before all units, 1 = after them. Depths
            are measured in characters, because units need not be of one length. Of
            one depth, needles stay in the given order.
    """
    ends = list(accumulate(map(len, units), initial=0))
    placed = list(units)
    # From the end, so that what is put in moves nothing that is still to be counted.
    for depth, text in reversed(sorted(needles, key=lambda needle: needle[0])):
        goal = depth * ends[-1]
        after = min(bisect(ends, goal), len(units))
        before = max(0, after - 1)
        nearer = after if ends[after] - goal < goal - ends[before] else before
        placed.insert(nearer, text)
    return placed


def _essay(rng: Random) -> Iterator[str]:
    while True:
        (a, b), (n, m) = rng.sample(adjectives(), 2), rng.sample(nouns(), 2)
        yield rng.choice(_ESSAY).format(a=a, b=b, n=n, m=m)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ToolError(f"haystack {path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ToolError(
            f"haystack {path}: {error.strerror}; give noise, essay or a text file"
        ) from None


def _cut(text: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [part for line in sentences for part in textwrap.wrap(line, _LONGEST)]
