"""What an arm's files say of it, and what its answers amount to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from .fidelity import Fidelity, pooled
from .folder import digest
from .plan import Arm

COUNTED = ("compressions", "tokens_evicted", "blocks_freed")
KV_COUNTERS = (*COUNTED, "logical_tokens", "retained_tokens")
Record = dict[str, Any]
Done = tuple[Record, Record]  # config and metrics of an arm


def arm_config(arm: Arm, common: Record) -> Record:
    """What an arm is, in the order in which one reads it.

    Args:
        arm: The arm.
        common: What all arms that answer the same questions share.
    """
    settings = arm.settings or {}
    return {
        "model": common["model"],
        "arm": arm.method,
        "label": arm.label,
        "settings": arm.settings,
        "budget": settings.get("budget"),
        "keep_ratio": settings.get("keep_ratio"),
        **common,
        "group": digest(common),
    }


def metrics(predictions: Sequence[Record], expected: int, by_depth: bool) -> Record:
    """Sum up.

    Args:
        predictions: Lines of the file, one at least; the first of each wave has its
            counters.
        expected: How many there will be in the end.
        by_depth: Whether depths were asked for, so that answers differ by them.
    """
    waves = [line["wave"] for line in predictions if line.get("wave")]
    cells = _grouped(
        predictions,
        lambda line: (
            line["task"],
            line["length"],
            line["depth"] if by_depth else None,
        ),
    )
    return {
        "complete": len(predictions) == expected,
        "samples": len(predictions),
        "accuracy": _accuracy(predictions),
        "by_task": {
            task: {
                "accuracy": _accuracy(lines),
                "samples": len(lines),
                "fidelity": _fidelity(lines),
            }
            for task, lines in _grouped(predictions, lambda line: line["task"]).items()
        },
        "cells": [
            {
                "task": task,
                "length": length,
                "depth": depth,
                "accuracy": _accuracy(lines),
                "samples": len(lines),
            }
            for (task, length, depth), lines in cells.items()
        ],
        "fidelity": _fidelity(predictions),
        "kv": _kv([wave["kv"] for wave in waves if wave["kv"]]),
        "seconds": round(sum(wave["seconds"] for wave in waves), 3),
    }


def _grouped(
    lines: Iterable[Record], key: Callable[[Record], Any]
) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def _accuracy(lines: Sequence[Record]) -> float:
    return fmean(line["score"] for line in lines)


def _fidelity(lines: Iterable[Record]) -> Record | None:
    found = [Fidelity(**line["fidelity"]) for line in lines if line["fidelity"]]
    total = pooled(found)
    return asdict(total) if total else None


def _kv(counters: Iterable[Record]) -> Record:
    """Counters of all waves; an arm that compressed nothing kept everything."""
    waves = list(counters)
    total = {name: sum(wave[name] for wave in waves) for name in KV_COUNTERS}
    logical, retained = total["logical_tokens"], total["retained_tokens"]
    return {
        "kept_share": retained / logical if logical else 1.0,
        **{name: total[name] for name in COUNTED},
    }
