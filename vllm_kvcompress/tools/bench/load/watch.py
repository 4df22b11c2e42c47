"""Watches an engine's metrics while it works."""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ...errors import ToolError
from ...scrape import Read, read_metrics

PERIOD_S = 0.5
COUNTED = (
    "preemptions",
    "prefix_cache_hits",
    "compressions",
    "tokens_evicted",
    "blocks_freed",
    "logical_tokens",
    "retained_tokens",
)


class Watch:
    """Reads metrics twice a second, from ``with`` to its end.

    The first read must succeed.

    Attributes:
        reads: All that were had, in order.
    """

    def __init__(self, read: Callable[[], Read]) -> None:
        self.reads: list[Read] = []
        self._read = read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self.reads.append(self._read())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(PERIOD_S):
            self._take()
        threading.Event().wait(PERIOD_S)  # counters lag behind answers
        self._take()

    def _take(self) -> None:
        with contextlib.suppress(ToolError):  # too busy to answer now
            self.reads.append(self._read())

    def figures(self) -> dict[str, Any]:
        """What happened in between; peaks are those of the samples."""
        first, last = self.reads[0], self.reads[-1]
        return {
            **{name: _total(last, name) - _total(first, name) for name in COUNTED},
            "kv_usage_peak": max(
                (
                    figures.get("kv_cache_usage", 0.0)
                    for read in self.reads
                    for figures in read.engines.values()
                ),
                default=0.0,
            ),
            "running_peak": max(_total(read, "running") for read in self.reads),
        }


def _total(read: Read, name: str) -> float:
    return sum(figures.get(name, 0.0) for figures in read.engines.values())


def read_folder(folder: str) -> Read:
    """Read what a process leaves in its ``PROMETHEUS_MULTIPROC_DIR``.

    Raises:
        ToolError: It is being written.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    try:
        MultiProcessCollector(registry, path=folder)
        return read_metrics(generate_latest(registry).decode())
    except (OSError, RuntimeError, ValueError) as error:
        raise ToolError(f"{folder} cannot be read: {error}") from None
