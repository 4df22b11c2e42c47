"""Arms against stock: ratios, who lost, and who is beaten in everything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..trace import ratio
from .records import STOCK, Bench, Group, Run

ACCURACY, KEPT = "accuracy", "kept share"
HIGHER_IS_BETTER = {
    "output_throughput": True,
    "median_ttft_ms": False,
    "p99_ttft_ms": False,
    "median_tpot_ms": False,
    "p99_tpot_ms": False,
    "running_peak": True,
    "preemptions": False,
}


@dataclass(frozen=True)
class Change:
    """One figure of an arm beside stock's.

    Attributes:
        gain: Above 0 where the arm is better, below where it lost.
    """

    value: float
    base: float
    gain: float

    @classmethod
    def of(
        cls, value: float | None, base: float | None, higher: bool
    ) -> "Change | None":
        """Compare; None where one of them was not measured."""
        if value is None or base is None:
            return None
        return cls(value, base, value - base if higher else base - value)

    @property
    def ratio(self) -> float | None:
        """The arm's over stock's; None where stock's is zero."""
        return ratio(self.value, self.base)

    @property
    def lost(self) -> bool:
        """Whether stock is better."""
        return self.gain < 0


@dataclass(frozen=True)
class Comparison:
    """An arm against stock, in one case."""

    arm: str
    case: str
    changes: dict[str, Change]


def eval_comparisons(group: Group) -> Iterator[Comparison]:
    """Accuracy of all samples and by task, and what is kept."""
    if not (stock := group.stock):
        return
    for arm in group.arms:
        if arm is stock:
            continue
        own, base = arm.metrics, stock.metrics
        found = {ACCURACY: Change.of(own.accuracy, base.accuracy, True)}
        for task in group.tasks if len(group.tasks) > 1 else []:
            found[task] = Change.of(own.of_task(task), base.of_task(task), True)
        found[KEPT] = Change.of(arm.kept_share, stock.kept_share, False)
        yield Comparison(arm.label, "", _measured(found))


def bench_comparisons(bench: Bench) -> Iterator[Comparison]:
    """Every run for which stock has one of the same case and load."""
    stock = {(r.case, r.load): r for r in bench.runs if r.arm == STOCK}
    for run in bench.runs:
        base = stock.get((run.case, run.load))
        if run.arm == STOCK or base is None:
            continue
        found = {
            key: Change.of(getattr(run, key), getattr(base, key), higher)
            for key, higher in HIGHER_IS_BETTER.items()
        }
        yield Comparison(
            run.arm, f"{case_title(run)}, {load_title(run)}", _measured(found)
        )


def _measured(found: dict[str, Change | None]) -> dict[str, Change]:
    return {name: change for name, change in found.items() if change}


def case_title(run: Run) -> str:
    """The traffic of a run in words."""
    parts = [run.dataset] * bool(run.dataset)
    if run.input_len is not None:
        out = "?" if run.output_len is None else f"{run.output_len:,}"
        parts.append(f"{run.input_len:,} in, {out} out")
    if run.kind == "throughput":
        parts.append("offline")
    return ", ".join(parts) or run.kind


def load_title(run: Run) -> str:
    """How much was asked for at once, in words."""
    parts = []
    if run.max_concurrency is not None:
        parts.append(f"{run.max_concurrency:,} at once")
    if run.request_rate is not None and run.request_rate < float("inf"):
        parts.append(f"{run.request_rate:g} requests/s")
    return ", ".join(parts) or "all at once"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats, more being better in both; leftmost first.

    A point is beaten by one that is as good in both and better in one.
    """
    order = sorted(range(len(points)), key=lambda i: points[i], reverse=True)
    front: list[int] = []
    for i in order:
        best = points[front[-1]] if front else None
        if best is None or points[i][1] > best[1] or points[i] == best:
            front.append(i)
    return front[::-1]
