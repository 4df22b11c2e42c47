"""The page's tables: what stands in which cell."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .compare import KEPT, Change, Comparison, case_title, load_title
from .records import STOCK, Bench, Group, Prediction

EXAMPLES = 3  # wrong answers shown of each arm
TITLES = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "TTFT median",
    "p99_ttft_ms": "TTFT p99",
    "median_tpot_ms": "TPOT median",
    "p99_tpot_ms": "TPOT p99",
    "running_peak": "requests at once",
    "preemptions": "preemptions",
}


@dataclass(frozen=True)
class Cell:
    """A text, and its class in the page: "won", "lost" or "text"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose rows begin with a heading.

    Attributes:
        prose: Columns hold text, not figures.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    prose: bool = False


def _row(values: Iterable[Any]) -> list[Cell]:
    return [
        v if isinstance(v, Cell) else Cell("–" if v is None else str(v)) for v in values
    ]


def _form(form: str, value: float | None) -> str | None:
    return None if value is None else form.format(value)


def change_cell(change: Change | None) -> Cell:
    """A ratio to stock; losses say so in words."""
    if change is None:
        return Cell("–")
    text = (
        f"{change.base:,g} → {change.value:,g}"
        if change.ratio is None
        else f"{change.ratio:.2f}x"
    )
    if change.lost:
        return Cell(f"{text} LOST", "lost")
    return Cell(text, "won" if change.gain else "")


def ratio_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Every arm and case, a column per figure."""
    names = list(dict.fromkeys(n for own in comparisons for n in own.changes))
    cased = any(own.case for own in comparisons)
    rows = [
        _row(
            [own.arm]
            + [Cell(own.case, "text")] * cased
            + [change_cell(own.changes.get(name)) for name in names]
        )
        for own in comparisons
    ]
    heads = ["arm", *["case"] * cased, *(TITLES.get(name, name) for name in names)]
    return Table(title, heads, rows)


def verdict(comparisons: Sequence[Comparison]) -> str:
    """How many figures won and lost, in a sentence."""
    changes = [
        change
        for own in comparisons
        for name, change in own.changes.items()
        if name != KEPT  # that less is kept goes without saying
    ]
    lost = sum(change.lost for change in changes)
    won = sum(change.gain > 0 for change in changes)
    return (
        f"Of {len(changes)} figures compared with stock, {won} are better, "
        f"{len(changes) - won - lost} equal and {lost} LOST."
    )


def eval_table(group: Group) -> Table:
    """What each arm answered right, kept and agreed to."""
    tasks = group.tasks if len(group.tasks) > 1 else []
    rows = []
    for arm in group.arms:
        own = arm.metrics
        near = own.fidelity.model_dump() if own.fidelity else {}
        kv = own.kv.model_dump() if own.kv else {}
        rows.append(
            _row(
                [
                    arm.label + ("" if own.complete else " (not complete)"),
                    f"{own.accuracy:.1%}",
                    *(_form("{:.1%}", own.of_task(task)) for task in tasks),
                    own.samples,
                    _form("{:.1%}", arm.kept_share),
                    _form("{:.1%}", near.get("agreement")),
                    _form("{:.4f}", near.get("kl")),
                    _form("{:,}", kv.get("compressions")),
                    _form("{:,}", kv.get("tokens_evicted")),
                    _form("{:,}", kv.get("blocks_freed")),
                    _form("{:,.0f}", own.seconds),
                ]
            )
        )
    heads = ["arm", "accuracy", *tasks, "samples", "kept share", "agreement"]
    heads += ["KL, nats/token", "compressions", "tokens evicted", "blocks freed"]
    return Table("Answers", [*heads, "seconds"], rows)


def cell_table(group: Group) -> Table | None:
    """What the heat maps show: a row per arm, task and depth, a column per length."""
    rows: dict[tuple, dict[int, str]] = {}
    for arm in group.arms:
        for cell in arm.metrics.cells:
            depth = "any" if cell.depth is None else f"{cell.depth:.0%}"
            own = rows.setdefault((arm.label, cell.task, depth), {})
            own[cell.length] = f"{cell.accuracy:.1%}"
    if not rows:
        return None
    lengths = sorted({length for own in rows.values() for length in own})
    heads = ["arm", "task", "depth", *(f"{length:,} tokens" for length in lengths)]
    cells = [
        _row(
            [label, Cell(task, "text"), depth, *(own.get(length) for length in lengths)]
        )
        for (label, task, depth), own in rows.items()
    ]
    return Table("Accuracy by depth and length", heads, cells)


def run_table(bench: Bench) -> Table:
    """All runs; repeated ones are their medians."""
    latencies = [key for key in TITLES if key.endswith("_ms")]
    rows = [
        _row(
            [
                run.arm,
                Cell(case_title(run), "text"),
                Cell(load_title(run), "text"),
                _form("{:,.1f}", run.output_throughput),
                *(_form("{:,.1f}", getattr(run, key)) for key in latencies),
                _form("{:g}", run.running_peak),
                _form("{:.0%}", run.kv_usage_peak),
                _form("{:g}", run.preemptions),
                _form("{:.1%}", run.kept_share),
                Cell(str(run.failed), "lost" if run.failed else ""),
                run.repeats,
            ]
        )
        for run in bench.runs
    ]
    heads = ["arm", "case", "load", TITLES["output_throughput"]]
    heads += [f"{TITLES[key]}, ms" for key in latencies]
    heads += [TITLES["running_peak"], "KV cache used", TITLES["preemptions"]]
    return Table("Runs", [*heads, "kept share", "failed", "runs"], rows)


def example_table(group: Group) -> Table | None:
    """Questions that stock answered better, and what the arm said instead."""
    if not (stock := group.stock):
        return None
    right = {_question(line): line for line in stock.predictions}
    rows = []
    for arm in group.arms:
        worse = [
            line
            for line in arm.predictions
            if (base := right.get(_question(line))) and line.score < base.score
        ]
        for line in worse[:EXAMPLES]:
            place = "" if line.depth is None else f", depth {line.depth:.0%}"
            where = f"{line.task}, {line.length:,} tokens{place}"
            expected = " | ".join(line.answers)
            said = right[_question(line)].output
            rows.append(_row([arm.label, where, expected, said, line.output]))
    heads = ["arm", "question", "expected", STOCK, "the arm"]
    title = f"Answers that got worse (the first {EXAMPLES} of each arm)"
    return Table(title, heads, rows, prose=True) if rows else None


def _question(line: Prediction) -> tuple:
    return (line.task, line.length, line.depth, line.sample)


def fields_tables(
    title: str, named: Mapping[str, Mapping[str, Any]], corner: str
) -> Iterator[Table]:
    """Fields of several folders: once what all share, and a row each for the rest."""
    keys = list(dict.fromkeys(key for fields in named.values() for key in fields))
    texts = {
        name: {key: _text(fields.get(key)) for key in keys}
        for name, fields in named.items()
    }
    first = next(iter(texts.values()))
    shared = [key for key in keys if len({own[key] for own in texts.values()}) == 1]
    own = [key for key in keys if key not in shared]
    if shared:
        rows = [_row([key, first[key]]) for key in shared]
        yield Table(f"{title}: the same for all", ["field", "value"], rows, prose=True)
    if own:
        rows = [_row([name, *(f[key] for key in own)]) for name, f in texts.items()]
        yield Table(f"{title}: where they differ", [corner, *own], rows, prose=True)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
