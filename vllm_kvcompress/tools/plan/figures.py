"""The numbers of a plan, as its JSON file has them."""

from collections.abc import Sequence
from typing import Any

from .methods import Option
from .pool import Pool

STOCK = "full cache"

Record = dict[str, Any]


def record(
    name: str,
    budget: int | None,
    pool: Pool,
    lengths: Sequence[int],
    space: int | None,
    limit: int,
) -> Record:
    """What one method makes of prompts of each length.

    Args:
        name: Of the method, or `STOCK`.
        budget: See `Option`.
        pool: Under the method.
        lengths: Tokens of prompts.
        space: Bytes for KV, None = unknown.
        limit: The longest prompt that counts.

    Returns:
        By length ``held_bytes`` when a prompt is read, ``peak_bytes`` before that and
        ``requests`` that fit; and ``longest``, the longest prompt that does.
    """
    size = pool.block_bytes
    found: Record = {
        "methods": [name],
        "budget": budget,
        "incremental": pool.config is not None and pool.config.most_tokens is not None,
        "held_bytes": {n: pool.held(n) * size for n in lengths},
        "peak_bytes": {n: pool.peak(n) * size for n in lengths},
    }
    if space is not None:
        found["requests"] = {n: pool.requests(n, space) for n in lengths}
        found["longest"] = pool.longest(space, limit)
    return found


def records(
    stock: Pool,
    options: Sequence[Option],
    lengths: Sequence[int],
    space: int | None,
    limit: int,
) -> list[Record]:
    """The full cache first; methods with the same numbers throughout are one."""
    by_method: dict[str, list[Record]] = {}
    for option in options:
        made = record(option.method, option.budget, option.pool, lengths, space, limit)
        by_method.setdefault(option.method, []).append(made)
    groups: list[list[Record]] = []
    for own in by_method.values():
        same = next((group for group in groups if _same(group, own)), None)
        if same is None:
            groups.append(own)
            continue
        for one in same:
            one["methods"] += own[0]["methods"]
    full = record(STOCK, None, stock, lengths, space, limit)
    return [full, *(one for group in groups for one in group)]


def _same(first: Sequence[Record], second: Sequence[Record]) -> bool:
    figures = [[{**one, "methods": None} for one in group] for group in (first, second)]
    return figures[0] == figures[1]
