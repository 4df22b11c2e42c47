"""Blocks that tensor-parallel workers fill beyond the mean of a layer's KV heads.

The scheduler hands out one lot of blocks for all workers, before any of them has seen a
score. Where heads share out what a layer keeps, one worker's may come to hold more than
the mean: it fills blocks of `Compress.overflow`, and the rest goes back to the pool.
"""

from ..plan import Report, StepPlan
from .stages import StageCounts


class Overflow:
    """How many of these blocks each request fills on this worker's stage."""

    def __init__(self) -> None:
        # (request id, KV cache group) -> blocks, now and as last reported.
        self._filled: dict[tuple[str, int], int] = {}
        self._reported: dict[tuple[str, int], int] = {}
        self._stages = StageCounts()

    def fill(self, request_id: str, group: int, blocks: int) -> None:
        """So many are filled on the worker with the most."""
        self._filled[request_id, group] = blocks

    def forget(self, request_id: str) -> None:
        """The request is gone or starts anew."""
        for counts in (self._filled, self._reported):
            for key in [key for key in counts if key[0] == request_id]:
                del counts[key]

    def report(self, plan: StepPlan, report: Report) -> None:
        """Tell what became of a plan's overflow, once it was executed."""
        keys = [
            (request_id, group)
            for request_id, groups in plan.compress.items()
            for group, directive in groups.items()
            if directive.overflow
        ]
        if not keys:
            return
        counts = [self._filled.get(key, 0) for key in keys]
        for key, count in zip(keys, self._stages.sum_on_last(counts), strict=True):
            request_id, group = key
            report.overflow.setdefault(request_id, {})[group] = count
            report.blocks_freed += self._reported.get(key, 0) - count
            self._reported[key] = count
