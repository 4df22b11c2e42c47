"""Needles: accuracy by depth and length, a panel per arm."""

from collections.abc import Iterator
from math import isnan, nan

from ..records import Arm, Group
from .style import Picture, panels

MAP = "cividis"  # reads alike with any colour vision, and in grey
FEW = 1000  # cells of all panels, into which numbers are written


def grid(
    arm: Arm, task: str, lengths: list[int], depths: list[float]
) -> list[list[float]]:
    """Accuracy, a row per depth; nan where nothing was asked."""
    cells = {
        (cell.depth, cell.length): cell.accuracy
        for cell in arm.metrics.cells
        if cell.task == task
    }
    return [[cells.get((depth, n), nan) for n in lengths] for depth in depths]


def heat_maps(group: Group) -> Iterator[Picture]:
    """One picture per task that has depths."""
    for task in group.tasks:
        cells = [c for arm in group.arms for c in arm.metrics.cells if c.task == task]
        depths = sorted({cell.depth for cell in cells if cell.depth is not None})
        if depths:
            lengths = sorted({cell.length for cell in cells})
            yield _heat_map(group, task, lengths, depths)


def _heat_map(
    group: Group, task: str, lengths: list[int], depths: list[float]
) -> Picture:
    columns = min(len(group.arms), 3 if len(group.arms) <= 9 else 5)
    figure, axes = panels([arm.label for arm in group.arms], columns)
    for number, (axis, arm) in enumerate(zip(axes, group.arms, strict=True)):
        values = grid(arm, task, lengths, depths)
        image = axis.imshow(values, vmin=0, vmax=1, cmap=MAP, aspect="auto")
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), list(map(_tokens, lengths)))
        axis.tick_params(axis="x", labelrotation=45 if len(lengths) > 8 else 0)
        axis.set_xlabel("tokens")
        axis.set_yticks(range(len(depths)), [""] * len(depths))
        if number % columns == 0:
            axis.set_yticklabels([f"{100 * depth:.0f} %" for depth in depths])
            axis.set_ylabel("depth of the needle")
        if len(group.arms) * len(lengths) * len(depths) <= FEW:
            _write(axis, values)
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, label="accuracy")
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    return Picture(
        f"needles-{task}",
        f"Needles found: {task}",
        "Accuracy in percent by length of the prompt and depth of the needle, from "
        "the start (0 %) to the end (100 %); a panel per arm, all on the same scale.",
        figure,
    )


def _tokens(count: int) -> str:
    return f"{count:,}" if count % 1024 else f"{count // 1024}k"


def _write(axis, values: list[list[float]]) -> None:
    """Write each cell's percentage into it."""
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not isnan(value):
                color = "white" if value < 0.5 else "black"
                place = {"ha": "center", "va": "center", "size": 8}
                axis.text(column, row, f"{100 * value:.0f}", color=color, **place)
