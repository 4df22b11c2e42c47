"""An evaluation in tables, one per task, from the configs and metrics of its arms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from ..trace import ratio
from .plan import STOCK

Record = Mapping[str, Any]
HEADS = ("accuracy", "to stock", "kept", "agreement", "KL")
CAPTION = (
    "kept: share of the prompts' tokens that were held. agreement and KL of the next "
    "token against stock along stock's own answer; KL, in nats, is a lower bound"
)
PREFIX_ONLY = ", up to where the answers part: the server cannot be made to follow it"


def tables(arms: Sequence[tuple[Record, Record]]) -> Iterator[Table]:
    """Make the tables.

    Args:
        arms: Config and metrics of each, stock among them.
    """
    tasks = dict.fromkeys(task for _, found in arms for task in found["by_task"])
    for task in tasks:
        those = [(config, found) for config, found in arms if task in found["by_task"]]
        yield _table(task, those)


def _table(task: str, arms: Sequence[tuple[Record, Record]]) -> Table:
    config, first = arms[0]
    caption = None
    if config["fidelity"]:
        caption = CAPTION + (PREFIX_ONLY if config["fidelity"] == "prefix" else "")
    lengths = ", ".join(f"{length:,}" for length in config["lengths"])
    size = f" of {lengths} tokens" if lengths else ""  # else the task's own
    table = Table(
        title=f"{task}: {first['by_task'][task]['samples']} samples{size}, "
        f"question {config['question']} the compressed prompt",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("", overflow="fold")
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    stock = next(
        (found["by_task"][task]["accuracy"] for c, found in arms if c["arm"] == STOCK),
        None,
    )
    for each, found in arms:
        table.add_row(*row(each, found["by_task"][task], found["kv"], stock))
    return table


def row(config: Record, task: Record, kv: Record | None, stock: float | None) -> list:
    """One arm of one task."""
    to_stock = ratio(task["accuracy"], stock) if stock is not None else None
    near = task.get("fidelity")
    return [
        config["label"],
        f"{task['accuracy']:.1%}",
        "-" if to_stock is None else f"{to_stock:.2f}",
        kept(config, kv),
        f"{near['agreement']:.1%}" if near else "-",
        f"{near['kl']:.4f}" if near else "-",
    ]


def kept(config: Record, kv: Record | None) -> str:
    """The share that was kept, or that nothing was compressed at all."""
    if config["arm"] != STOCK and kv is not None and not kv["compressions"]:
        return "[yellow]nothing compressed[/]"
    return "-" if kv is None else f"{kv['kept_share']:.1%}"
