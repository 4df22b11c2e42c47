"""YOCO (arXiv 2405.05254) in plain torch, without a cache.

Parameters have the names of the authors' checkpoints (microsoft/unilm, YOCO), so those
load as they are. Two things differ from most models: rotations turn interleaved pairs,
and their frequencies fall from 1 to ``1 / rope_theta`` itself.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

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


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class _RMSNorm(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * normalise(x, self.eps)


class _FeedForward(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.fc1 = _linear(config.dim, config.hidden_dim)
        self.gate = _linear(config.dim, config.hidden_dim)
        self.fc2 = _linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class _SlidingWindow(nn.Module):
    """Token i attends to i - window < j <= i; as many KV heads as query heads."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = _linear(config.dim, config.dim)
        self.k_proj = _linear(config.dim, config.dim)
        self.v_proj = _linear(config.dim, config.dim)
        self.out_proj = _linear(config.dim, config.dim)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, ``[batch, tokens, heads, head_size]``; rotated."""
        heads = self.config.n_self_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (heads, -1)) for proj in projections)
        angles = turns(self.config, heads, x.shape[1], x.device)
        return rotate(q, angles), rotate(k, angles), v

    def forward(self, x: Tensor) -> Tensor:
        window, tokens = self.config.sliding_window, x.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril_()
        if window is not None:
            mask.triu_(1 - window)
        return self.out_proj(_attend(*self._project(x), attn_mask=mask))


class _GatedRetention(_SlidingWindow):
    """See `ops.retention`; a norm per head and an output gate come after it."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__(config)
        self.g_proj = _linear(config.dim, config.dim)
        self.gt_proj = _linear(config.dim, config.n_self_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        batch, _, heads, size = q.shape
        state = torch.zeros(batch, heads, size, size, device=x.device)
        decay = gate_decay(self.gt_proj(x))
        output, _ = retention_chunkwise(q, k * size**-0.5, v, decay, state)
        output = normalise(output, self.config.norm_eps).flatten(2).type_as(x)
        return self.out_proj(F.silu(self.g_proj(x)) * output)


class _CrossAttention(nn.Module):
    """Attention to the global KV, for as many last tokens as ``x`` has."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.heads = config.n_attn_heads
        self.q_proj = _linear(config.dim, config.dim)
        self.out_proj = _linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, angles: Tensor
    ) -> Tensor:
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), angles)
        # A single query is the last token's: it sees all keys.
        return self.out_proj(_attend(q, keys, values, is_causal=x.shape[1] > 1))


class _Layer(nn.Module):
    def __init__(self, config: YocoConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = _RMSNorm(config)
        self.ffn = _FeedForward(config)
        self.final_layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor, *shared: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_layer_norm(x), *shared)
        return x + self.ffn(self.final_layer_norm(x))


class _SelfDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        mixer = _GatedRetention if config.sliding_window is None else _SlidingWindow
        self.layers = nn.ModuleList(
            _Layer(config, mixer(config)) for _ in range(config.n_layers // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _CrossDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.config = config
        kv_dim = config.dim // config.n_attn_heads * config.n_attn_kv_heads
        self.k_proj = _linear(config.dim, kv_dim)
        self.v_proj = _linear(config.dim, kv_dim)
        self.kv_layer_norm = _RMSNorm(config)
        self.layers = nn.ModuleList(
            _Layer(config, _CrossAttention(config)) for _ in range(config.n_layers // 2)
        )

    def forward(self, x: Tensor, last: int) -> Tensor:
        """The outputs of the ``last`` tokens (1 or all); all of them write KV."""
        config, normed = self.config, self.kv_layer_norm(x)
        angles = turns(config, config.n_attn_heads, x.shape[1], x.device)
        keys = self.k_proj(normed).unflatten(-1, (config.n_attn_kv_heads, -1))
        values = self.v_proj(normed).unflatten(-1, (config.n_attn_kv_heads, -1))
        keys = rotate(keys, angles)
        x = x[:, -last:]
        for layer in self.layers:
            x = layer(x, keys, values, angles[-last:])
        return x


class YocoForCausalLM(PreTrainedModel):
    """YOCO as its authors define it; no cache, no `generate`.

    Raises:
        ValueError: The configuration does not fit together.
    """

    config_class = YocoConfig
    _tied_weights_keys = {"output_projection.weight": "embed_tokens.weight"}

    def __init__(self, config: YocoConfig) -> None:
        config.validate_architecture()  # It may have been changed since it was made.
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.self_decoder = _SelfDecoder(config)
        self.cross_decoder = _CrossDecoder(config)
        self.layer_norm = _RMSNorm(config)
        self.output_projection = _linear(config.dim, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The layer that transformers ties to the embeddings."""
        return self.output_projection

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another layer in its place."""
        self.output_projection = new_embeddings

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None
    ) -> CausalLMOutput:
        """The logits of all tokens, and the loss if there are labels.

        Args:
            input_ids: ``[batch, tokens]`` integers, no padding on the left.
            labels: The same; -100 is left out. Token t is scored on label t + 1.

        Returns:
            ``logits``: ``[batch, tokens, vocab]``; ``loss``: a float32 scalar or None.

        Raises:
            ValueError: ``input_ids`` has another shape or no tokens.
        """
        logits = self._logits(input_ids, last=input_ids.shape[-1])
        loss = None
        if labels is not None:
            wanted = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted)
        return CausalLMOutput(loss=loss, logits=logits)

    def last_logits(self, input_ids: Tensor) -> Tensor:
        """The last token's logits by early exit: the others skip the cross-decoder.

        Args:
            input_ids: ``[batch, tokens]`` integers, no padding on either side.

        Returns:
            ``[batch, vocab]``.

        Raises:
            ValueError: ``input_ids`` has another shape or no tokens.
        """
        return self._logits(input_ids, last=1)[:, 0]

    def _logits(self, input_ids: Tensor, last: int) -> Tensor:
        if input_ids.ndim != 2 or input_ids.shape[1] < 1:
            raise ValueError(
                "input_ids must be [batch, tokens] with at least one token, not of "
                f"shape {list(input_ids.shape)}"
            )
        x = self.config.dim**0.5 * self.embed_tokens(input_ids)
        x = self.cross_decoder(self.self_decoder(x), last)
        return self.output_projection(self.layer_norm(x))
