"""Who answers: what an engine of our own and a running server have in common."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .conversation import Outcome, Question, Reference, Rules
from .metrics import KV_COUNTERS
from .plan import Arm

T = TypeVar("T")
Work = Sequence[tuple[Question, Reference | None]]
Kv = dict[str, float]


@dataclass(frozen=True)
class Wave:
    """Questions that were answered together, and what that took.

    Nothing else was under way, so the counters are these questions' own.

    Attributes:
        outcomes: In the order of the questions.
        kv: How far the plugin's counters went; None for stock.
        seconds: From the first request to the last answer.
    """

    outcomes: list[Outcome]
    kv: Kv | None
    seconds: float


class Target(Protocol):
    """Answers questions as an arm would."""

    def waves(self, arm: Arm, work: Work, rules: Rules, log: Any) -> Iterator[Wave]:
        """Answer in order, so many at a time; a `ToolError` ends an arm."""


def kv_since(before: Mapping[str, Any], after: Mapping[str, Any]) -> Kv:
    """How far the counters of interest went."""
    return {name: after[name] - before[name] for name in KV_COUNTERS}


def in_waves(work: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut work into parts of so many questions."""
    return (work[first : first + size] for first in range(0, len(work), size))
