"""Layers that use a KV cache otherwise than vLLM's do, in models that share them.

A layer that reads another's cache allocates none of its own, which is vLLM's own
mechanism; only when a layer is built does vLLM ask for a target below it.
"""

import functools
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from .batch_parts import builder_to_extend


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
    builder_base: Any = builder_to_extend(base)

    class PastBuilder(builder_base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Full CUDA graphs capture its address.
            most = self.vllm_config.scheduler_config.max_num_seqs
            self._past = torch.zeros(most, dtype=torch.int32, device=self.device)

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
            return super().build(common_prefix_len, past, *args, **kwargs)

    return subclass_attention_backend_with_overrides(
        "Past", base, {"get_builder_cls": staticmethod(lambda: PastBuilder)}
    )
