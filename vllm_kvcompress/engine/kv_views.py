"""Other ways to look at a KV cache: as its second reader, without the current token.

For models that share KV across layers. A layer that reads another's cache allocates
none of its own, which is vLLM's own mechanism; vLLM asks for a target below only when
the layer is built.
"""

import functools
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)


def read_from(layer: Attention, target: str) -> None:
    """Let ``layer`` read the KV cache of the layer ``target`` and store none itself."""
    layer.kv_sharing_target_layer_name = target
    layer.impl.kv_sharing_target_layer_name = target


def leave_out_current(layer: Attention) -> None:
    """Hide from every query of ``layer`` its own token's key.

    Where that leaves no key, at position 0, the result means nothing.
    """
    layer.attn_backend = _past_only(layer.attn_backend)


def longest_query(layer: Attention) -> int:
    """Tokens of the batch's longest chunk, as told to a layer of `leave_out_current`.

    1 in batches that vLLM makes up to measure memory.
    """
    metadata: Any = get_forward_context().attn_metadata
    return metadata[layer.layer_name].longest_query if metadata else 1


def store_zeros(layer: Attention, tokens: int) -> None:
    """Put zeros where the batch's keys and values of ``layer`` will be stored."""
    dtype, device = layer.dtype, layer.kv_cache.device
    shape = (tokens, layer.num_kv_heads, layer.head_size)
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    unified_kv_cache_update(zeros, zeros, layer.layer_name)


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
            self._lens = torch.zeros(most, dtype=torch.int32, device=self.device)

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
            lens = torch.sub(common.seq_lens, 1, out=self._lens[: common.num_reqs])
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
