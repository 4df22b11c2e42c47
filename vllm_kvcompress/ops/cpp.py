"""Kernels for processors: csrc/cpu, compiled when this package is installed.

The library's threads are torch's, whose OpenMP is already loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_int64, c_void_p
from typing import Any

import torch

from . import native_calls
from .native_calls import AttendPages, Compact, WindowScores
from .pages import Elements, PagedKeys
from .providers import Setting

_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float8_e4m3fn: 2,
    torch.float16: 3,
}
LEVELS = ("baseline", "AVX2", "AVX-512", "AVX-512 with bfloat16")

_library = native_calls.load("_cpu", "install again with a C++ compiler")

for _name, _struct in (
    ("window_scores", WindowScores),
    ("attend_pages", AttendPages),
    ("compact", Compact),
):
    _function = getattr(_library, f"kvc_{_name}")
    _function.argtypes, _function.restype = (POINTER(_struct),), None
_library.kvc_select.argtypes = (c_void_p, *[c_int64] * 4, c_void_p)
_library.kvc_select.restype = None


def level() -> str:
    """The instruction set in use, one of `LEVELS`."""
    return LEVELS[_library.kvc_level()]


def limit(level: str) -> None:
    """Use no wider instruction set than this one, for tests."""
    _library.kvc_limit(LEVELS.index(level))


def refusal(setting: Setting, operation: str | None) -> str | None:
    """Why these kernels cannot serve, None if they can."""
    if setting.device.type != "cpu":
        return f"runs on no {setting.device.type}"
    types = {pages.dtype for pages in setting.pages}
    reads = operation in ("window_scores", "attend_pages")
    if reads and (other := types - _TYPES.keys()):
        return f"does not read {other.pop()}"
    return None


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor | PagedKeys,
    *,
    scale: float,
    softcap: float = 0.0,
    weights: torch.Tensor | None = None,
    past_only: Sequence[bool] = (),
) -> torch.Tensor:
    """See `window_scores.window_scores`."""
    held = keys if isinstance(keys, PagedKeys) else PagedKeys.of(keys)
    cache, blocks = held.cache, held.blocks.contiguous()
    kv_heads, tokens, head_size = held.shape
    window = len(queries)
    rows = queries.float().view(window, kv_heads, -1, head_size).permute(1, 2, 0, 3)
    rows = rows.contiguous()
    group = rows.shape[1]
    votes = torch.ones(window) if weights is None else weights.float()
    votes = votes.div(group).repeat(group)
    seen = torch.arange(tokens - window + 1, tokens + 1).repeat(group)
    if past_only:
        seen -= torch.tensor(past_only, dtype=torch.long).repeat_interleave(window)
    scores = torch.empty(kv_heads, tokens)
    order, alive = native_calls.order(held.elements, cache)
    call = WindowScores(
        *(x.data_ptr() for x in (cache, blocks, rows, votes, seen, scores)),
        _TYPES[cache.dtype],
        *(kv_heads, len(seen), tokens, head_size, cache.shape[2]),
        cache.stride(0),
        cache.stride(1) if cache.shape[1] > 1 else 0,
        blocks.shape[1],
        order,
        scale * held.factor,
        softcap,
    )
    _library.kvc_window_scores(call)
    del alive
    return scores


def attend_pages(
    query: torch.Tensor,
    cache: torch.Tensor,
    halves: Sequence[Elements],
    blocks: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    scales: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See `attend_pages.attend_pages`."""
    rows, query_heads, head_size = query.shape
    kv_heads, block_size = cache.shape[1:3]
    query = query.float().contiguous()
    blocks, starts, lens = (x.contiguous() for x in (blocks, starts, lens))
    output = torch.empty_like(query)
    orders, alive = zip(
        *(native_calls.order(half, cache) for half in halves), strict=True
    )
    call = AttendPages(
        *(x.data_ptr() for x in (cache, blocks, starts, lens, query, scales, output)),
        _TYPES[cache.dtype],
        scales.dtype == torch.float16,
        *(rows, kv_heads, query_heads // kv_heads, head_size, block_size),
        *cache.stride()[:2],
        scales.stride(0),
        4 * torch.get_num_threads(),
        *orders,
        scale,
        softcap,
    )
    _library.kvc_attend_pages(call)
    del alive
    return output


def select(scores: torch.Tensor, count: int) -> torch.Tensor:
    """See `select.select`."""
    return native_calls.select(_library.kvc_select, scores, count)


def compact(
    cache: torch.Tensor,
    halves: Sequence[Elements],
    source: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
) -> None:
    """See `compact.compact`."""
    native_calls.compact(_library.kvc_compact, cache, halves, source, kept, target)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "window_scores": window_scores,
    "attend_pages": attend_pages,
    "select": select,
    "compact": compact,
}
