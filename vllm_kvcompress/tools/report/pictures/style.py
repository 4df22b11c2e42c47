"""One look for all pictures: colours, panels, legends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records import FLOOR, STOCK, Arm

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow and black, which print badly or mean stock.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^vDPX*<>hp"
LINES = ("-", ":", "-.", (0, (5, 1)))
BLACK, GREY = "#000000", "#8a8f98"
SIZE_KEYS = ("budget", "keep_ratio", "compression_ratio")
PANEL = (3.1, 2.7)  # inches


@dataclass(frozen=True)
class Picture:
    """A figure, and what stands around it."""

    name: str
    title: str
    caption: str
    figure: Figure


class Palette:
    """The look of each method, the same in all pictures.

    Args:
        names: All methods of a report, and arms without a method.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._order = sorted(set(names) - {STOCK, FLOOR})

    def color(self, method: str) -> str:
        """Black is stock, grey the floor."""
        if method not in self._order:
            return GREY if method == FLOOR else BLACK
        return COLORS[self._order.index(method) % len(COLORS)]

    def look(self, method: str, variant: int = 0) -> dict[str, Any]:
        """What `Axes.plot` takes; variants of a method differ in their line."""
        color = self.color(method)
        if method not in self._order:
            line, marker = ("--", "s") if method == STOCK else ("-", ".")
            return {"color": color, "linestyle": line, "marker": marker}
        number = self._order.index(method)
        return {
            "color": color,
            "linestyle": LINES[(variant + number // len(COLORS)) % len(LINES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": max(4.5, 9 - 1.1 * number),  # so that equal points show
        }


def series(arm: Arm) -> str:
    """The line that an arm is a point of: its label without its size."""
    if arm.config.budget is None and arm.config.keep_ratio is None:
        return arm.method
    words = arm.label.split()
    return " ".join(word for word in words if word.partition("=")[0] not in SIZE_KEYS)


def kept_share(arm: Arm) -> float | None:
    """How much an arm keeps, as it was measured."""
    return arm.kept_share


def budget(arm: Arm) -> float | None:
    """How much an arm keeps, as it was asked to."""
    return arm.config.budget


def lines_of(
    arms: Iterable[Arm], size: Callable[[Arm], float | None] = kept_share
) -> dict[str, list[Arm]]:
    """Arms by line, smallest first; stock and arms of unknown size are left out."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.method != STOCK and size(arm) is not None:
            found.setdefault(series(arm), []).append(arm)
    for line in found.values():
        line.sort(key=lambda arm: size(arm) or 0)
    return dict(sorted(found.items()))


def variants(names: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Number each method's lines; names are pairs of method and line."""
    counts: dict[str, dict[str, int]] = {}
    for method, line in names:
        own = counts.setdefault(method, {})
        own.setdefault(line, len(own))
    return {line: number for own in counts.values() for line, number in own.items()}


def panels(
    titles: Sequence[str], columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of small panels, row by row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = columns or min(len(titles), 2 if len(titles) == 4 else 3)
    rows = -(-len(titles) // columns)
    width = max(columns * PANEL[0], 5.5)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08)
    figure = Figure(figsize=(width, rows * PANEL[1] + 0.6), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[: len(titles)]


def legend(figure: Figure, columns: int = 3) -> None:
    """One legend below for all panels."""
    found: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            found.values(),
            list(found),
            loc="outside lower center",
            ncols=min(columns, len(found)),
            frameon=False,
            fontsize=9,
        )


def percent(axis: Axis) -> None:
    """Write a share as percent; axis is an x or y axis."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def kept_axis(axis: Axes, sizes: Iterable[float]) -> None:
    """The x axis of kept shares; small ones are spread."""
    from matplotlib.ticker import NullLocator

    if min(sizes, default=1) < 0.2:
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.01, 0.03, 0.1, 0.3, 1])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(min(sizes) / 1.3, 1.15)
    percent(axis.xaxis)
    axis.set_xlabel("kept share of the KV cache")


def plain_log(axis: Axis) -> None:
    """A log scale that is labelled with plain numbers; axis is an x or y axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def budget_axis(axis: Axes, sizes: Iterable[float]) -> None:
    """The x axis of budgets, where kept shares are not known."""
    from matplotlib.ticker import NullLocator

    shown = sorted(set(sizes))
    axis.set_xscale("log", base=2)
    axis.set_xticks(shown, [f"{value:,g}" for value in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("budget, tokens per KV head")


def plain_symlog(axis: Axes, top: float) -> None:
    """A y axis from 0, logarithmic above 0.01."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-0.003, 2 * max(top, 0.01))  # room for markers
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
