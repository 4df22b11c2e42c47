"""How much memory a server takes, over time."""

import asyncio
import statistics

import psutil


class Memory:
    """Resident memory of a server's processes, over time."""

    def __init__(self, pid: int) -> None:
        server = psutil.Process(pid)
        self._seen = {
            process.name() if process.pid != pid else "API server": (process, [])
            for process in [server, *server.children(recursive=True)]
            if process.memory_info().rss > 100e6
        }

    async def watch(self) -> None:
        """Look twice a second, until cancelled."""
        while True:
            for process, seen in self._seen.values():
                seen.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    def quarters(self) -> dict[str, tuple[float, float]]:
        """MB in the second and in the last quarter, at the median."""
        return {
            name: (
                statistics.median(seen[len(seen) // 4 : len(seen) // 2]),
                statistics.median(seen[-len(seen) // 4 :]),
            )
            for name, (_, seen) in self._seen.items()
        }
