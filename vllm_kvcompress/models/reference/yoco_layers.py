"""The layers of YOCO (arXiv 2405.05254) in plain torch, without a cache.

Two things differ from most models: rotations turn interleaved pairs, and their
frequencies fall from 1 to ``1 / rope_theta`` itself. Both as in the authors' code
(microsoft/unilm, YOCO), and so are the names of the parameters.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.retention import gate_decay, retention_chunkwise
from ..configs import YocoConfig

Tensor = torch.Tensor


def turns(config: YocoConfig, heads: int, tokens: int, device: Any = None) -> Tensor:
    """The rotation of every position, ``[tokens, 1, head_size / 2]`` complex64."""
    steps = torch.linspace(0, 1, config.dim // heads // 2, device=device)
    frequencies = config.rope_theta**-steps
    positions = torch.arange(tokens, dtype=torch.float32, device=device)
    angles = positions[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of ``[batch, tokens, heads, head_size]``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def normalise(x: Tensor, eps: float) -> Tensor:
    """RMS norm of the last dimension without a weight, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of ``[batch, tokens, heads, head_size]``; the heads joined again."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return output.transpose(1, 2).flatten(2)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection; YOCO has no biases."""
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    """RMS norm in float32; the weight comes after the cast back."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * normalise(x, self.eps)


class _FeedForward(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.fc1 = linear(config.dim, config.hidden_dim)
        self.gate = linear(config.dim, config.hidden_dim)
        self.fc2 = linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class _SelfMixer(nn.Module):
    """What both mixers of the self-decoder have; as many KV heads as query heads."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, ``[batch, tokens, heads, head_size]``; rotated."""
        heads = self.config.n_self_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (heads, -1)) for proj in projections)
        angles = turns(self.config, heads, x.shape[1], x.device)
        return rotate(q, angles), rotate(k, angles), v


class SlidingWindow(_SelfMixer):
    """Token i attends to i - window < j <= i."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        window = self.config.sliding_window or tokens
        near = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
        near = near.tril_().triu_(1 - window)
        return self.out_proj(_attend(*self._project(x), attn_mask=near))


class GatedRetention(_SelfMixer):
    """See `ops.retention`; a norm per head and an output gate come after it."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.g_proj = linear(config.dim, config.dim)
        self.gt_proj = linear(config.dim, config.n_self_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        batch, _, heads, size = q.shape
        state = torch.zeros(
            batch, heads, size, size, dtype=torch.float32, device=x.device
        )
        decay = gate_decay(self.gt_proj(x))
        output, _ = retention_chunkwise(q, k * size**-0.5, v, decay, state)
        output = normalise(output, self.config.norm_eps).flatten(2).type_as(x)
        return self.out_proj(F.silu(self.g_proj(x)) * output)


class CrossAttention(nn.Module):
    """Attention to the global KV of all tokens, or of the last one alone."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads = config.n_attn_heads
        self.q_proj = linear(config.dim, config.dim)
        self.out_proj = linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, angles: Tensor
    ) -> Tensor:
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), angles)
        # A single query is the last token's: it sees all keys.
        return self.out_proj(_attend(q, keys, values, is_causal=x.shape[1] > 1))


class Layer(nn.Module):
    """A mixer and a feed-forward layer, each after a norm, each added to its input."""

    def __init__(self, config: YocoConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(config)
        self.ffn = _FeedForward(config)
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_layer_norm(x), *shared)
        return x + self.ffn(self.final_layer_norm(x))
