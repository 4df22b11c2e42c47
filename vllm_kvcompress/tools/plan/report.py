"""A plan as tables with a sentence each, and as a picture."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .figures import Record
from .pool import FORMATS, Pool

GIB = 2**30
_UNITS = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10))


def size(count: float) -> str:
    """Bytes as people read them: three digits."""
    for unit, bytes_ in _UNITS:
        if (value := count / bytes_) >= 0.9995:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:,.{digits}f} {unit}"
    return f"{count:,.0f} B"


def label(record: Record) -> str:
    """The methods of a row, and their budget."""
    first, *others = record["methods"]
    more = f" +{len(others)}" if others else ""
    budget = f", {record['budget']:,}" if record["budget"] else ""
    return f"{first}{more}{budget}"


def model_lines(pool: Pool) -> Iterator[str]:
    """What the model stores, in sentences."""
    model = pool.model
    full = len(model.full)
    parts = [f"all tokens in {full}"] * bool(full)
    for window in sorted({layer.window or 0 for layer in model.layers} - {0}):
        count = sum(layer.window == window for layer in model.layers)
        parts.append(f"a window of {window:,} in {count}")
    stored = " and ".join(parts)
    yield f"{model.architecture} stores {stored} of its {model.num_layers} layers."
    shapes = sorted({(layer.kv_heads, layer.elements) for layer in model.layers})
    each = " or ".join(
        f"one latent of {elements}"
        if model.mla
        else f"{heads} KV heads x 2 x {elements // 2}"
        for heads, elements in shapes
    )
    bits, scaled = FORMATS[pool.dtype]
    scales = ", and two scales of 4 bytes per KV head" if scaled else ""
    yield f"A token of a layer is {each} elements of {bits} bits{scales}."
    yield from (f"Note: {note}." for note in model.notes)


def full_table(pool: Pool, tokens: Sequence[int], batches: Sequence[int]) -> Table:
    """Bytes of the full cache, lengths by requests at once."""
    table = _table("tokens", [f"{n} at once" for n in batches])
    for length in tokens:
        held = pool.held(length) * pool.block_bytes
        table.add_row(f"{length:,}", *(size(held * batch) for batch in batches))
    return table


def figure_table(
    records: Sequence[Record], key: str, show: Callable[[float], str]
) -> Table:
    """One figure, methods by lengths; the last column is ``longest``, if counted."""
    counted = key == "requests"
    heads = [f"{n:,}" for n in lengths(records)] + ["longest"] * counted
    table = _table("tokens of the prompt", heads)
    for record in records:
        cells = [show(record[key][n]) for n in lengths(records)]
        cells += [f"{record['longest']:,}"] if counted else []
        table.add_row(label(record), *cells)
    return table


def _table(corner: str, heads: Sequence[str]) -> Table:
    table = Table()
    table.add_column(corner, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def held_sentence(records: Sequence[Record]) -> str:
    """Which method holds the least of the longest prompt."""
    length = max(lengths(records))
    held = [record["held_bytes"][length] for record in records]
    least = min(range(len(records)), key=held.__getitem__)
    if not least:
        return f"Of {length:,} tokens no method holds less than the full cache."
    return (
        f"Of {length:,} tokens {label(records[least])} holds the least: "
        f"{held[0] / held[least]:.1f} times less than the full cache."
    )


def peak_sentence(records: Sequence[Record]) -> str:
    """Why prompts take more than the full cache before they take less."""
    if any(record["incremental"] for record in records):
        return "A prompt is compressed while it is read; longer ones take no more."
    return (
        "A prompt is read whole before it is compressed, and what is kept is copied "
        'beside it (unless "prefill" is "incremental").'
    )


def requests_sentence(records: Sequence[Record], space: int) -> str:
    """How many more requests run with the best method, of the longest that do."""
    counts = {
        n: [record["requests"][n] for record in records] for n in lengths(records)
    }
    fitting = [n for n in counts if max(counts[n])]
    if not fitting:
        return f"No request of {min(counts):,} tokens fits into {size(space)}."
    length = max([n for n in fitting if counts[n][0]] or fitting)
    full, most = counts[length][0], max(counts[length])
    best = records[counts[length].index(most)]
    many = f"{full:,} request{'s' * (full != 1)} of {length:,} tokens"
    if most == full:
        return f"Into {size(space)} fit {many}."
    return (
        f"Into {size(space)} fit {many} with the full cache, {most:,} with "
        f"{label(best)}. What they answer takes more."
    )


def lengths(records: Sequence[Record]) -> list[int]:
    """The lengths that records are about."""
    return list(records[0]["held_bytes"])


def names(records: Sequence[Record]) -> Iterator[str]:
    """Spell out the rows that stand for several methods."""
    groups = {tuple(record["methods"]) for record in records}
    for first, *others in sorted(group for group in groups if len(group) > 1):
        yield f"{first} +{len(others)}: also {', '.join(others)}."


def show(
    stock: Pool,
    records: Sequence[Record],
    refused: Mapping[str, str],
    batches: Sequence[int],
    space: int | None,
    memory: Sequence[str],
) -> None:
    """Print all tables, each with its title above and its meaning below."""
    console = Console(highlight=False)

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, markup=False)

    def section(title: str, table: Table, *lines: str) -> None:
        console.print(f"\n{title}", style="bold")
        console.print(table)
        say(*lines)

    say(*model_lines(stock), *memory)
    section(
        "Full KV cache",
        full_table(stock, lengths(records), batches),
        f"In blocks of {stock.block_size} tokens, of {size(stock.block_bytes)} each.",
    )
    if len(records) > 1:
        section(
            "Held by one request after its prompt",
            figure_table(records, "held_bytes", size),
            held_sentence(records),
            *names(records),
        )
        section(
            "Held by one request at most, while its prompt is read",
            figure_table(records, "peak_bytes", size),
            peak_sentence(records),
        )
    if space is not None:
        section(
            "Requests that fit, and the longest prompt that does",
            figure_table(records, "requests", "{:,}".format),
            requests_sentence(records, space),
        )
    say(*_refusal_lines(refused))


def _refusal_lines(refused: Mapping[str, str]) -> Iterator[str]:
    for reason in dict.fromkeys(refused.values()):
        methods = [name for name, own in refused.items() if own == reason]
        yield f"Not planned: {', '.join(methods)}: {reason}."


def draw(curves: Sequence[Record], title: str, space: int | None, file: Path) -> None:
    """KV bytes held over the length of the prompt, a line per row."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, record in enumerate(curves):
        axis.plot(
            lengths(curves),
            [count / GIB for count in record["held_bytes"].values()],
            color="black" if not number else f"C{(number - 1) % 10}",
            linestyle="--" if not number else ("-", ":")[(number - 1) // 10 % 2],
            linewidth=max(1.0, 3.5 - 0.3 * number),  # so that equal lines show
            label=label(record),
        )
    if space is not None:
        axis.axhline(space / GIB, color="red", linewidth=0.8, label="memory for KV")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("KV held by one request, GiB")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=110)
