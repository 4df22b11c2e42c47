"""Words, numbers and UUIDs for keys and values, from the lists that RULER takes."""

import uuid
from collections.abc import Iterator
from functools import cache
from random import Random


@cache
def _category(name: str) -> list[str]:
    from wonderwords import RandomWord

    return RandomWord().filter(include_categories=[name])


def nouns() -> list[str]:
    """English nouns."""
    return _category("noun")


def adjectives() -> list[str]:
    """English adjectives."""
    return _category("adjective")


@cache
def _simple_words() -> list[str]:
    return sorted({*nouns(), *adjectives(), *_category("verb")})


def shuffled_words(rng: Random) -> Iterator[str]:
    """English words without end, each once: simple ones first, then compounds."""
    simple = _simple_words()
    yield from rng.sample(simple, len(simple))
    yield from distinct(rng, "words")


def distinct(rng: Random, kind: str) -> Iterator[str]:
    """Keys or values of a kind without end, no two the same."""
    seen: set[str] = set()
    while True:
        made = _draw(rng, kind)
        if made not in seen:
            seen.add(made)
            yield made


def _draw(rng: Random, kind: str) -> str:
    if kind == "words":
        return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise ValueError(f"no kind of key or value: {kind}")
