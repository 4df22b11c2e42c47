"""How many requests ran at once: bars per arm."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..records import Bench
from .style import PANEL, Palette, Picture
from .sweeps import by_case

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def arm_bars(
    bench: Bench, cases: Mapping[str, Mapping[str, float]], label: str, look: Palette
) -> "Figure":
    """Horizontal bars, stock on top, a panel per case."""
    from matplotlib.figure import Figure

    methods = bench.methods
    height = 0.33 * len(bench.arms) + 0.9
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(
        figsize=(max(6.4, 1.4 * columns * PANEL[0]), rows * height),
        layout="constrained",
    )
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes, cases.items(), strict=False):
        arms = [arm for arm in bench.arms if arm in values]
        bars = axis.barh(
            arms,
            [values[arm] for arm in arms],
            color=[look.color(methods[arm]) for arm in arms],
        )
        texts = [f"{values[arm]:,.{0 if values[arm] >= 100 else 3}g}" for arm in arms]
        axis.bar_label(bars, texts, padding=3, fontsize=9)
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    return figure


def capacity(bench: Bench, look: Palette) -> Iterator[Picture]:
    """The most requests that ran at once, over all loads of a case."""
    cases: dict[str, dict[str, float]] = {}
    for title, runs in by_case(bench.runs).items():
        for run in runs:
            if run.running_peak is not None:
                own = cases.setdefault(title, {})
                own[run.arm] = max(own.get(run.arm, 0.0), run.running_peak)
    if cases:
        yield Picture(
            "capacity",
            "KV capacity",
            "The most requests that ran at once, under any load of a case.",
            arm_bars(bench, cases, "requests at once", look),
        )
