"""Bugs to plant where two groups share blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_kvcompress.budget import Fit
from vllm_kvcompress.engine.course import Planner
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.engine.manager import CompressedKVManager
from vllm_kvcompress.engine.private_blocks import PrivateBlocks
from vllm_kvcompress.engine.rows import RowShift
from vllm_kvcompress.engine.shared_pages import SharingRows
from vllm_kvcompress.plan import Compress

Planted = Callable[[Callable[..., Any]], Callable[..., Any]]


def _free_borrowed(_: Callable[..., Any]) -> Callable[..., Any]:
    def pop_blocks_for_free(self: Any, request_id: str) -> list[KVCacheBlock]:
        blocks = FullAttentionManager.pop_blocks_for_free(self, request_id)
        state = self._compressed.pop(request_id, None)
        return [*state.pending, *state.destination, *blocks] if state else blocks

    return pop_blocks_for_free


def _plan_one_of_a_pair(obtain: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, *args: Any) -> Any:
        request_id, course, groups, workers = args
        found = obtain(self, request_id, course, groups, workers)
        return found or obtain(self, request_id, course, groups[:1], workers)

    return planted


def _unhash_what_is_reserved(reserve: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = reserve(self, *args, **kwargs)
        self._drop_hashes(found or [])
        return found

    return planted


def _keep_factors(_: Callable[..., Any]) -> Callable[..., Any]:
    def forget(self: Any, request_id: str) -> None:
        RowShift.forget(self, request_id)
        self._shared.pop(request_id, None)

    return forget


def _hash_merged(compress: Callable[..., Any]) -> Callable[..., Any]:
    """A merged block takes the place of the original in the prefix cache."""

    def planted(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Compress:
        original = self.req_to_blocks[request_id][0]
        directive: Compress = compress(self, request_id, *args, **kwargs)
        if (key := original.block_hash) and directive.merged_blocks:
            merged = self._compressed[request_id].destination[0]
            self.block_pool._maybe_evict_cached_block(original)
            if merged.block_hash is None:
                merged.set_block_hash(key, self.block_size)
                self.block_pool.cached_block_hash_to_block.insert(key, merged)
        return directive

    return planted


def _absorb_a_part(absorb: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request_id: str, num_tokens: int, borrows: bool) -> Fit:
        whole = -(-num_tokens // self.block_size) * self.block_size
        return absorb(self, request_id, whole, borrows)

    return planted


def _absorb_again(absorb: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any, request_id: str, num_tokens: int, borrows: bool) -> Fit:
        found: Fit = absorb(self, request_id, num_tokens, borrows)
        assert found.candidates
        first, end = found.candidates
        return replace(
            found,
            candidates=(first - self.block_size, end),
            merged_blocks=found.merged_blocks + 1,
        )

    return planted


def _swap_pairs(owners: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Any) -> dict[int, int]:
        found = owners(self)
        return dict(zip(found, reversed(found.values()), strict=True))

    return planted


def _share_nothing(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, blocks: None


def _reserve_all(reserve: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, target, workers: reserve(
        self, request_id, replace(target, borrows=False), workers
    )


def _forget_at_the_end(_: Callable[..., Any]) -> Callable[..., Any]:
    """Only when a batch is over: by then its blocks may be another request's."""

    def forget(self: Any, request_id: str) -> None:
        for group in self._groups.values():
            rows = group.rows
            later = getattr(rows, "_later", [])
            for earlier in later:
                rows.forget(earlier)
            rows._later = [request_id]
        for window in self._windows:
            window.keep(request_id, 0)

    return forget


MANAGER = CompressedKVManager
# As in `planted.PLANTED`, for workloads that merge.
MERGES: dict[str, tuple[type, str, Planted, dict[str, Any]]] = {
    "borrowed blocks freed": (MANAGER, "pop_blocks_for_free", _free_borrowed, {}),
    "one group of a pair": (
        PrivateBlocks,
        "_obtain",
        _plan_one_of_a_pair,
        {"caching": True, "spare_blocks": 0},
    ),
    "what a pair reserved leaks": (
        MANAGER,
        "release",
        lambda _: lambda self, *args: None,
        {"caching": True, "spare_blocks": 0},
    ),
    "hashes of a pair that waits": (
        MANAGER,
        "reserve",
        _unhash_what_is_reserved,
        {"caching": True, "spare_blocks": 0, "drafts": 0, "lookahead": False},
    ),
    "factors kept": (SharingRows, "forget", _keep_factors, {}),
    "factors kept for a step": (
        CompressionExecutor,
        "forget",
        _forget_at_the_end,
        {},
    ),
    "factors not known": (SharingRows, "share", _share_nothing, {}),
    "merged block hashed": (MANAGER, "compress", _hash_merged, {"caching": True}),
    "part of a block absorbed": (MANAGER, "absorb", _absorb_a_part, {}),
    "absorbed twice": (MANAGER, "absorb", _absorb_again, {}),
    "pairs swapped": (Planner, "_owners", _swap_pairs, {"groups": "CCCCC"}),
    "all blocks private": (MANAGER, "reserve", _reserve_all, {}),
}
MERGES = {
    bug: (*planted, {**hints, "merging": True})
    for bug, (*planted, hints) in MERGES.items()
}
