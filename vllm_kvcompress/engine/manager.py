"""Block accounting of compressed requests, per KV cache group.

A logical entry of a request's block list holds exactly its own tokens or is
null. Kept tokens live in private blocks beside the list, so nothing that indexes
the list by position can take them for token content.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ..budget import Fit, fit, shed
from ..plan import Compress


@dataclass
class _Compressed:
    """One request's private blocks.

    Attributes:
        end_block: Logical blocks ``[0, end_block)`` are null; their kept tokens lie
        destination: in these blocks, which are read only; those that were filled for
            it are never hashed and never shared.
        pending: Originals that the worker still reads in the current step.
        decided: Logical tokens ``[0, decided)`` have been candidates.
        shed: Blocks of generated tokens lost one by one, see `budget.shed`.
    """

    end_block: int = 0
    destination: list[KVCacheBlock] = field(default_factory=list)
    pending: list[KVCacheBlock] = field(default_factory=list)
    decided: int = 0
    shed: int = 0


class CompressedKVManager(FullAttentionManager):
    """Full attention's manager with a side list of private blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compressed: dict[str, _Compressed] = {}

    def shift(self, request_id: str) -> int:
        """Logical blocks that a request has lost so far."""
        state = self._compressed.get(request_id)
        return state.end_block - len(state.destination) if state else 0

    def fit(self, request_id: str, num_tokens: int, budget: int) -> Fit:
        """Lay out what a request holds of its first ``num_tokens``, see `budget.fit`.

        Block numbers count what it holds, from its private blocks on.
        """
        held = num_tokens - self.shift(request_id) * self.block_size
        return fit(held, budget, self.block_size)

    def shed(
        self, request_id: str, num_tokens: int, prompt: int, end: int, lost: int
    ) -> Fit:
        """Lay out the same when tokens that left the recent ones are decided upon.

        Args:
            request_id: A running request with
            num_tokens: so many tokens, and
            prompt: so many in its prompt, which all stay.
            end: Logical tokens from here on are recent.
            lost: Generated tokens that it should have lost since its prompt.
        """
        state = self._compressed.get(request_id, _Compressed())
        gone = self.shift(request_id) * self.block_size
        return shed(
            num_tokens - gone,
            max(prompt, state.decided) - gone,
            end - gone,
            lost // self.block_size - state.shed,
            self.block_size,
        )

    def compress(
        self,
        request_id: str,
        scorer: str,
        num_tokens: int,
        target: Fit,
        *,
        window: int = 0,
        pruned: bool = False,
    ) -> Compress | None:
        """Take blocks off a request's list, for the worker to empty.

        Args:
            request_id: A running request, and
            scorer: which method compresses it.
            num_tokens: Tokens that are computed after this step, or fewer.
            target: What is kept of them, from `fit` or `shed`.
            window: See `Compress`.
            pruned: See `Compress`.

        Returns:
            The directive, or None if no private blocks can be had now.
        """
        blocks = self.req_to_blocks[request_id]
        shift = self.shift(request_id)
        state = self._compressed.setdefault(request_id, _Compressed())
        end_block = target.end_block + shift
        source = state.destination + blocks[state.end_block : end_block]
        first = target.candidates[0] if target.candidates else 0
        stay = source[: first // self.block_size]
        source = source[len(stay) :]
        private = self._private_blocks(source, target.kept_blocks - len(stay))
        if private is None:
            return None
        taken = {block.block_id for block in private}
        destination = stay + private
        blocks[:end_block] = [self._null_block] * end_block
        state.end_block, state.destination = end_block, destination
        state.pending += [block for block in source if block.block_id not in taken]
        if target.candidates:
            state.decided = target.candidates[1] + shift * self.block_size
            state.shed += target.freed_blocks
        return Compress(
            scorer=scorer,
            num_tokens=num_tokens,
            end_block=end_block,
            destination=tuple(block.block_id for block in destination),
            shift=shift,
            window=window,
            candidates=target.candidates,
            pruned=pruned,
        )

    def _private_blocks(
        self, source: list[KVCacheBlock], count: int
    ) -> list[KVCacheBlock] | None:
        """Find ``count`` blocks that nobody else reads or can hit.

        Own blocks without a hash come first (prefix caching off), then free
        ones, then own unshared ones from the end, whose hash is dropped.
        """
        own = [block for block in source if block.ref_cnt == 1]
        found = [block for block in own if block.block_hash is None][:count]
        fresh = min(count - len(found), self.block_pool.get_num_free_blocks())
        hashed = [block for block in own if block.block_hash is not None]
        short = count - len(found) - fresh
        if short > len(hashed):
            return None
        found += self.block_pool.get_new_blocks(fresh)
        for block in hashed[len(hashed) - short :]:
            self.block_pool._maybe_evict_cached_block(block)
            found.append(block)
        return found

    def take_pending(self) -> list[KVCacheBlock]:
        """Originals whose reader is on its way, the first to be evicted first.

        They keep their hashes, so later requests with the prefix still hit them.
        """
        freed: list[KVCacheBlock] = []
        for state in self._compressed.values():
            freed += reversed(state.pending)
            state.pending = []
        return freed

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of a request that finishes, is aborted or is preempted."""
        blocks = super().pop_blocks_for_free(request_id)
        state = self._compressed.pop(request_id, None)
        if state is None:
            return blocks
        return [*state.pending, *state.destination, *blocks]
