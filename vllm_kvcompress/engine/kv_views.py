"""Other ways to look at a KV cache, for layers that do not simply use their own.

As its second reader, without the current token, with the last queries of a prompt only.

For models that share KV across layers. A layer that reads another's cache allocates
none of its own, which is vLLM's own mechanism; vLLM asks for a target below only when
the layer is built.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from .args import config_of


def read_from(layer: Attention, target: str) -> None:
    """Let ``layer`` read the KV cache of the layer ``target`` and store none itself."""
    layer.kv_sharing_target_layer_name = target
    layer.impl.kv_sharing_target_layer_name = target


def leave_out_current(layer: Attention) -> None:
    """Hide from every query of ``layer`` its own token's key.

    Where that leaves no key, at position 0, the result means nothing.
    """
    layer.leaves_out_current = True
    layer.attn_backend = _past_only(layer.attn_backend)


def longest_query(layer: Attention) -> int:
    """Tokens of the batch's longest chunk, as told to a layer of `leave_out_current`.

    1 in batches that vLLM makes up to measure memory.
    """
    metadata: Any = get_forward_context().attn_metadata
    return metadata[layer.layer_name].longest_query if metadata else 1


def store(layer: Attention, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store the batch's keys and values, and attend to nothing.

    Args:
        layer: Whose KV cache it is.
        keys: ``[tokens, kv_heads * head_size]``, rotated.
        values: The same.
    """
    shape = (-1, layer.num_kv_heads, layer.head_size)
    unified_kv_cache_update(keys.view(shape), values.view(shape), layer.layer_name)


def store_zeros(layer: Attention, like: torch.Tensor) -> None:
    """Put zeros where the keys and values of all tokens of ``like`` will be stored."""
    width = layer.num_kv_heads * layer.head_size
    zeros = like.new_zeros(len(like), width, dtype=layer.dtype)
    store(layer, zeros, zeros)


@functools.cache
def _past_only(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """``base`` with metadata of sequences that are one token shorter.

    Causal masks count from the end, so each query loses its own key.
    """
    builder_base: Any = base.get_builder_cls()

    class PastBuilder(builder_base):
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Full CUDA graphs capture its address.
            most = self.vllm_config.scheduler_config.max_num_seqs
            self._past = torch.zeros(most, dtype=torch.int32, device=self.device)

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            # Longer chunks take several passes, which a graph would freeze.
            support = super().get_cudagraph_support(*args)
            least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, least, key=lambda each: each.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            common = common_attn_metadata
            bound = common.seq_lens_cpu_upper_bound
            lens = torch.sub(common.seq_lens, 1, out=self._past[: common.num_reqs])
            past = common.replace(
                seq_lens=lens.clamp_(min=1),  # kernels dislike empty sequences
                seq_lens_cpu_upper_bound=(
                    None if bound is None else (bound - 1).clamp_(min=1)
                ),
                _num_computed_tokens_cache=None,
            )
            metadata = super().build(common_prefix_len, past, *args, **kwargs)
            metadata.longest_query = common.max_query_len
            return metadata

    return subclass_attention_backend_with_overrides(
        "Past", base, {"get_builder_cls": staticmethod(lambda: PastBuilder)}
    )


def last_queries_only(layer: Attention, vllm_config: VllmConfig) -> bool:
    """Give ``layer`` the last tokens of each request's chunk only.

    As many as may be sampled from, or are wanted to compress the layer's KV cache.

    Returns:
        False if the layer has to be given all: a method wants more with longer prompts.
    """
    count = 1 + vllm_config.num_speculative_tokens
    if config := config_of(vllm_config):
        count = max(count, config.window)
        long = vllm_config.model_config.max_model_len
        if any(s.queries_wanted(long) > count for s in config.scorers.values()):
            return False
    layer.attn_backend = _last_only(layer.attn_backend, count)
    return True


def last_tokens(layer: Attention) -> torch.Tensor | None:
    """The tokens of the batch that a layer of `last_queries_only` is given.

    Returns:
        ``[tokens]`` int64, in the order of the batch; None = all of them.
    """
    metadata: Any = get_forward_context().attn_metadata
    return metadata[layer.layer_name].last_tokens if metadata else None


@contextmanager
def without_graphs() -> Iterator[None]:
    """Run what follows without CUDA graphs: they are chosen by the batch's size."""
    context = get_forward_context()
    mode = context.cudagraph_runtime_mode
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode


@functools.cache
def _last_only(base: type[AttentionBackend], count: int) -> type[AttentionBackend]:
    """``base`` with metadata of shorter chunks, of ``count`` tokens at most."""
    builder_base: Any = base.get_builder_cls()

    class LastBuilder(builder_base):
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            # A graph would freeze which tokens are the last.
            support = super().get_cudagraph_support(*args)
            least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, least, key=lambda each: each.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            common, tokens = common_attn_metadata, None
            if common.max_query_len > count:
                common, tokens = _shortened(common, count)
            metadata = super().build(common_prefix_len, common, *args, **kwargs)
            if tokens is not None:
                metadata.given_tokens = tokens.numpy()
                tokens = tokens.to(self.device, non_blocking=True)
            metadata.last_tokens = tokens
            return metadata

    return subclass_attention_backend_with_overrides(
        f"Last{count}", base, {"get_builder_cls": staticmethod(lambda: LastBuilder)}
    )


def _shortened(
    common: CommonAttentionMetadata, count: int
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The metadata of the last ``count`` tokens of each chunk, and those on the CPU."""
    starts = common.query_start_loc_cpu
    lens = starts.diff().clamp_(max=count)
    ends = torch.zeros_like(starts)
    ends[1:] = lens.cumsum(0)
    total = int(ends[-1])
    # Token i of the shortened batch lies so much further back in the whole one.
    skipped = (starts[1:] - ends[1:]).repeat_interleave(lens, output_size=total)
    tokens = torch.arange(total) + skipped
    device = common.query_start_loc.device
    given = tokens.to(device, non_blocking=True)
    positions = common.positions
    shortened = common.replace(
        query_start_loc=ends.to(device, non_blocking=True),
        query_start_loc_cpu=ends,
        num_actual_tokens=total,
        max_query_len=int(lens.max()),
        slot_mapping=common.slot_mapping[given],
        positions=None if positions is None else positions[given],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return shortened, tokens
