"""Our schedulers, which check themselves and tell workers what to compare."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from ...plan import StepPlan
from ..scheduler import CompressedAsyncScheduler, CompressedScheduler
from .ledger import Ledger
from .seams import SEAMS
from .switch import Switch

logger = init_logger("vllm.plugins.kv_compression")


@dataclass(frozen=True)
class Expected:
    """What workers find in a step, by the scheduler.

    Attributes:
        computed: Request id -> its tokens after the step.
        held: Request id -> for each group how many blocks the request has lost, and
            those it has, while the step is computed.
        drafts: So many of the tokens may have been rejected in the meantime.
        stale: Blocks whose content nobody may read any more.
    """

    computed: dict[str, int]
    held: dict[str, list[tuple[int, list[int]]]]
    drafts: int
    stale: list[int]


class _StaleBlocks:
    """Notes which blocks of a pool nobody may read before they are written again."""

    def __init__(self, pool: Any) -> None:
        self._numbers = {pool.null_block.block_id}
        take, give_back = pool.get_new_blocks, pool.free_blocks

        def get_new_blocks(count: int) -> list[KVCacheBlock]:
            found: list[KVCacheBlock] = take(count)
            self._numbers.update(block.block_id for block in found)
            return found

        def free_blocks(blocks: Iterable[KVCacheBlock]) -> None:
            freed = list(blocks)
            give_back(freed)
            # With a hash they can still be hit.
            self._numbers.update(
                b.block_id for b in freed if not (b.ref_cnt or b.block_hash)
            )

        pool.get_new_blocks, pool.free_blocks = get_new_blocks, free_blocks

    def take(self) -> list[int]:
        """Those since the last call."""
        found, self._numbers = sorted(self._numbers), set()
        return found


class _Checked:
    """Mixed into one of our schedulers."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for seam in SEAMS:
            seam.resolve()
        super().__init__(*args, **kwargs)
        self._switch = Switch.read() or Switch()
        self._ledger = Ledger(self)
        pool = self.kv_cache_manager.block_pool
        self._stale = _StaleBlocks(pool) if self._switch.poison else None
        self._steps = 0
        self._held: dict[str, list[tuple[int, list[int]]]] = {}
        logger.warning(
            "KV compression checks its invariants in one of %d steps%s.",
            self._switch.every,
            ", and poisons stale blocks" * self._switch.poison,
        )

    @property
    def _due(self) -> bool:
        return self._steps % self._switch.every == 0

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Check what was scheduled, in the steps whose turn it is."""
        self._steps += 1
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        plan = getattr(output, "kv_compression", StepPlan())
        self._ledger.note(plan)
        if self._due:
            self._ledger.check(plan)
            self._ledger.check_read(self._held)
            output.kv_compression_check = Expected(
                {name: self.requests[name].num_computed_tokens for name in self._held},
                self._held,
                self.num_spec_tokens,
                self._stale.take() if self._stale else [],
            )
        return output

    def _plan(self: Any, scheduled: dict[str, int], *args: Any) -> StepPlan:
        """The forward still reads what requests hold before the plan."""
        if self._due:
            self._held = {name: self._ledger.held(name) for name in scheduled}
        return super()._plan(scheduled, *args)  # type: ignore[misc,no-any-return]

    def _free_request_blocks(self: Any, request: Request) -> None:
        self._ledger.forget(request.request_id)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing may be left once no request is."""
        found = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        self._check_idle()
        return found

    def finish_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The same when the last request is aborted."""
        found = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        self._check_idle()
        return found

    def _check_idle(self: Any) -> None:
        if not self.requests and not self.deferred_frees:
            self._ledger.check_idle()
            logger.info(
                "KV compression check: idle after %d steps, all %d blocks are free.",
                self._steps,
                len(self.kv_cache_manager.block_pool.blocks) - 1,
            )


class CheckedScheduler(_Checked, CompressedScheduler):
    """`CompressedScheduler`, checked."""


class CheckedAsyncScheduler(_Checked, CompressedAsyncScheduler):
    """`CompressedAsyncScheduler`, checked."""
