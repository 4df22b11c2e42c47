"""One run against another: which figures are judged, and how."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...trace import ratio
from .folder import Record

JUDGED = {
    "request_throughput": True,
    "output_throughput": True,
    "median_ttft_ms": False,
    "p99_ttft_ms": False,
    "median_tpot_ms": False,
    "p99_tpot_ms": False,
    "preemptions": False,
}
"""Whether more of it is better."""
SHOWN = (*JUDGED, "kv_usage_peak")
"""A cache in full use is neither won nor lost, so that the peak is only shown."""
LABELS = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median TTFT, ms",
    "p99_ttft_ms": "p99 TTFT, ms",
    "median_tpot_ms": "median TPOT, ms",
    "p99_tpot_ms": "p99 TPOT, ms",
    "preemptions": "preemptions",
    "kv_usage_peak": "peak KV use",
}


@dataclass(frozen=True)
class Change:
    """A figure of one run beside that of another.

    Attributes:
        times: The ratio; None where the other is zero.
        won: Whether it is better; None: the same, or not judged.
    """

    times: float | None
    won: bool | None

    def __str__(self) -> str:
        text = "-" if self.times is None else f"{self.times:.2f}x"
        return f"{text} LOST" if self.won is False else text


def change(figure: str, record: Record, base: Record) -> Change:
    """Compare one figure of two runs."""
    value, other = record[figure], base[figure]
    won = None
    if figure in JUDGED and value != other:
        won = (value > other) == JUDGED[figure]
    return Change(ratio(value, other), won)


def figures(records: Sequence[Record]) -> list[str]:
    """The figures that all of these runs have."""
    return [
        name
        for name in SHOWN
        if all(record.get(name) is not None for record in records)
    ]


def verdict(pairs: Sequence[tuple[Record, Record]]) -> str:
    """What an arm wins and loses against another.

    Args:
        pairs: The arm's run and the other's, load by load.
    """
    outcomes: dict[bool, list[str]] = {True: [], False: []}
    for figure in figures([record for pair in pairs for record in pair]):
        changes = [change(figure, *pair) for pair in pairs]
        for won, told in outcomes.items():
            if found := [each.times for each in changes if each.won is won]:
                told.append(_summary(figure, found, len(pairs)))
    wins, losses = (", ".join(told) or "nothing" for told in outcomes.values())
    return f"wins in {wins}; loses in {losses}."


def _summary(figure: str, found: Sequence[float | None], loads: int) -> str:
    """The figure, how often, and the largest change."""
    often = f"{len(found)} of {loads}" if loads > 1 else ""
    known = [times for times in found if times]
    most = max(known, key=lambda times: max(times, 1 / times), default=None)
    by = "" if most is None else f"{most:.2f}x"
    told = ", ".join(part for part in (often, by) if part)
    name = LABELS[figure].partition(",")[0]
    return f"{name} ({told})" if told else name
