"""Attention over (KV head, request) pairs, by vLLM's builders and kernels.

To them the layer has one KV head, more requests, and a cache of one-head pages. The
latter needs a cache that is laid out head by head.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from ..config import KEY, ConfigError

# What their builders call the numbers of query and of KV heads. FlashInfer's also own
# page lists and plans, sized by the number of requests.
BACKENDS = {
    "CPU_ATTN": ("num_heads", "num_kv_heads"),
    "TRITON_ATTN": ("num_heads_q", "num_heads_kv"),
    "FLASH_ATTN": ("num_heads_q", "num_heads_kv"),
}
LAYOUT = KVCacheLayout.LBHNC


@functools.cache
def head_major(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The same backend on `LAYOUT`, which vLLM then chooses for the whole model."""
    builder_base: Any = backend.get_builder_cls()

    class HeadMajorBuilder(builder_base):
        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            # A full graph replays as many rows as it has captured.
            return AttentionCGSupport.NEVER

    return subclass_attention_backend_with_overrides(
        "HeadMajor",
        backend,
        {
            "get_builder_cls": staticmethod(lambda: HeadMajorBuilder),
            "supported_kv_cache_layouts": classmethod(lambda cls: (LAYOUT,)),
        },
    )


def one_head_builder(builder: Any, backend: str) -> Any:
    """A metadata builder as for a layer of one KV head.

    Args:
        builder: vLLM's, of a layer with more of them.
        backend: One of `BACKENDS`.
    """
    one = copy.copy(builder)
    query_heads, kv_heads = BACKENDS[backend]
    heads = builder.kv_cache_spec.num_kv_heads
    setattr(one, query_heads, getattr(builder, query_heads) // heads)
    setattr(one, kv_heads, 1)
    if backend == "TRITON_ATTN":
        # The same scratch holds as many more rows as they are narrower.
        for name in ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"):
            scratch = getattr(builder, name)
            setattr(one, name, scratch.unflatten(1, (heads, -1)).flatten(0, 1))
        one.seq_threshold_3D = builder.seq_threshold_3D * heads
        one.max_seqs_64_segments = builder.max_seqs_64_segments * heads
    elif backend == "FLASH_ATTN":
        # Its schedule's buffer holds one entry per request, for graphs only.
        one.use_full_cuda_graph, one.max_num_splits = False, 0
    return one


def one_head_impl(impl: Any) -> Any:
    """An implementation of attention as for a layer of one KV head."""
    one = copy.copy(impl)
    one.num_heads, one.num_kv_heads = impl.num_heads // impl.num_kv_heads, 1
    return one


def check_pages(kv_cache: torch.Tensor) -> None:
    """Look whether `one_head` holds.

    Raises:
        ConfigError: vLLM has padded the blocks to those of other layers.
    """
    block, head = kv_cache.stride()[:2]
    if block != kv_cache.shape[1] * head:
        raise ConfigError(
            f"{KEY}: this model's KV blocks are padded, which methods with uneven KV "
            "heads cannot use; choose another method"
        )


def one_head(kv_cache: torch.Tensor) -> torch.Tensor:
    """A cache as one-head pages, ``[num_blocks * kv_heads, 1, block_size, ...]``."""
    return kv_cache.view(-1, 1, *kv_cache.shape[2:])


def attend_by_head(
    forward: Callable[..., Any],
    kv_heads: int,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Run a backend's forward over (KV head, request) pairs.

    Args:
        forward: Of `one_head_impl`.
        kv_heads: Of the layer.
        layer: The rest is what vLLM calls it with, but for
        query: ``[tokens, query_heads, head_size]``,
        key: not read,
        value: not read,
        kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``,
        metadata: of `HeadPages.by_head`, and
        output: ``[tokens, query_heads, head_size]``, which is filled.
        *args: Passed on, as
        **kwargs: are these.
    """
    tokens = metadata.num_actual_tokens // kv_heads
    # Query head h reads KV head h // group.
    rows = query[:tokens].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1)
    found = torch.empty_like(rows, dtype=output.dtype)
    forward(
        layer, rows, key, value, one_head(kv_cache), metadata, found, *args, **kwargs
    )
    found = found.unflatten(0, (kv_heads, tokens)).transpose(0, 1)
    output[:tokens].unflatten(1, (kv_heads, -1)).copy_(found)
    return output
