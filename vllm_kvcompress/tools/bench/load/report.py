"""What `kvcompress bench serve` and `throughput` show in the end."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .arms import FP8, STOCK, Arm
from .folder import Record
from .judgement import LABELS, change, figures, verdict
from .points import Point

WIDTH = 150  # where the output is no terminal


def record_of(records: Sequence[Record], arm: str, point: Point) -> Record | None:
    """The run of an arm at a load, if it is done."""
    for record in records:
        load = Point(record["request_rate"], record["max_concurrency"])
        if record["arm"] == arm and load == point:
            return record
    return None


def load_table(point: Point, arms: Sequence[Arm], records: Sequence[Record]) -> Table:
    """All arms at one load; below a figure, its ratio to stock and to stock fp8."""
    runs = {arm.label: record_of(records, arm.label, point) for arm in arms}
    done = {label: record for label, record in runs.items() if record}
    table = Table(title=str(point), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    names = figures(list(done.values()))
    for name in names:
        table.add_column(LABELS[name], justify="right")
    for label, record in done.items():
        cells = [_cell(name, label, record, done) for name in names]
        table.add_row(label, *cells, end_section=True)
    return table


def _cell(name: str, label: str, record: Record, done: dict[str, Record]) -> Text:
    text = Text(_figure(name, record[name]))
    for base, ending in ((STOCK, ""), (FP8, " fp8")):
        if base == label or base not in done or label == STOCK:
            continue
        found = change(name, record, done[base])
        style = "red" if found.won is False else ""
        text.append(f"\n{found}{ending}", style)
    return text


def _figure(name: str, value: float) -> str:
    if name == "kv_usage_peak":
        return f"{value:.0%}"
    if name == "preemptions":
        return f"{value:g}"
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def sentences(
    points: Sequence[Point], arms: Sequence[Arm], records: Sequence[Record]
) -> list[str]:
    """What each arm wins and loses, and what is to be known of its runs."""
    told = []
    for arm in arms:
        runs = [(point, record_of(records, arm.label, point)) for point in points]
        done = [(point, record) for point, record in runs if record]
        for point, record in done:
            if record["failed"]:
                asked = record["failed"] + record["completed"]
                failed = f"{record['failed']:g} of {asked:g} requests failed"
                told.append(f"{arm.label}, {point}: {failed}.")
        if arm.method and done and not any(run["compressions"] for _, run in done):
            told.append(
                f"{arm.label}: nothing was compressed, so this arm shows only what "
                "the plugin costs; prompts may be shorter than its budget."
            )
        for base in (STOCK, FP8):
            if arm.label in (STOCK, base):
                continue
            pairs = [
                (record, other)
                for point, record in done
                if (other := record_of(records, base, point))
            ]
            if pairs:
                told.append(f"{arm.label} against {base}: {verdict(pairs)}")
    return told


def show(
    points: Sequence[Point], arms: Sequence[Arm], records: Sequence[Record]
) -> None:
    """Print a table per load, then the sentences."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for point in points:
        if any(record_of(records, arm.label, point) for arm in arms):
            console.print(load_table(point, arms, records))
    for sentence in sentences(points, arms, records):
        console.print(sentence, highlight=False, soft_wrap=True)
