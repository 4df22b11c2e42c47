"""Progress bars, a line per run, on stderr."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed


def progress_bars() -> Progress:
    """One line per arm, on stderr."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Elapsed(),
        console=Console(stderr=True),
    )


def task_adder(bars: Progress) -> Callable[[str], Callable[[float], None]]:
    """Return a function that adds a line and gives its updater, 0 to 1."""

    def add(label: str) -> Callable[[float], None]:
        task = bars.add_task(label, total=1.0)
        return lambda share: bars.update(task, completed=share)

    return add
