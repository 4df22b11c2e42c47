"""The two halves of YOCO (arXiv 2405.05254), for vLLM."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.llama import LlamaMLP

from ..engine.batch_parts import last_queries_only
from ..engine.kv_views import read_from, store
from .configs import YocoConfig
from .yoco_mixers import (
    CrossAttention,
    GatedRetention,
    SlidingWindow,
    YocoRotaryEmbedding,
)


class YocoLayer(nn.Module):
    """A mixer and a feed-forward layer, each after a norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, mixer: nn.Module) -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        self.mixer = mixer
        self.ffn = LlamaMLP(
            config.dim,
            config.hidden_dim,
            "silu",
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.ffn",
        )
        self.mixer_layer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.final_layer_norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's layers: the residual is kept apart."""
        hidden_states, residual = self.mixer_layer_norm(hidden_states, residual)
        hidden_states = self.mixer(positions, hidden_states)
        hidden_states, residual = self.final_layer_norm(hidden_states, residual)
        return self.ffn(hidden_states), residual


class SelfDecoder(nn.Module):
    """The lower half; parameters as the authors name them."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        slides = config.sliding_window is not None
        mixer = SlidingWindow if slides else GatedRetention
        self.layers = nn.ModuleList()
        for index in range(config.n_layers // 2):
            name = f"{prefix}.layers.{index}"
            own = mixer(vllm_config, f"{name}.mixer")
            self.layers.append(YocoLayer(vllm_config, name, own))


class CrossDecoder(nn.Module):
    """The upper half, and what writes the KV that it reads.

    Raises:
        ValueError: More tensor-parallel ranks than KV heads.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        half = config.n_layers // 2
        ranks = get_tensor_model_parallel_world_size()
        if config.n_attn_kv_heads % ranks:
            raise ValueError(
                f"--tensor-parallel-size {ranks} does not divide the "
                f"{config.n_attn_kv_heads} KV heads of this YOCO model; use a divisor"
            )
        size = config.dim // config.n_attn_heads * config.n_attn_kv_heads
        self.kv_proj = MergedColumnParallelLinear(
            config.dim,
            [size, size],
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.kv_proj",
        )
        self.kv_layer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.rotary_emb = YocoRotaryEmbedding(config, config.n_attn_heads)
        self.layers = nn.ModuleList()
        readers: list[Attention] = []
        root = prefix.rsplit(".", 1)[0]
        for index in range(half):
            name = f"{prefix}.layers.{index}"
            # vLLM counts the layers of both halves by the number in this name.
            attention = f"{root}.layers.{half + index}.attn"
            own = CrossAttention(vllm_config, f"{name}.mixer", attention)
            readers.append(own.attn)
            self.layers.append(YocoLayer(vllm_config, name, own))
        self.owner = readers[0]
        for reader in readers[1:]:
            read_from(reader, self.owner.layer_name)
        self.exits_early = config.early_exit and all(
            [last_queries_only(reader, vllm_config) for reader in readers]
        )

    def store(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Write the global KV of all tokens, ``[tokens, dim]``."""
        normed = self.kv_layer_norm(hidden_states)
        key, value = self.kv_proj(normed)[0].chunk(2, dim=-1)
        key, _ = self.rotary_emb(positions, key.contiguous(), None)
        store(self.owner, key, value.contiguous())
