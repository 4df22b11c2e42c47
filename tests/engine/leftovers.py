"""What a process still knows of requests that are gone."""

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch


def holders(names: set[str]) -> Counter[str]:
    """Everything in this process that refers to one of the strings, by what it is.

    Args:
        names: Nobody but the caller may refer to them.
    """
    found: Counter[str] = Counter()
    for holder in _containers():
        if holder is names:
            continue
        # The collector does not look at keys that are strings.
        held = [*holder] if type(holder) is dict else []
        held += gc.get_referents(holder)
        if any(type(own) is str and own in names for own in held):
            found[_described(holder)] += 1
    return found


def ours() -> Counter[str]:
    """How many objects of this package's classes there are, and tensors."""
    found: Counter[str] = Counter()
    for each in _tracked():
        kind = type(each)
        if str(kind.__module__).startswith("vllm_kvcompress") or kind is torch.Tensor:
            found[kind.__qualname__] += 1
    return found


def _containers() -> Iterator[Any]:
    """All of them; the collector itself leaves out dicts and tuples of strings."""
    seen, tracked = set[int](), _tracked()
    skipped = {id(seen), id(tracked)}
    for each in tracked:
        if id(each) in skipped:
            continue
        yield each
        rest = [each]
        while rest:
            for own in gc.get_referents(rest.pop()):
                plain = type(own) in (dict, tuple) and not gc.is_tracked(own)
                if plain and id(own) not in seen:
                    seen.add(id(own))
                    rest.append(own)
                    yield own


def _tracked() -> list[Any]:
    gc.unfreeze()  # vLLM takes what it has built away from the collector
    gc.collect()
    return gc.get_objects()


def _described(holder: Any) -> str:
    """Its type, and who refers to it."""
    owners = {type(owner).__qualname__ for owner in gc.get_referrers(holder)}
    owners -= {"frame", "generator", "list"}  # of this search
    return f"{type(holder).__qualname__} of {', '.join(sorted(owners)[:5])}"
