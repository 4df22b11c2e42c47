"""What has to hold after each step of a simulation, whatever was planned.

What needs no shadow memory is checked by the scheduler itself, as in check mode.
"""

from collections import Counter
from statistics import fmean
from typing import Any

from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request

from tests.shadow import BLOCK, MERGED, Slot
from tests.unit.course import Course, Next
from tests.unit.workloads import Workload
from vllm_kvcompress.config import KEY
from vllm_kvcompress.engine.check.ledger import require
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.metrics import REASONS


class Checks:
    """The invariants of the design, by their numbers there."""

    load: Workload
    scheduler: Any
    worker: Any
    pool: Any
    managers: Any
    content: dict[bytes, list[int]]
    seen: Counter[str]
    requests: dict[str, Request]

    def course(self, request: Request) -> Course:
        """What has to become of a request since it was last admitted."""
        raise NotImplementedError

    def check_dry(
        self, request_id: str, group: int, wanted: Next, merging: bool
    ) -> None:
        """A group, or a pair of them, waits for no other reason than private blocks.

        None has become free since it asked: blocks are freed between steps.
        """
        free, room = self.pool.get_num_free_blocks(), True
        owner = self.course(self.requests[request_id]).owners.get(group)
        pair = [owner, group] if merging and owner is not None else [group]
        for each in pair:
            manager, target = self.managers[each], wanted.targets[each]
            state = manager._compressed.get(request_id)
            stay = target.candidates[0] // BLOCK if target.candidates else 0
            listed = manager.req_to_blocks[request_id][: target.end_block]
            source = [b for b in listed if not b.is_null]
            source = (state.destination if state else []) + source
            own = [b for b in source[stay:] if b.ref_cnt == 1]
            need = target.kept - stay - (each != pair[0]) * target.merged
            room = room and len(own) + free >= need
            # Free ones are taken before own ones that can be hit.
            plain = [b for b in own if b.block_hash is None]
            free -= min(free, max(0, need - len(plain)))
        require(not room, request_id, "groups", pair, "wait with room for", wanted)

    def check_usage(self, output: EngineCoreOutput) -> None:
        """A request is told what the worker holds of it."""
        told = (output.kv_transfer_params or {})[KEY]
        require(told["skipped"] in (None, *REASONS), told)
        if self.load.in_flight > 1 or self.load.drafts:  # the worker is ahead
            return
        request = self.requests[output.request_id]
        require(told["waited"] == self.waited[request], told, self.waited[request])
        life, course = self.worker.lives[output.request_id], self.course(request)
        held = {group: len(life.held(group)) for group in course.tiers}
        freed = sum(course.lost(g) + course.borrowed(g) for g in held)
        wanted = (life.computed, round(fmean(held.values())), freed)
        names = ("logical_tokens", "retained_tokens", "blocks_freed")
        found = tuple(told[name] for name in names)
        require(found == wanted, told, "instead of", wanted)
        require(bool(life.kept) == (told["compressions"] > 0), told)
        tiers = {tier: held[group] for group, tier in course.tiers.items()}
        by_layer = sorted((layer, n) for tier, n in tiers.items() for layer in tier)
        by_layer = [n for _, n in by_layer] if len(tiers) > 1 else None
        require(told["retained_by_layer"] == by_layer, told, "instead of", by_layer)
        self.seen["told"] += bool(life.kept)

    def check_request(self, request: Request) -> None:
        """What a running request holds, in each group."""
        request_id = request.request_id
        life, course = self.worker.lives[request_id], self.course(request)
        for group, manager in enumerate(self.managers):
            blocks = manager.req_to_blocks[request_id]
            self.check_entries(blocks, life.slots[group])
            if not isinstance(manager, CompressedKVManager):
                continue
            state = manager._compressed.get(request_id)
            destination = state.destination if state else []
            known = [block.block_id for block in destination]
            kept = life.kept[group].destination if group in life.kept else ()
            require(known == list(kept), "the worker keeps", kept, "not", known)
            self.check_borrowed(request_id, group, course)
            nulls = [block.is_null for block in blocks]
            replaced = course.replaced[group]
            wanted = [entry < replaced for entry in range(len(blocks))]
            require(nulls == wanted, request_id, "null entries", nulls, wanted)
            # Invariant 5: as many blocks as budget.py says.
            kept, formula = len(destination), course.private[group]
            require(kept == formula, request_id, "keeps", kept, "and not", formula)
            held = nulls.count(False) + kept
            formula = -(-request.num_computed_tokens // BLOCK) - course.lost(group)
            # Drafts, rejected ones also, have slots, and one more each if drafting.
            more = -(-self.load.drafts * (1 + self.load.lookahead) // BLOCK)
            fits = formula <= held <= formula + more
            require(fits, request_id, "reads", held, "and not", formula)
            # Invariant 9: a prompt that is not compressed can be hit as ever.
            if not life.kept and self.load.caching:
                whole = min(life.prompt, life.computed) // BLOCK
                hashed = all(block.block_hash for block in blocks[:whole])
                require(hashed, request_id, "is not cached")

    def check_borrowed(self, request_id: str, group: int, course: Course) -> None:
        """Both groups of a pair know the same merged blocks, and one owns them."""
        state = self.managers[group]._compressed.get(request_id)
        shared = [
            block.block_id
            for block in (state.destination if state else ())
            if self.worker.memory[block.block_id][0][0] == MERGED
        ]
        count = course.merged[group]
        require(len(shared) == count, request_id, "merged", shared, "not", count)
        borrowed = state.borrowed if state else set()
        if group not in course.owners:
            require(not borrowed, request_id, "borrows", borrowed)
            return
        require(borrowed == {*shared}, request_id, "borrows", borrowed, "of", shared)
        owner = self.managers[course.owners[group]]._compressed.get(request_id)
        owned = [block.block_id for block in owner.destination] if owner else []
        common = [number for number in owned if number in borrowed]
        require(common == shared, request_id, "shares", shared, "owned", common)

    def check_entries(self, blocks: list[Any], slots: list[Slot]) -> None:
        """Invariant 1: a logical entry holds exactly its own tokens, or is null."""
        for entry, block in enumerate(blocks):
            own = slots[entry * BLOCK : (entry + 1) * BLOCK]
            found = self.worker.memory[block.block_id][: len(own)]
            require(block.is_null or found == own, "entry", entry, found, "not", own)

    def check_content(self) -> None:
        """Invariant 4: a hash stands for what a block holds."""
        for block in self.pool.blocks[1:]:
            if block.block_hash:
                number, group = block.block_id, get_group_id(block.block_hash)
                links = self.content[get_block_hash(block.block_hash)]
                found = self.worker.memory[number]
                exact = [(group, link) for link in links]
                require(found == exact, "hashed block", number, "holds", found)

    def check_end(self) -> None:
        """Invariant 10: nothing is left, and the counters meet."""
        executor = self.worker.compression
        left = [
            self.worker.lives,
            *(
                executor.row_shift(group)._shift_of
                for group in self.scheduler._managers
            ),
            *(window.queries for window in executor._windows),
        ]
        require(not any(left), "something is left", left)
        totals, seen = executor.totals, self.seen
        require(totals.compressions == seen["compressions"], "compressions", totals)
        require(totals.blocks_freed == seen["freed"], "freed blocks", totals)
        for what in ("evicted", "merged"):
            found, wanted = getattr(totals, f"tokens_{what}"), seen[what] * BLOCK
            require(found == wanted, what, found, "tokens and not", wanted)
        for scales in self.worker.scales():
            require(bool((scales == 1).all()), "factors are left")
