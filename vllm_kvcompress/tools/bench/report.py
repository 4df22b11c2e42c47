"""What the benchmark shows in the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from .comparison import HIGHER_IS_BETTER, Comparison, lost

_LABELS = {
    "decode_tokens_per_s": "decode, tokens/s",
    "throughput_tokens_per_s": "throughput, tokens/s",
    "ttft_s": "time to first token, s",
    "peak_running": "requests at once",
    "kv_bytes_held": "KV held in decode, MiB",
    "preemptions": "preemptions",
}


def figure(key: str, value: float) -> str:
    """Write a figure as people read it."""
    if key == "kv_bytes_held":
        return f"{value / 2**20:,.1f}"
    if key in ("peak_running", "preemptions"):
        return f"{value:g}"
    return f"{value:,.3f}" if key == "ttft_s" else f"{value:,.1f}"


def shape_table(name: str, entry: Comparison) -> Table:
    """One shape's figures; the losing ones are marked."""
    arms = [arm for arm in ("stock", "fp8", "compressed", "limit") if arm in entry]
    table = Table(title=name, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in (*arms, "ratio", *(["ratio to fp8"] if "fp8" in entry else [])):
        table.add_column(column, justify="right")
    losing = lost(entry)
    for key in HIGHER_IS_BETTER:
        text = _times(entry["ratio"][key])
        to_fp8 = [_times(entry["ratio_to_fp8"][key])] if "fp8" in entry else []
        table.add_row(
            _LABELS[key],
            *(figure(key, entry[arm][key]) for arm in arms),
            f"{text} LOST" if key in losing else text,
            *to_fp8,
            style="red" if key in losing else "",
        )
    return table


def _times(change: float | None) -> str:
    return "-" if change is None else f"{change:.2f}x"


def verdict(name: str, entry: Comparison) -> str:
    """One shape's outcome in a sentence."""
    parts = []
    for key in lost(entry):
        change = entry["ratio"][key]
        by = "" if change is None else f" ({change:.2f}x)"
        parts.append(f"{_LABELS[key].partition(',')[0]}{by}")
    outcome = f"loses in {', '.join(parts)}" if parts else "loses in nothing"
    to_limit = entry.get("limit", {}).get("ratio_to_limit")
    reach = "" if to_limit is None else f"; decodes at {to_limit:.2f} of the limit"
    return f"{name}: compressed {outcome}{reach}."


def show(shapes: Mapping[str, Comparison]) -> None:
    """Print every shape's table, then who lost where."""
    console = Console()
    for name, entry in shapes.items():
        console.print(shape_table(name, entry))
    for name, entry in shapes.items():
        console.print(verdict(name, entry), highlight=False)
