"""A sweep as a table and as a plot.

Both read the records of its JSON file: an arm's fields, and its result or ``error``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .plan import STOCK

FLOOR = "random"
_MARKERS = "os^vDPX*<>"
_COLORS = [f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # C7 is grey
_GREY = "#8a8f98"

Record = Mapping[str, Any]


def cell(record: Record | None) -> str:
    """Right answers and KV blocks per request of one arm."""
    if record is None:
        return "-"
    if "error" in record:
        return "failed"
    return f"{record['accuracy']:.0%}\n{record['kv_blocks_per_request']:.1f}"


def table_rows(records: Sequence[Record], budgets: Sequence[int]) -> list[list[str]]:
    """One row per method, and per setting where a method takes no budget."""
    by_budget: dict[str, dict[int, Record]] = {}
    rows: dict[str, list[str]] = {}
    for record in records:
        method, budget = record["method"], record["budget"]
        if budget is not None:
            found = by_budget.setdefault(method, {})
            found[budget] = record
            rows[method] = [*(cell(found.get(b)) for b in budgets), ""]
            continue
        own = [f"{key}={value}" for key, value in record["parameters"].items()]
        rows["\n".join([method, *own])] = [*("" for _ in budgets), cell(record)]
    return [[name, *cells] for name, cells in rows.items()]


def sweep_table(records: Sequence[Record], budgets: Sequence[int], title: str) -> Table:
    """Methods by budgets; the last column holds what has no budget."""
    caption = "right answers, and below them KV blocks per decoding request"
    table = Table(title=title, title_justify="left", caption=caption, show_lines=True)
    table.add_column("budget", no_wrap=True)
    for head in (*map(str, budgets), "none"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in table_rows(records, budgets):
        table.add_row(*row)
    return table


def curves(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """Points of each method: tokens and accuracy, fewest tokens first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if "error" not in record:
            tokens = record["budget"] or record["kept_tokens"]
            point = (tokens, record["accuracy"])
            found.setdefault(record["method"], []).append(point)
    return {method: sorted(points) for method, points in found.items()}


def draw(records: Sequence[Record], title: str, file: Path) -> None:
    """Accuracy over budget: stock dashed, `FLOOR` a grey area, else a line each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    lines = curves(records)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for tokens, accuracy in lines.pop(STOCK, []):
        label = f"{STOCK} ({tokens:,.0f})"
        axis.axhline(accuracy, color="black", linestyle="--", label=label)
    if floor := lines.pop(FLOOR, []):
        sizes, shares = zip(*floor, strict=True)
        axis.fill_between(sizes, shares, color=_GREY, alpha=0.25)
        axis.plot(sizes, shares, color=_GREY, marker=".", label=FLOOR)
    for number, (method, points) in enumerate(lines.items()):
        axis.plot(
            *zip(*points, strict=True),
            color=_COLORS[number % len(_COLORS)],
            linestyle=("-", ":")[number % 2],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=max(4.0, 10 - 0.7 * number),  # so that equal points show
            label=method,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(-0.03, 1.05)
    axis.set_xlabel("tokens kept per KV head, in the mean of all layers")
    axis.set_ylabel("right answers")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if any("error" not in record for record in records):
        figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=110)
