"""What came of a soak."""

from collections import Counter
from dataclasses import dataclass, field

from tests.engine.soak_memory import Growth

PREFIX = "vllm:kv_compression_"


@dataclass
class Report:
    """What came of a soak.

    Attributes:
        ends: How requests ended -> how many.
        wrong: One sentence on each thing that should not be.
        compared: Answers by how much of them was compared.
        memory: Process -> what became of it; of many requests only.
        metrics: Of the server when it is idle again.
        seconds: Of the load.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    memory: dict[str, Growth] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what)


def show(report: Report) -> None:
    """Print a report."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "count")
    for end, count in sorted(report.ends.items()):
        table.add_row(end, str(count))
    for how, count in sorted(report.compared.items()):
        table.add_row(f"answers compared {how}", str(count))
    for name in ("compressions", "tokens_evicted", "blocks_freed", "skipped"):
        count = report.metrics[f"{PREFIX}{name}_total"]
        table.add_row(f"counter {name}", f"{count:.0f}")
    count = report.metrics["vllm:num_preemptions_total"]
    table.add_row("preemptions", f"{count:.0f}")
    for name, (third, last, more) in report.memory.items():
        table.add_row(f"{name}, third and last quarter", f"{third:.0f}, {last:.0f} MB")
        table.add_row(f"{name}, more per 1,000 requests", f"{more:.1f} MB")
    table.add_row("seconds", f"{report.seconds:.0f}")
    table.add_row("wrong", str(len(report.wrong)))
    console = Console()
    console.print(table)
    for sentence in report.wrong[:20]:
        console.print(sentence[:500], markup=False)
