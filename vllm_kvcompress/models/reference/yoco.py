"""YOCO (arXiv 2405.05254) in plain torch, without a cache.

Parameters have the names of the authors' checkpoints (microsoft/unilm, YOCO), so those
load as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ..configs import YocoConfig
from .yoco_layers import (
    CrossAttention,
    GatedRetention,
    Layer,
    RMSNorm,
    SlidingWindow,
    linear,
    rotate,
    turns,
)

Tensor = torch.Tensor


class _SelfDecoder(nn.Module):
    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        mixer = GatedRetention if config.sliding_window is None else SlidingWindow
        self.layers = nn.ModuleList(
            Layer(config, mixer(config)) for _ in range(config.n_layers // 2)
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
        self.k_proj = linear(config.dim, kv_dim)
        self.v_proj = linear(config.dim, kv_dim)
        self.kv_layer_norm = RMSNorm(config)
        self.layers = nn.ModuleList(
            Layer(config, CrossAttention(config)) for _ in range(config.n_layers // 2)
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
        self.layer_norm = RMSNorm(config)
        self.output_projection = linear(config.dim, config.vocab_size)
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
