"""Block accounting of compressed requests, per KV cache group.

A logical entry of a request's block list holds exactly its own tokens or is
null. Kept tokens live in private blocks beside the list, so nothing that indexes
the list by position can take them for token content.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from ..budget import Fit
from ..plan import Compress


@dataclass
class _Compressed:
    """One request's private blocks.

    Attributes:
        destination: Hold the kept tokens; never hashed, never shared.
        pending: Originals that the worker still reads in the current step.
    """

    destination: list[KVCacheBlock]
    pending: list[KVCacheBlock] = field(default_factory=list)


class CompressedKVManager(FullAttentionManager):
    """Full attention's manager with a side list of private blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compressed: dict[str, _Compressed] = {}

    def compress(self, request_id: str, fit: Fit, num_tokens: int) -> Compress | None:
        """Take a prompt's blocks off its list, for the worker to empty.

        Args:
            request_id: A running request whose prompt is computed in this step.
            fit: What is kept, see `budget.fit`.
            num_tokens: Length of the prompt.

        Returns:
            The directive, or None if no private blocks can be had now.
        """
        blocks = self.req_to_blocks[request_id]
        source = blocks[: fit.end_block]
        destination = self._private_blocks(source, fit.kept_blocks)
        if destination is None:
            return None
        taken = {block.block_id for block in destination}
        blocks[: fit.end_block] = [self._null_block] * fit.end_block
        self._compressed[request_id] = _Compressed(
            destination,
            [block for block in source if block.block_id not in taken],
        )
        return Compress(
            num_tokens=num_tokens,
            end_block=fit.end_block,
            destination=tuple(block.block_id for block in destination),
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
