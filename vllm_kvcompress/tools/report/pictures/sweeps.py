"""Runs in order: over a load, or over context length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from ..compare import case_title, load_title
from ..records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, Run]]


@dataclass(frozen=True)
class Sweep:
    """What one panel shows: each arm's runs over one quantity, smallest first."""

    title: str
    quantity: str
    arms: dict[str, Points]

    @property
    def values(self) -> list[float]:
        """All values of the quantity."""
        return sorted({x for points in self.arms.values() for x, _ in points})

    def place(self, value: float) -> float:
        """Where a value stands on the axis: all at once, right of all others."""
        return 2 * max(v for v in self.values if v < inf) if value == inf else value

    def draw_axis(self, axis: "Axes") -> None:
        """A logarithmic axis with ticks at the values."""
        from matplotlib.ticker import NullLocator

        axis.set_xscale("log", base=2)
        labels = ["all" if value == inf else f"{value:,g}" for value in self.values]
        axis.set_xticks([self.place(value) for value in self.values], labels)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(self.quantity)


def _sweep(
    title: str, quantity: str, runs: Sequence[Run], x: Callable[[Run], float]
) -> Sweep:
    arms: dict[str, Points] = {}
    for run in sorted(runs, key=x):
        arms.setdefault(run.arm, []).append((x(run), run))
    return Sweep(title, quantity, arms)


def by_case(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of the same traffic."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(case_title(run), []).append(run)
    return found


def over_load(runs: Sequence[Run]) -> list[Sweep]:
    """A sweep per traffic and kind of load, if several loads were run."""
    found = []
    for title, own in by_case(runs).items():
        by_rate = [run for run in own if run.max_concurrency is None]
        at_once = [run for run in own if run.max_concurrency is not None]
        found += [
            _sweep(
                title, "requests at once", at_once, lambda r: r.max_concurrency or 0
            ),
            _sweep(
                title, "requests per second", by_rate, lambda r: r.request_rate or inf
            ),
        ]
    return [sweep for sweep in found if len(sweep.values) > 1]


def over_length(runs: Sequence[Run]) -> list[Sweep]:
    """A sweep per load, if several context lengths were run."""
    several = len({(run.dataset, run.output_len) for run in runs}) > 1
    loads: dict[str, list[Run]] = {}
    for run in runs:
        if run.input_len is not None:
            traffic = f", {run.dataset}, {run.output_len} out" if several else ""
            loads.setdefault(load_title(run) + traffic, []).append(run)
    found = [
        _sweep(title, "tokens of the prompt", own, lambda run: run.input_len or 0)
        for title, own in loads.items()
    ]
    return [sweep for sweep in found if len(sweep.values) > 1]
