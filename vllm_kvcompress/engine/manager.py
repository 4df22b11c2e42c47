"""Block accounting of compressed requests, per KV cache group.

A logical entry of a request's block list holds exactly its own tokens or is
null. Kept tokens live in private blocks beside the list, so nothing that indexes
the list by position can take them for token content.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ..budget import Fit, absorbed, fit, shed
from ..plan import Compress


@dataclass
class _Compressed:
    """One request's private blocks.

    Attributes:
        end_block: Logical blocks ``[0, end_block)`` are null; their kept tokens lie
        destination: in these blocks, which are read only; those that were filled for
            it are never hashed and never shared.
        merges: Whether some of them hold merged tokens.
        borrowed: Numbers of those that another group's state of the request frees.
        pending: Originals that the worker still reads in the current step.
        decided: Logical tokens ``[0, decided)`` have been candidates.
        shed: Blocks of generated tokens lost one by one, see `budget.shed`.
        overflow: Blocks beside the destination, for workers whose KV heads keep more.
        latest: What was planned for it last.
    """

    end_block: int = 0
    destination: list[KVCacheBlock] = field(default_factory=list)
    merges: bool = False
    borrowed: set[int] = field(default_factory=set)
    pending: list[KVCacheBlock] = field(default_factory=list)
    decided: int = 0
    shed: int = 0
    overflow: list[KVCacheBlock] = field(default_factory=list)
    latest: Compress | None = None


class CompressedKVManager(FullAttentionManager):
    """Full attention's manager with a side list of private blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compressed: dict[str, _Compressed] = {}

    def compressed(self, request_id: str) -> bool:
        """Whether a request has private blocks."""
        return bool(self._compressed.get(request_id, _Compressed()).destination)

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

    def absorb(self, request_id: str, num_tokens: int, borrows: bool) -> Fit:
        """Lay out the same when the whole blocks behind the merged ones merge."""
        first = len(self._compressed[request_id].destination) * self.block_size
        held = num_tokens - self.shift(request_id) * self.block_size
        return absorbed(held, first, self.block_size, borrows)

    def merges(self, request_id: str) -> bool:
        """Whether a request has merged blocks."""
        state = self._compressed.get(request_id)
        return state is not None and state.merges

    def reserve(
        self, request_id: str, target: Fit, workers: int = 1
    ) -> list[KVCacheBlock] | None:
        """Find private blocks for a request; `compress` or `release` comes next.

        Args:
            request_id: A running request.
            target: What is to be kept of it, from `fit`, `shed` or `absorb`.
            workers: So many share this out between their KV heads as they come to
                need it: one may keep all of it, but no more than it holds.

        Returns:
            None if so many cannot be had now.
        """
        stay, source = self._source(request_id, target)
        count = target.own_blocks - len(stay)
        return self._private_blocks(source, min(count * workers, len(source)))

    def release(
        self, request_id: str, target: Fit, private: list[KVCacheBlock]
    ) -> None:
        """Give back what `reserve` found."""
        _, source = self._source(request_id, target)
        own = {block.block_id for block in source}
        self.block_pool.free_blocks(b for b in private if b.block_id not in own)

    def compress(
        self,
        request_id: str,
        scorer: str,
        num_tokens: int,
        target: Fit,
        private: list[KVCacheBlock],
        *,
        window: int = 0,
        pruned: bool = False,
        owner: int | None = None,
    ) -> Compress:
        """Take blocks off a request's list, for the worker to empty.

        Args:
            request_id: A running request, and
            scorer: which method compresses it.
            num_tokens: Tokens that are computed after this step, or fewer.
            target: What is kept of them.
            private: From `reserve`, behind the merged blocks of an owner; those that
                are not needed in the mean of all KV heads come last.
            window: See `Compress`.
            pruned: See `Compress`.
            owner: See `Compress`.
        """
        blocks = self.req_to_blocks[request_id]
        shift = self.shift(request_id)
        state = self._compressed.setdefault(request_id, _Compressed())
        end_block = target.end_block + shift
        stay, source = self._source(request_id, target)
        taken = {block.block_id for block in private}
        kept = target.kept_blocks
        destination, overflow = (stay + private)[:kept], (stay + private)[kept:]
        self._drop_hashes(private)
        blocks[:end_block] = [self._null_block] * end_block
        state.end_block, state.destination = end_block, destination
        state.pending += [block for block in source if block.block_id not in taken]
        state.merges |= target.merged_blocks > 0
        if owner is not None:
            state.borrowed |= {b.block_id for b in private[: target.merged_blocks]}
        if target.candidates:
            state.decided = target.candidates[1] + shift * self.block_size
            state.shed += target.freed_blocks
        state.overflow = overflow
        state.latest = Compress(
            scorer=scorer,
            num_tokens=num_tokens,
            end_block=end_block,
            destination=tuple(block.block_id for block in destination),
            shift=shift,
            window=window,
            candidates=target.candidates,
            pruned=pruned,
            merged_blocks=target.merged_blocks,
            owner=owner,
            overflow=tuple(block.block_id for block in overflow),
        )
        return state.latest

    def settle(self, request_id: str, directive: Compress, used: int) -> bool:
        """Give back the overflow that no worker has filled.

        Args:
            request_id: The request;
            directive: what was planned for it.
            used: Blocks of the overflow that are filled.

        Returns:
            Whether this is what the request still holds.
        """
        state = self._compressed.get(request_id)
        if state is None or state.latest is not directive:
            return False
        self.block_pool.free_blocks(state.overflow[used:])
        del state.overflow[used:]
        return True

    def _source(
        self, request_id: str, target: Fit
    ) -> tuple[list[KVCacheBlock], list[KVCacheBlock]]:
        """What a request holds of the replaced blocks: those that stay, and others."""
        state = self._compressed.get(request_id, _Compressed())
        end_block = target.end_block + self.shift(request_id)
        blocks = self.req_to_blocks[request_id][state.end_block : end_block]
        held = state.destination + blocks
        first = target.candidates[0] if target.candidates else 0
        stay = first // self.block_size
        return held[:stay], held[stay:] + state.overflow

    def _private_blocks(
        self, source: list[KVCacheBlock], count: int
    ) -> list[KVCacheBlock] | None:
        """Find ``count`` blocks that nobody else reads or can hit.

        Own blocks without a hash come first (prefix caching off), then free
        ones, then own unshared ones from the end, which `compress` unhashes.
        """
        own = [block for block in source if block.ref_cnt == 1]
        found = [block for block in own if block.block_hash is None][:count]
        fresh = min(count - len(found), self.block_pool.get_num_free_blocks())
        hashed = [block for block in own if block.block_hash is not None]
        short = count - len(found) - fresh
        if short > len(hashed):
            return None
        found += self.block_pool.get_new_blocks(fresh)
        return found + hashed[len(hashed) - short :]

    def _drop_hashes(self, private: list[KVCacheBlock]) -> None:
        """Own blocks are about to be filled with other tokens."""
        for block in private:
            if block.block_hash is not None:
                self.block_pool._maybe_evict_cached_block(block)

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
        private = [b for b in state.destination if b.block_id not in state.borrowed]
        return [*state.pending, *private, *state.overflow, *blocks]
