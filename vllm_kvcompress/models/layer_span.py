"""Layers of a decoder that run together, compiled as one, for vLLM."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig


@support_torch_compile
class LayerSpan(nn.Module):
    """Layers that run together, compiled as one."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: nn.ModuleList
    ) -> None:
        super().__init__()
        self.layers = layers

    @property
    def attention(self) -> list[Any]:
        """The attention of all layers, where it is named as in Llama."""
        return [layer.self_attn for layer in self.layers]

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers; vLLM keeps the residual apart."""
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual


class SpanRunner(nn.Module):
    """Runs spans on inputs that stay in one place.

    Layers overwrite their inputs, and piecewise CUDA graphs replay their addresses.
    """

    positions: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, hidden_size: int) -> None:
        super().__init__()
        self._vllm_config = vllm_config
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("hidden", torch.zeros(most, hidden_size), persistent=False)
        self.register_buffer(
            "residual", torch.zeros(most, hidden_size), persistent=False
        )
        positions = torch.zeros(most, dtype=torch.int64)
        self.register_buffer("positions", positions, persistent=False)

    def span(self, name: str, layers: Iterable[nn.Module]) -> LayerSpan:
        """Make a span; ``name`` is its own among those of the model."""
        with set_model_tag(name):
            return LayerSpan(
                vllm_config=self._vllm_config,
                prefix=name,
                layers=nn.ModuleList(layers),
            )

    def forward(
        self,
        span: LayerSpan,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run ``span`` on copies of its inputs; no residual is one of zeros."""
        tokens = len(positions)
        own = self.residual[:tokens]
        return span(
            self.positions[:tokens].copy_(positions),
            self.hidden[:tokens].copy_(hidden_states),
            own.zero_() if residual is None else own.copy_(residual),
        )
