"""The attention of Llamas whose layers share KV, for vLLM.

Layers that read another's keys and values have no projections for their own and
allocate no KV cache.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from ..engine.kv_views import leave_out_current, read_from
from .layer_map import LayerMap


class SharedAttention(nn.Module):
    """Attention of one layer: to its own keys and values, or to another layer's."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None,
        bias: bool,
        bias_o_proj: bool,
        cache_config: CacheConfig,
        prefix: str,
        attn_type: str,
    ) -> None:
        super().__init__()
        index = extract_layer_index(prefix)
        layer_map: LayerMap = config.layer_map
        owner = layer_map.owners[index]
        self.owns = owner == index
        self.masked = layer_map.masked[index]
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = num_heads // ranks
        self.num_kv_heads = max(1, num_kv_heads // ranks)
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        if self.owns:
            self.qkv_proj = QKVParallelLinear(
                hidden_size,
                self.head_dim,
                num_heads,
                num_kv_heads,
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
        else:
            self.q_proj = ColumnParallelLinear(
                hidden_size,
                num_heads * self.head_dim,
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.q_proj",
            )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.qk_norm = getattr(config, "use_qk_norm", False)
        if self.qk_norm:
            eps = config.rms_norm_eps
            self.query_layernorm = RMSNorm(self.head_dim, eps=eps)
            self.key_layernorm = RMSNorm(self.head_dim, eps=eps)
            self.unweighted = RMSNorm(self.head_dim, eps=eps, has_weight=False)
        window = None
        if layer_map.sliding[index]:
            # vLLM counts the current token, which a masked layer does not see.
            window = config.sliding_window - self.masked
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
            attn_type=attn_type,
            prefix=f"{prefix}.attn",
        )
        if not self.owns:
            layers = prefix.rsplit(".layers.", 1)[0]
            read_from(self.attn, f"{layers}.layers.{owner}.self_attn.attn")
        elif not layer_map.keeps_window(index):
            # Another layer reads further back, so nothing may be freed.
            self.attn.sliding_window = None
        self.attn.reads_window = window
        if self.masked:
            leave_out_current(self.attn)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Attend; shapes as in vLLM's ``LlamaAttention``."""
        key = value = None
        if self.owns:
            qkv, _ = self.qkv_proj(hidden_states)
            query, key, value = qkv.split(
                [self.q_size, self.kv_size, self.kv_size], dim=-1
            )
        else:
            query, _ = self.q_proj(hidden_states)
        query, key = self.rotary_emb(positions, query, key)
        if self.qk_norm:
            query, key = self._normed(query, key)
        found = self.attn(query, key, value)
        if self.masked:
            found = found.masked_fill(positions[:, None] == 0, 0.0)
        output, _ = self.o_proj(found)
        return output

    def _normed(
        self, query: torch.Tensor, key: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norms after the rotation; a layer's weight for keys goes onto its queries.

        Stored keys are then the same for all layers that read them.
        """
        heads = self.query_layernorm(query.view(-1, self.num_heads, self.head_dim))
        query = (heads * self.key_layernorm.weight).view(query.shape)
        if key is not None:
            shape = key.shape
            key = self.unweighted(key.view(-1, self.num_kv_heads, self.head_dim))
            key = key.view(shape)
        return query, key


class SharedDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with `SharedAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=SharedAttention)
