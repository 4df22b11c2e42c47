"""What has to hold in the scheduler after each step, whatever was planned."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from ...config import KEY
from ...plan import Compress, StepPlan
from ..manager import CompressedKVManager


class Violation(RuntimeError):
    """An invariant is broken."""


def require(holds: bool, *what: object) -> None:
    """Raise unless an invariant holds."""
    if not holds:
        raise Violation(f"{KEY} check: {' '.join(map(str, what))}")


@dataclass
class _Planned:
    """What plans said of a request since it was last admitted.

    Attributes:
        exact: Tokens that saw no compressed context.
        latest: Group -> its latest directive.
        stay: Group -> blocks in front of its private ones that are as computed.
    """

    exact: int
    latest: dict[int, Compress] = field(default_factory=dict)
    stay: dict[int, int] = field(default_factory=dict)


class Ledger:
    """All plans of a scheduler, to compare its pool and its managers with.

    Args:
        scheduler: A `CompressedScheduler`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        kv_cache_manager = scheduler.kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._managers = kv_cache_manager.coordinator.single_type_managers
        parallel = scheduler.vllm_config.parallel_config
        self._workers = parallel.tensor_parallel_size
        self._planned: dict[str, _Planned] = {}

    def note(self, plan: StepPlan) -> None:
        """Take down a step's plan, which has to follow from the ones before."""
        for request_id, groups in plan.compress.items():
            computed = self._scheduler.requests[request_id].num_computed_tokens
            pruned = any(directive.pruned for directive in groups.values())
            known = self._planned.setdefault(
                request_id, _Planned(0 if pruned else computed)
            )
            for group, directive in groups.items():
                what, size = _name(request_id, group), self._managers[group].block_size
                before = known.latest.get(group)
                shift = before.new_shift if before else 0
                require(directive.shift == shift, what, "lost", shift, directive)
                require(directive.new_shift >= shift, what, "grows", directive)
                whole = directive.end_block * size <= directive.num_tokens <= computed
                require(whole, what, "has", computed, "tokens", directive)
                known.latest[group] = directive
                stay = directive.candidates[0] // size if directive.candidates else 0
                known.stay[group] = min(stay, known.stay.get(group, stay))

    def forget(self, request_id: str) -> None:
        """The request loses its blocks."""
        self._planned.pop(request_id, None)

    def held(self, request_id: str) -> list[tuple[int, list[int]]]:
        """Of each group how many blocks a request has lost, and those it has."""
        found = []
        for manager in self._managers:
            blocks, shift = list(manager.req_to_blocks.get(request_id, ())), 0
            if state := getattr(manager, "_compressed", {}).get(request_id):
                shift = state.end_block - len(state.destination)
                blocks = state.destination + blocks[state.end_block :]
            found.append((shift, [block.block_id for block in blocks]))
        return found

    def check_read(self, held: dict[str, list[tuple[int, list[int]]]]) -> None:
        """What a step reads, by `held`, stays while it is computed.

        Raises:
            Violation: It was freed too early.
        """
        for request_id, groups in held.items():
            for group, (_, numbers) in enumerate(groups):
                what = _name(request_id, group)
                for number in numbers:
                    block = self._pool.blocks[number]
                    stays = block.is_null or block.ref_cnt > 0
                    require(stays, what, "block", number, "is read and free")

    def check(self, plan: StepPlan) -> None:
        """Check everything after a step was scheduled.

        Raises:
            Violation: Something does not hold.
        """
        self.check_pool()
        for request in self._scheduler.running:
            for group, manager in enumerate(self._managers):
                if isinstance(manager, CompressedKVManager):
                    self._check_group(request, group, manager, plan)
                self._check_exact(request.request_id, group, manager)

    def _check_group(
        self, request: Any, group: int, manager: CompressedKVManager, plan: StepPlan
    ) -> None:
        """What a running request holds is what was planned."""
        request_id = request.request_id
        what, known = _name(request_id, group), self._planned.get(request_id)
        directive = known.latest.get(group) if known else None
        state = manager._compressed.get(request_id)
        destination = state.destination if state else []
        numbers = tuple(block.block_id for block in destination)
        wanted = directive.destination if directive else ()
        require(numbers == wanted, what, "keeps", numbers, "and not", wanted)
        blocks = manager.req_to_blocks.get(request_id, ())
        end = directive.end_block if directive else 0
        nulls = [entry for entry, block in enumerate(blocks) if block.is_null]
        require(nulls == [*range(end)], what, "null are", nulls, "not the first", end)
        held, size = len(numbers) + len(blocks) - end, manager.block_size
        shift = directive.new_shift if directive else 0
        least = -(-request.num_computed_tokens // size) - shift
        # Drafts that were rejected leave blocks which the next step needs.
        drafts = self._scheduler.num_spec_tokens
        spare = -(-(drafts + self._scheduler.num_lookahead_tokens) // size)
        fits = least <= held <= least + spare
        require(fits, what, "holds", held, "blocks, and not", least)
        given_back = group in plan.compress.get(request_id, {}) or not (
            state and state.pending
        )
        require(given_back, what, "keeps originals")
        overflow = state.overflow if state else []
        require(not overflow or self._workers > 1, what, "has more than is kept")
        stay = known.stay[group] if directive and known else 0
        for block in destination[stay:] + overflow:
            self._check_private(what, block)
        self._check_borrowed(what, request_id, numbers, state, directive)

    def _check_private(self, what: str, block: KVCacheBlock) -> None:
        """No hash leads to a block that was filled, and it is in one request."""
        what = f"{what} private block {block.block_id}"
        require(not block.block_hash, what, "is hashed")
        require(block.ref_cnt == 1, what, "is not its own")

    def _check_borrowed(
        self,
        what: str,
        request_id: str,
        numbers: tuple[int, ...],
        state: Any,
        directive: Compress | None,
    ) -> None:
        """Merged blocks are in both groups of a pair, and one of them owns them."""
        borrowed = state.borrowed if state else set()
        if directive is None or directive.owner is None:
            # A later compression by another rule merges no more, and borrows still.
            require(borrowed <= {*numbers}, what, "borrows", borrowed, "of", numbers)
            return
        owner = self._managers[directive.owner]._compressed[request_id]
        owned = {block.block_id for block in owner.destination} - owner.borrowed
        both = owned & {*numbers}
        require(borrowed == both, what, "borrows", borrowed, "of", both)

    def _check_exact(self, request_id: str, group: int, manager: Any) -> None:
        """No block is hashed with a token that saw a compressed context."""
        if not (known := self._planned.get(request_id)):
            return
        first = known.exact // manager.block_size
        for block in manager.req_to_blocks.get(request_id, ())[first:]:
            what, number = _name(request_id, group), block.block_id
            exact = block.is_null or not block.block_hash
            require(exact, what, "block", number, "is hashed behind", known.exact)

    def check_pool(self) -> None:
        """No block is lost, or free and held, and hashes lead where they should."""
        holders: Counter[int] = Counter()
        for group, manager in enumerate(self._managers):
            for request_id, blocks in manager.req_to_blocks.items():
                lives = not blocks or request_id in self._scheduler.requests
                require(lives, _name(request_id, group), "is gone and holds blocks")
                holders.update(block.block_id for block in blocks)
            for state in getattr(manager, "_compressed", {}).values():
                for block in state.destination + state.overflow + state.pending:
                    holders[block.block_id] += block.block_id not in state.borrowed
        for _, blocks in self._scheduler.deferred_frees:
            holders.update(block.block_id for block in blocks)
        holders.update(transferred(self._scheduler.connector))
        self._check_stored()
        for block in self._pool.blocks[1:]:
            number = block.block_id
            if block.ref_cnt != holders[number]:
                raise Violation(
                    f"{KEY} check: block {number} has ref_cnt {block.ref_cnt}, and "
                    f"{self._holders(number) or 'nobody'} holds it"
                )
        queue = self._pool.free_block_queue.get_all_free_blocks()
        free = Counter(block.block_id for block in queue)
        for block in self._pool.blocks[1:]:
            times, wanted = free[block.block_id], int(block.ref_cnt == 0)
            number = block.block_id
            require(times == wanted, "block", number, "is free", times, "times")
        count = self._pool.get_num_free_blocks()
        require(
            len(queue) == count, "the pool counts", count, "free blocks", len(queue)
        )
        self._check_hashes()

    def _holders(self, number: int) -> str:
        """Requests and groups that hold a block, for a message."""
        found = [
            f"group {group} of request {request_id}"
            for group, manager in enumerate(self._managers)
            for request_id in {*manager.req_to_blocks}
            if number in self.held(request_id)[group][1]
        ]
        return " and ".join(found)

    def _check_hashes(self) -> None:
        """A hash leads to blocks that have it."""
        others = self._pool.cached_block_hashes_by_block
        for key, found in self._pool.cached_block_hash_to_block._cache.items():
            for block in found.values() if isinstance(found, dict) else [found]:
                number = block.block_id
                own = key == block.block_hash or key in others.get(number, ())
                require(own, "a hash leads to block", number, "which has another")

    def _check_stored(self) -> None:
        """What is being offloaded has a hash, so it is no private block."""
        for number in transferred(self._scheduler.connector, loads=False):
            hashed = self._pool.blocks[number].block_hash is not None
            require(hashed, "block", number, "is offloaded and has no hash")

    def check_idle(self) -> None:
        """Nothing is left when no request is.

        Raises:
            Violation: Something is.
        """
        pool, scheduler = self._pool, self._scheduler
        held = {*transferred(scheduler.connector)}
        lost = len(pool.blocks) - 1 - pool.get_num_free_blocks() - len(held)
        require(not lost, lost, "blocks are held, and there is no request")
        left = [
            *(scheduler._courses, scheduler._exact_tokens, self._planned),
            *(manager._compressed for manager in scheduler._managers.values()),
        ]
        require(not any(left), "something is left without a request", left)


def transferred(connector: Any, loads: bool = True) -> Iterator[int]:
    """Blocks that vLLM's connector holds until they are stored, or loaded."""
    if (manager := getattr(connector, "scheduler_manager", None)) is None:
        return
    found = [
        *manager._pending_finished_stores,
        *manager._store_event_to_blocks.values(),
        *manager._abandoned_store_event_to_blocks.values(),
    ]
    if loads:
        states = (manager._reqs_to_load, manager._abandoned_reqs_to_load)
        found += [load.transfer_meta for own in states for load in own.values()]
    for transfer in found:
        yield from transfer.gpu_block_ids


def _name(request_id: str, group: int) -> str:
    return f"request {request_id}, group {group}:"
