"""How compiled kernels are called: by ctypes, with the structs of csrc/api.h.

The libraries know neither Python nor torch, so one build serves all versions of both.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from .pages import Elements

# Bytes of what is staged on a GPU that come before the tokens.
STAGING_FLAG = 16


class Order(Structure):
    """Of a page's elements."""

    _fields_ = (
        *((name, c_int64) for name in ("first", "slot", "element")),
        ("offsets", c_void_p),
    )


class WindowScores(Structure):
    """The arguments of window scores."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("cache", "blocks", "queries", "weights", "seen", "scores")
        ),
        *(
            (name, c_int64)
            for name in (
                *("type", "kv_heads", "rows", "tokens", "head_size", "block_size"),
                *("block_step", "head_step", "blocks_step"),
            )
        ),
        ("order", Order),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class AttendPages(Structure):
    """The arguments of attention over pages."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                *("cache", "blocks", "starts", "lens", "query", "scales", "output"),
            )
        ),
        *(
            (name, c_int64)
            for name in (
                *("type", "half_scales", "rows", "kv_heads", "group", "head_size"),
                *("block_size", "block_step", "head_step", "scales_step", "tasks"),
            )
        ),
        ("keys", Order),
        ("values", Order),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class Compact(Structure):
    """The arguments of compaction."""

    _fields_ = (
        *((name, c_void_p) for name in ("cache", "source", "kept", "target")),
        *(
            (name, c_int64)
            for name in (
                *("type_size", "kv_heads", "tokens", "head_size", "block_size"),
                *("block_step", "head_step"),
            )
        ),
        ("keys", Order),
        ("values", Order),
    )


def load(name: str, remedy: str) -> Any:
    """The library ``name``, which lies beside this package's modules.

    VLLM_KVCOMPRESS_CPU_LIBRARY and VLLM_KVCOMPRESS_CUDA_LIBRARY name another one.

    Raises:
        ImportError: It was not compiled; says the remedy.
    """
    built = sorted(Path(__file__).parents[1].glob(f"{name}.*so"))
    path = os.environ.get(f"VLLM_KVCOMPRESS{name.upper()}_LIBRARY")
    if not (path := path or next(map(str, built), None)):
        raise ImportError(f"was not compiled; {remedy}")
    return ctypes.CDLL(path)


def order(elements: Elements, cache: torch.Tensor) -> tuple[Order, torch.Tensor]:
    """An order, and what its pointer refers to."""
    if (strides := elements.strides(cache)) is not None:
        return Order(*strides, None), elements.offsets
    return Order(0, 0, 0, elements.table.data_ptr()), elements.table


def select(
    function: Callable[..., Any], scores: torch.Tensor, count: int, *rest: Any
) -> torch.Tensor:
    """Call a kernel of `select.select`; ``rest`` are its last arguments."""
    scores = scores.float()
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    rows, tokens = scores.shape
    kept = torch.empty(rows, count, dtype=torch.long, device=scores.device)
    step = scores.stride(0)
    function(scores.data_ptr(), rows, step, tokens, count, kept.data_ptr(), *rest)
    return kept


def compact(
    function: Callable[..., Any],
    cache: torch.Tensor,
    halves: Sequence[Elements],
    source: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
    *rest: Any,
) -> None:
    """Call a kernel of `compact.compact`; ``rest`` are its last arguments."""
    source, kept, target = (
        x.to(cache.device).contiguous() for x in (source, kept, target)
    )
    orders, alive = zip(*(order(half, cache) for half in halves), strict=True)
    call = Compact(
        *(x.data_ptr() for x in (cache, source, kept, target)),
        cache.element_size(),
        *(*kept.shape, halves[0].head_size, cache.shape[2]),
        *cache.stride()[:2],
        *orders,
    )
    function(call, *rest)
    del alive
