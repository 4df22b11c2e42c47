"""Llamas that share KV across layers, in plain transformers and torch.

CLA (arXiv 2405.12981), Layer-Condensed KV (2405.10637) and Llamas in YOCO's manner
(2405.05254) differ in the layer map of their configuration alone. These models say
what is right and can be trained; vLLM runs others with the same weights.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from ..configs import ClaLlamaConfig, LCKVLlamaConfig, OptLlamaConfig
from ..layer_map import Span

KV = tuple[torch.Tensor, torch.Tensor]
"""Rotated keys and values, ``[batch, kv_heads, tokens, head_dim]`` each."""
Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, ``[1, tokens, head_dim]`` each."""


class SharedAttention(LlamaAttention):
    """Attention to the keys and values of some layer, perhaps this one.

    Layers that nobody reads have no ``k_proj`` and no ``v_proj``.
    """

    def __init__(self, config: ClaLlamaConfig | LCKVLlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        layer_map = config.layer_map
        self.masked = layer_map.masked[layer]
        slides = layer_map.sliding[layer]
        self.window: int | None = config.sliding_window if slides else None
        self.writes = layer in layer_map.writers
        if not self.writes:
            del self.k_proj, self.v_proj
        self.qk_norm = getattr(config, "use_qk_norm", False)
        if self.qk_norm:
            eps = config.rms_norm_eps
            self.query_layernorm = LlamaRMSNorm(self.head_dim, eps)
            self.key_layernorm = LlamaRMSNorm(self.head_dim, eps)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, -1, self.head_dim).transpose(1, 2)

    def write(self, hidden: torch.Tensor, rotary: Rotary) -> KV:
        """Keys and values of ``hidden [batch, tokens, hidden]``."""
        key, value = self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        return apply_rotary_pos_emb(key, key, *rotary)[1], value

    def _query(self, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        query = self._heads(self.q_proj(hidden))
        query = apply_rotary_pos_emb(query, query, *rotary)[0]
        return self.query_layernorm(query) if self.qk_norm else query

    def _output(
        self, query: torch.Tensor, kv: KV, visible: torch.Tensor | None
    ) -> torch.Tensor:
        key, value = kv
        return scaled_dot_product_attention(
            query,
            self.key_layernorm(key) if self.qk_norm else key,
            value,
            attn_mask=visible,
            is_causal=visible is None and query.shape[2] > 1,
            scale=self.scaling,
            enable_gqa=True,
        )

    def _project(self, output: torch.Tensor) -> torch.Tensor:
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def read_prompt(
        self, hidden: torch.Tensor, rotary: Rotary, kv: KV | None
    ) -> torch.Tensor:
        """Attention of all tokens of a prompt.

        Args:
            hidden: ``[batch, tokens, hidden]``.
            rotary: Of the tokens.
            kv: What the owner wrote for the same tokens; None = nothing yet.

        Returns:
            ``[batch, tokens, hidden]``; a token that sees no key reads zeros.
        """
        query = self._query(hidden, rotary)
        output = torch.zeros_like(query)
        # Without the current token, query i is to key i - 1 what others are to key i.
        skip = int(self.masked)
        tokens = query.shape[2] - skip
        window = None if self.window is None else self.window - skip
        if kv is None or tokens == 0 or window == 0:
            return self._project(output)
        visible = None
        if window is not None and window < tokens:
            ones = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
            visible = ones.tril().triu(1 - window)
        key, value = (part[:, :, :tokens] for part in kv)
        seen = self._output(query[:, :, skip:], (key, value), visible)
        return self._project(torch.cat([output[:, :, :skip], seen], dim=2))

    def read_token(self, hidden: torch.Tensor, rotary: Rotary, kv: KV) -> torch.Tensor:
        """Attention of one token.

        Args:
            hidden: ``[batch, 1, hidden]``.
            rotary: Of this token.
            kv: All keys and values that this token may see but for the window.

        Returns:
            ``[batch, 1, hidden]``.
        """
        query = self._query(hidden, rotary)
        window = None if self.window is None else self.window - int(self.masked)
        tokens = kv[0].shape[2]
        start = 0 if window is None else max(0, tokens - window)
        key, value = (part[:, :, start:] for part in kv)
        if key.shape[2] == 0:
            return self._project(torch.zeros_like(query))
        return self._project(self._output(query, (key, value), None))


class SharedLlamaForCausalLM(LlamaForCausalLM):
    """What the models below have in common: ordinary Llamas but for a layer map."""

    def __init__(self, config: ClaLlamaConfig | LCKVLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = SharedAttention(config, index)
        self.post_init()

    def _rotary(self, hidden: torch.Tensor, first: int) -> Rotary:
        positions = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        return self.model.rotary_emb(hidden, positions[None])

    @staticmethod
    def _after(
        layer: LlamaDecoderLayer, hidden: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _run(
        self, span: Span, hidden: torch.Tensor, rotary: Rotary, written: dict[int, KV]
    ) -> torch.Tensor:
        """Run a span once.

        Where a layer reads a later one, ``written`` still has what that layer wrote in
        the pass before.
        """
        owners = self.config.layer_map.owners
        for index in range(span.first, span.end):
            layer = self.model.layers[index]
            normed = layer.input_layernorm(hidden)
            if layer.self_attn.writes:
                written[index] = layer.self_attn.write(normed, rotary)
            kv = written.get(owners[index])
            attended = layer.self_attn.read_prompt(normed, rotary, kv)
            hidden = self._after(layer, hidden, attended)
        return hidden

    def _passes(self, passes: int | None, tokens: int) -> tuple[int, int]:
        """All passes, and those of them that train nothing."""
        if passes is not None and passes < 1:
            raise ValueError(f"passes={passes} must be at least 1")
        config = self.config
        most = passes or max(1, min(getattr(config, "passes", 1), tokens))
        if not self.training:
            return most, 0
        if hasattr(config, "num_trained_encoders"):
            trained = config.num_trained_encoders + 1
        else:
            trained = getattr(config, "backward_passes", 1)
        return most, max(0, most - max(1, trained))

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        passes: int | None = None,
    ) -> CausalLMOutput:
        """Run all tokens at once; equal to `sequential` where passes suffice.

        Args:
            input_ids: ``[batch, tokens]`` int64; pad to the right.
            labels: The same, -100 where there is no loss; they are shifted here.
            passes: Over layers that read later ones. After k of them the first k
                tokens are exact. None = as the configuration has it.

        Returns:
            ``logits [batch, tokens, vocabulary]``, and the loss where there are labels.

        Raises:
            ValueError: ``passes`` is below 1.
        """
        hidden = self.model.embed_tokens(input_ids)
        rotary = self._rotary(hidden, 0)
        total, untrained = self._passes(passes, input_ids.shape[1])
        written: dict[int, KV] = {}
        for span in self.config.layer_map.spans:
            if not span.repeats:
                hidden = self._run(span, hidden, rotary, written)
                continue
            with torch.no_grad():
                for _ in range(untrained):
                    self._run(span, hidden, rotary, written)
            for _ in range(total - untrained - 1):
                self._run(span, hidden, rotary, written)
            hidden = self._run(span, hidden, rotary, written)
        logits = self.lm_head(self.model.norm(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def sequential(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The definition: token after token, each through all layers.

        Args:
            input_ids: ``[batch, tokens]`` int64.

        Returns:
            Logits, ``[batch, tokens, vocabulary]``.
        """
        config, layer_map = self.config, self.config.layer_map
        batch, tokens = input_ids.shape
        nothing = self.lm_head.weight.new_empty(
            batch, config.num_key_value_heads, 0, config.head_dim
        )
        cache: dict[int, KV] = {i: (nothing, nothing) for i in layer_map.writers}
        logits = []
        for token in range(tokens):
            hidden = self.model.embed_tokens(input_ids[:, token : token + 1])
            rotary = self._rotary(hidden, token)
            for index, layer in enumerate(self.model.layers):
                normed = layer.input_layernorm(hidden)
                if layer.self_attn.writes:
                    key, value = layer.self_attn.write(normed, rotary)
                    keys, values = cache[index]
                    cache[index] = (
                        torch.cat([keys, key], 2),
                        torch.cat([values, value], 2),
                    )
                end = token if layer.self_attn.masked else token + 1
                keys, values = cache[layer_map.owners[index]]
                seen = keys[:, :, :end], values[:, :, :end]
                attended = layer.self_attn.read_token(normed, rotary, seen)
                hidden = self._after(layer, hidden, attended)
            logits.append(self.lm_head(self.model.norm(hidden)))
        return torch.cat(logits, dim=1)


class ClaLlamaForCausalLM(SharedLlamaForCausalLM):
    """A Llama with Cross-Layer Attention."""

    config_class = ClaLlamaConfig


class LCKVLlamaForCausalLM(SharedLlamaForCausalLM):
    """A Llama with Layer-Condensed KV."""

    config_class = LCKVLlamaConfig


class OptLlamaForCausalLM(SharedLlamaForCausalLM):
    """The same from the first code base of its authors."""

    config_class = OptLlamaConfig
