"""Accuracy over compression, for all samples and by task."""

from collections.abc import Iterator

from ..records import FLOOR, Arm, Group
from .style import (
    GREY,
    Palette,
    Picture,
    budget,
    budget_axis,
    kept_axis,
    kept_share,
    legend,
    lines_of,
    panels,
    percent,
    variants,
)

ALL = "all samples"


def _accuracy(arm: Arm, task: str) -> float | None:
    return arm.metrics.accuracy if task == ALL else arm.metrics.of_task(task)


def accuracy(group: Group, look: Palette) -> Iterator[Picture]:
    """A line per method, stock dashed, chance a grey floor."""
    size, draw_axis, words = kept_share, kept_axis, "share of the KV cache that is kept"
    if not (lines := lines_of(group.arms)):
        # lm-evaluation-harness tells no counters.
        size, draw_axis, words = budget, budget_axis, "budget"
        lines = lines_of(group.arms, size)
    if not lines:
        return
    tasks = [ALL, *(group.tasks if len(group.tasks) > 1 else [])]
    number = variants((arms[0].method, name) for name, arms in lines.items())
    figure, axes = panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        stock = _accuracy(group.stock, task) if group.stock else None
        if stock is not None:
            axis.axhline(stock, color="black", linestyle="--", label="stock")
        for name, arms in lines.items():
            points = [(size(arm), _accuracy(arm, task)) for arm in arms]
            shown = [point for point in points if point[1] is not None]
            if not shown:
                continue
            shares, values = zip(*shown, strict=True)
            if arms[0].method == FLOOR:
                axis.fill_between(shares, values, color=GREY, alpha=0.25)
            style = look.look(arms[0].method, number[name])
            axis.plot(shares, values, label=name, **style)
        draw_axis(axis, [size(arm) or 1 for arms in lines.values() for arm in arms])
        percent(axis.yaxis)
        axis.set_ylim(-0.03, 1.05)
    axes[0].set_ylabel("accuracy")
    legend(figure)
    yield Picture(
        "accuracy",
        "Accuracy over compression",
        f"Accuracy over the {words}, a line per method; "
        "further left is less memory. Stock is dashed, the grey area is what keeping "
        "random tokens reaches.",
        figure,
    )
