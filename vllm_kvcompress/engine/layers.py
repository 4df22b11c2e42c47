"""Which attention layers of a loaded model are compressed."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from ..config import KEY, ConfigError, KVCompressionConfig
from ..methods.base import Layer, Scorer
from .head_pages import BACKENDS
from .spec import CompressedAttentionSpec


def compress_layers(vllm_config: VllmConfig) -> None:
    """Give full-attention layers the compressed spec; leave all others alone.

    Only these layer objects change, no class of vLLM does.

    Raises:
        ConfigError: A full-attention layer works in a way that is not supported, or
            budgets by layer do not fit this model.
    """
    config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
    layers = []
    uneven = any(scorer.uneven for scorer in config.scorers.values())
    context = vllm_config.compilation_config.static_forward_context
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        if type(layer.get_kv_cache_spec(vllm_config)) is not FullAttentionSpec:
            continue
        if reason := _unsupported(layer):
            raise ConfigError(
                f"{KEY}: layer {name} uses {reason}, which cannot be compressed "
                "yet; start without --kv-compression"
            )
        if uneven and (backend := layer.attn_backend.get_name()) not in BACKENDS:
            raise ConfigError(
                f"{KEY}: method={config.method} works with the attention backend "
                f"{', '.join(BACKENDS)} only, not with {backend}; choose another method"
            )
        layers.append(layer)
    if not layers:
        raise ConfigError(
            f"{KEY}: this model has no full-attention layer to compress; "
            "start without --kv-compression"
        )
    # Models build their layers from the bottom up.
    most_tokens = config.most_tokens
    for tier in config.tiers(len(layers)):
        for index in tier:
            layer = layers[index]
            layer.compressed_index = index
            layer.get_kv_cache_spec = _Compressed(
                layer.get_kv_cache_spec, tier=tier, most_tokens=most_tokens
            )


def rate(
    scorer: Scorer,
    layer: Any,
    queries: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor | None,
) -> torch.Tensor:
    """The scores of a compressed layer's tokens, see `Scorer.score`."""
    softcap = getattr(layer.impl, "logits_soft_cap", None) or 0.0
    about = Layer(layer.compressed_index, layer.impl.scale, softcap)
    scores = scorer.score(queries, keys, values, about)
    ranks = get_tensor_model_parallel_world_size()
    if scorer.across_heads and ranks > 1:
        mean = tensor_model_parallel_all_reduce(scores[0].contiguous()) / ranks
        scores = mean.expand_as(scores)
    return scores


class _Compressed:
    """A layer's ``get_kv_cache_spec`` whose answer is the compressed spec."""

    def __init__(self, get_kv_cache_spec: Any, **fields: Any) -> None:
        self._get = get_kv_cache_spec
        self._fields = fields

    def __call__(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = self._get(vllm_config)
        return replace_as(spec, CompressedAttentionSpec, **self._fields)


def _unsupported(layer: Any) -> str | None:
    """What keeps a full-attention layer from being compressed, None if nothing."""
    if type(layer) is not Attention:
        return f"{type(layer).__name__} attention"
    if not hasattr(layer.attn_backend.get_builder_cls(), "row_shift"):
        return f"the attention backend {layer.attn_backend.get_name()}"
    if layer.kv_sharing_target_layer_name is not None:
        return "another layer's KV cache"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if layer.has_sink:
        return "attention sinks"
    if layer.head_size_v != layer.head_size:
        return "values of another size than its keys"
    return None
