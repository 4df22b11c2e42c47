"""Pareto fronts: accuracy against what it costs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..compare import case_title, pareto_front
from ..records import STOCK, Arm, Bench, Group
from .style import GREY, Palette, Picture, kept_axis, legend, panels, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _draw(
    arms: Sequence[Arm], costs: Sequence[float], less: bool, title: str, look: Palette
) -> "tuple[Figure, Axes]":
    """Points of cost and accuracy; the front in colour, joined and numbered."""

    def dot(method: str) -> dict[str, Any]:
        return {**look.look(method), "linestyle": "none", "markersize": 7}

    sign = -1 if less else 1
    accuracies = [arm.metrics.accuracy for arm in arms]
    points = list(zip(costs, accuracies, strict=True))
    front = pareto_front([(sign * x, y) for x, y in points])
    figure, (axis,) = panels([title])
    figure.set_size_inches(6.4, 4.6)
    beaten = [i for i in range(len(points)) if i not in front]
    if grey := [points[i] for i in beaten if arms[i].method != STOCK]:
        xs, ys = zip(*grey, strict=True)
        axis.scatter(xs, ys, color=GREY, s=28, label="beaten")
    for i in beaten:
        if arms[i].method == STOCK:
            axis.plot(*points[i], label="stock, beaten", **dot(STOCK))
    steps = "steps-post" if less else "steps-pre"
    xs, ys = zip(*sorted(points[i] for i in front), strict=True)
    axis.plot(xs, ys, color=GREY, linewidth=1, drawstyle=steps, zorder=1)
    for number, i in enumerate(sorted(front, key=points.__getitem__), 1):
        style = dot(arms[i].method)
        axis.plot(*points[i], label=f"{number} {arms[i].label}", zorder=3, **style)
        axis.annotate(
            str(number), points[i], (-5, 6), textcoords="offset points", ha="right"
        )
    percent(axis.yaxis)
    axis.set_ylim(-0.03, 1.1)
    axis.set_ylabel("accuracy")
    legend(figure, columns=2)
    return figure, axis


def kept_front(group: Group, look: Palette) -> Iterator[Picture]:
    """Accuracy over kept share."""
    arms = [arm for arm in group.arms if arm.kept_share is not None]
    if len(arms) < 2:
        return
    shares = [arm.kept_share or 0.0 for arm in arms]
    title = "accuracy over kept share"
    figure, axis = _draw(arms, shares, True, title, look)
    kept_axis(axis, shares)
    yield Picture(
        "pareto-kept",
        "Pareto front: accuracy over kept share",
        "Up and left is better. Grey arms are beaten: another keeps no more and "
        "answers no worse, and is better in one of the two.",
        figure,
    )


def throughput_fronts(group: Group, bench: Bench, look: Palette) -> Iterator[Picture]:
    """Accuracy over the highest throughput, for each case of a benchmark."""
    cases = {run.case: case_title(run) for run in bench.runs}
    for number, (case, title) in enumerate(cases.items()):
        best: dict[str, float] = {}
        for run in bench.runs:
            if run.case == case and run.output_throughput is not None:
                best[run.arm] = max(best.get(run.arm, 0.0), run.output_throughput)
        arms = [arm for arm in group.arms if arm.label in best]
        if len(arms) < 2:
            continue
        speeds = [best[arm.label] for arm in arms]
        figure, axis = _draw(arms, speeds, False, title, look)
        axis.set_xlim(left=0)
        axis.set_xlabel("highest throughput, output tokens/s")
        yield Picture(
            f"pareto-throughput-{number + 1}",
            f"Pareto front: accuracy over throughput, {title}",
            "Up and right is better. Grey arms are beaten: another is no slower and "
            "answers no worse, and is better in one of the two.",
            figure,
        )
