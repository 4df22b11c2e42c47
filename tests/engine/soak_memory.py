"""How much memory a server takes, over time."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil


class Growth(NamedTuple):
    """MB of one process.

    Attributes:
        third: In the third quarter of the requests, at the median.
        last: In the last one.
        per_thousand: How much more for each thousand requests from one to the other.
    """

    third: float
    last: float
    per_thousand: float


class Memory:
    """Memory of its own that each of a server's processes has, over time.

    That is what was allocated: pages of libraries, which come with the first call of
    each function, and pages that processes share do not count.
    """

    def __init__(self, pid: int) -> None:
        server = psutil.Process(pid)
        self._pids = {
            process.name() if process.pid != pid else "API server": process.pid
            for process in [server, *server.children(recursive=True)]
            if process.memory_info().rss > 100e6
        }
        # Requests so far, and MB.
        self.seen: dict[str, list[tuple[int, float]]] = {
            name: [] for name in self._pids
        }

    async def watch(self, done: Callable[[], int]) -> None:
        """Look twice a second, until cancelled; ``done`` counts requests."""
        while True:
            for name, pid in self._pids.items():
                self.seen[name].append((done(), _anonymous(pid)))
            await asyncio.sleep(0.5)

    def growth(self, requests: int) -> dict[str, Growth]:
        """What became of so many requests' memory in the second half."""
        return {
            name: _growth(requests, [point for point in seen if point[0] < requests])
            for name, seen in self.seen.items()
        }


def _growth(requests: int, seen: list[tuple[int, float]]) -> Growth:
    half, quarter = requests / 2, requests / 4
    third = median(mb for done, mb in seen if half <= done < half + quarter)
    last = median(mb for done, mb in seen if done >= half + quarter)
    return Growth(third, last, (last - third) / quarter * 1000)


def _anonymous(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no line 'Anonymous:'")
