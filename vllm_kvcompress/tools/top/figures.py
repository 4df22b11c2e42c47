"""Totals of all engines, rates between two reads, and the record of both."""

from collections.abc import Mapping
from typing import Any

from ..scrape import GAUGES, Figures, Read

SHARES = {
    "prefix_cache_hit_share": ("prefix_cache_hits", "prefix_cache_queries"),
    "retained_share": ("retained_tokens", "logical_tokens"),
    "seconds_per_compression": ("seconds", "compressions"),
}


def total(engines: Mapping[str, Figures]) -> Figures:
    """Sum over engines; of the share of the KV cache in use, the mean."""
    names = {name: None for figures in engines.values() for name in figures}
    result = {
        name: sum(figures.get(name, 0) for figures in engines.values())
        for name in names
    }
    if "kv_cache_usage" in result:
        result["kv_cache_usage"] /= len(engines)
    return result


def rates(before: Read | None, now: Read) -> dict[str, Figures] | None:
    """Counts per second by engine; None without an earlier read to compare with."""
    if before is None or restarted(before, now) or now.time <= before.time:
        return None
    seconds = now.time - before.time
    return {
        engine: {name: more / seconds for name, more in grown.items()}
        for engine, grown in _growth(before, now).items()
    }


def restarted(before: Read, now: Read) -> bool:
    """Whether counters began anew in between."""
    growth = _growth(before, now).values()
    fallen = any(more < 0 for grown in growth for more in grown.values())
    return fallen or before.started != now.started


def _growth(before: Read, now: Read) -> dict[str, Figures]:
    return {
        engine: {
            name: value - before.engines.get(engine, {}).get(name, 0)
            for name, value in figures.items()
            if name not in GAUGES.values()
        }
        for engine, figures in now.engines.items()
    }


def shares(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Ratios of counts, or of rates; None where nothing happened."""
    return {
        name: figures.get(part, 0) / figures[whole] if figures.get(whole) else None
        for name, (part, whole) in SHARES.items()
    }


def record(before: Read | None, now: Read) -> dict[str, Any]:
    """All figures, as they are written to JSON."""
    speeds = rates(before, now)

    def both(figures: Figures, speed: Figures | None) -> dict[str, Any]:
        return {
            "total": {**figures, **shares(figures)},
            "per_second": {**speed, **shares(speed)} if speed else None,
        }

    return {
        "models": sorted(now.models),
        "settings": now.settings,
        **both(total(now.engines), total(speeds) if speeds else None),
        "engines": {
            engine: both(figures, speeds[engine] if speeds else None)
            for engine, figures in now.engines.items()
        },
    }
