"""The three kinds of attention in YOCO (arXiv 2405.05254), for vLLM."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase

# Registers the operation vllm::linear_attention, which calls `_forward` below.
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..ops.retention import gate_decay, retention_chunkwise, retention_recurrent
from .configs import YocoConfig

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys, values ``[tokens, heads, size]``; log decays ``[tokens, heads]``."""


class YocoRotaryEmbedding(RotaryEmbedding):
    """Interleaved pairs; frequencies from 1 to ``1 / rope_theta``, both included."""

    def __init__(self, config: YocoConfig, heads: int) -> None:
        size = config.dim // heads
        super().__init__(
            head_size=size,
            rotary_dim=size,
            max_position_embeddings=config.max_seq_len,
            base=config.rope_theta,
            is_neox_style=False,
            dtype=torch.get_default_dtype(),
        )

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return base ** -torch.linspace(0, 1, self.rotary_dim // 2)


class _SelfMixer(nn.Module):
    """Projections of the self-decoder: as many KV heads as query heads."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        total = config.n_self_heads
        self.heads = total // get_tensor_model_parallel_world_size()
        self.head_size = config.dim // total
        self.qkv_proj = QKVParallelLinear(
            config.dim,
            self.head_size,
            total,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.out_proj = RowParallelLinear(
            config.dim,
            config.dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.rotary_emb = YocoRotaryEmbedding(config, total)

    def _project(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, ``[tokens, heads * head_size]``, rotated."""
        query, key, value = self.qkv_proj(hidden_states)[0].chunk(3, dim=-1)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        return query, key, value


class SlidingWindow(_SelfMixer):
    """Attention of the self-decoder within its window."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        self.attn = Attention(
            self.heads,
            self.head_size,
            self.head_size**-0.5,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=vllm_config.model_config.hf_config.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, dim]`` to ``[tokens, dim]``."""
        found = self.attn(*self._project(positions, hidden_states))
        return self.out_proj(found)[0]


class GatedRetention(_SelfMixer, MambaBase):
    """Retention; vLLM keeps its state as it keeps that of any linear attention."""

    kv_cache: tuple[torch.Tensor, ...]

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        config: YocoConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.g_proj = ColumnParallelLinear(
            config.dim,
            config.dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.g_proj",
        )
        self.gt_proj = ColumnParallelLinear(
            config.dim,
            config.n_self_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gt_proj",
        )
        self.norm = RMSNorm(self.head_size, eps=config.norm_eps, has_weight=False)
        self.name = f"{prefix}.retention"
        context = vllm_config.compilation_config.static_forward_context
        if self.name in context:
            raise ValueError(f"Duplicate layer name: {self.name}")
        context[self.name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The metadata that vLLM builds for it."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        """Of one request."""
        return ((self.heads, self.head_size, self.head_size),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """The sum runs over all tokens, so it is never narrower."""
        return (torch.float32,)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, dim]`` to ``[tokens, dim]``."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.linear_attention(hidden_states, output, positions, self.name)
        return output

    def _forward(
        self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """What `forward` does, hidden from the compiler."""
        metadata: Any = get_forward_context().attn_metadata
        query, key, value = (
            each.view(-1, self.heads, self.head_size)
            for each in self._project(positions, hidden_states)
        )
        decay = gate_decay(self.gt_proj(hidden_states)[0])
        found = torch.zeros_like(value, dtype=torch.float32)
        if metadata is not None:
            key = key * self.head_size**-0.5
            self._retain(metadata[self.name], (query, key, value, decay), found)
        found = self.norm(found).to(value.dtype).flatten(1)
        gate = torch.nn.functional.silu(self.g_proj(hidden_states)[0])
        output.copy_(self.out_proj(gate * found)[0])

    def _retain(self, metadata: Any, inputs: Inputs, found: torch.Tensor) -> None:
        """Fill ``found``, and go on with every request's state.

        vLLM puts requests that decode in front.
        """
        (states,) = self.kv_cache
        slots = metadata.state_indices_tensor.long()
        starts = metadata.query_start_loc
        new = metadata.seq_lens == starts.diff()  # nothing computed before
        ones = metadata.num_decodes
        if ones:
            old = states[slots[:ones]]
            old.masked_fill_(new[:ones, None, None, None], 0.0)
            query, key, value, decay = (each[:ones, None] for each in inputs)
            output, state = retention_recurrent(query, key, value, decay, old)
            found[:ones] = output[:, 0]
            states[slots[:ones]] = state
        bounds = starts.tolist()
        for row in range(ones, ones + metadata.num_prefills):
            tokens = slice(bounds[row], bounds[row + 1])
            old = states[slots[row]] * ~new[row]
            query, key, value, decay = (each[tokens] for each in inputs)
            found[tokens], states[slots[row]] = retention_chunkwise(
                query, key, value, decay, old
            )


class CrossAttention(nn.Module):
    """Attention of the cross-decoder to the one global KV cache."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, name: str) -> None:
        """Register the attention with vLLM under ``name``."""
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        size = config.dim // config.n_attn_heads
        self.q_proj = ColumnParallelLinear(
            config.dim,
            config.dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.q_proj",
        )
        self.out_proj = RowParallelLinear(
            config.dim,
            config.dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.rotary_emb = YocoRotaryEmbedding(config, config.n_attn_heads)
        self.attn = Attention(
            config.n_attn_heads // ranks,
            size,
            size**-0.5,
            num_kv_heads=max(1, config.n_attn_kv_heads // ranks),
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=name,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """``[tokens, dim]`` to ``[tokens, dim]``."""
        query, _ = self.rotary_emb(positions, self.q_proj(hidden_states)[0], None)
        return self.out_proj(self.attn(query, None, None))[0]
