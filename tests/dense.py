"""A dense float32 Llama with an explicit set of visible tokens per KV head.

The oracle for everything that vLLM does with a compressed cache: it runs the
prompt by full attention, takes tokens out of sight, and decodes step by step.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

Tensor = torch.Tensor
# layer, queries [tokens, query_heads, head_size] of all tokens, keys and values
# [held, head_size] of those that each KV head sees -> of each KV head [kept], ascending
# among the held ones.
Cut = Callable[[int, Tensor, list[Tensor], list[Tensor]], Iterable[Tensor]]


@dataclass
class Prefill:
    """What a prompt leaves behind.

    Attributes:
        logprobs: ``[vocab]`` of the first generated token.
        queries: Layer -> ``[tokens, query_heads, head_size]``, rotated.
        keys: Layer -> ``[kv_heads, tokens, head_size]``, rotated.
        values: Layer -> ``[kv_heads, tokens, head_size]``.
    """

    logprobs: torch.Tensor
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


# Changes what a model holds; layer -> ``[kv_heads, tokens]``, what is visible of it.
Edit = Callable[[Prefill, list[Tensor]], None]


class DenseLlama:
    """An ordinary Llama checkpoint in plain torch.

    Attributes:
        stored: What becomes of keys (0) and values (1) of a layer in the cache.
    """

    stored: Callable[[Tensor, int, int], Tensor] = staticmethod(lambda x, *_: x)

    def __init__(self, path: str | Path) -> None:
        config = json.loads((Path(path) / "config.json").read_text())
        weights = load_file(Path(path) / "model.safetensors")
        self.weights = {name: tensor.float() for name, tensor in weights.items()}
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_size = config["head_dim"]
        self.eps = config["rms_norm_eps"]
        rope = config.get("rope_parameters") or config
        even = torch.arange(0, self.head_size, 2).float() / self.head_size
        self.inverse = rope["rope_theta"] ** -even

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled * self.weights[name]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.float()[:, None, None] * self.inverse
        low, high = x.chunk(2, -1)
        return torch.cat(
            [
                low * angle.cos() - high * angle.sin(),
                high * angle.cos() + low * angle.sin(),
            ],
            -1,
        )

    def _forward(
        self,
        tokens: list[int],
        start: int,
        state: Prefill,
        visible: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Append ``tokens`` at ``start``; returns log-probabilities of the last.

        ``visible`` holds per layer ``[kv_heads, start]`` booleans; None = all.
        """
        count = len(tokens)
        positions = torch.arange(start, start + count)
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            h = self._norm(x, prefix + "input_layernorm.weight")

            def project(name: str, heads: int, h=h, prefix=prefix) -> torch.Tensor:
                weight = self.weights[f"{prefix}self_attn.{name}_proj.weight"]
                return (h @ weight.T).view(count, heads, self.head_size)

            query = self._rotate(project("q", self.heads), positions)
            key = self._rotate(project("k", self.kv_heads), positions).transpose(0, 1)
            value = project("v", self.kv_heads).transpose(0, 1)
            key, value = self.stored(key, layer, 0), self.stored(value, layer, 1)
            if start:
                state.queries[layer] = torch.cat([state.queries[layer], query])
                key = state.keys[layer] = torch.cat([state.keys[layer], key], 1)
                value = state.values[layer] = torch.cat([state.values[layer], value], 1)
            else:
                state.queries.append(query)
                state.keys.append(key)
                state.values.append(value)
            past = torch.ones(self.kv_heads, start, dtype=torch.bool)
            if visible is not None:
                past = visible[layer]
            group = self.heads // self.kv_heads
            out = torch.empty(count, self.heads, self.head_size)
            for head in range(self.heads):
                kv = head // group
                mask = torch.cat([past[kv].expand(count, start), causal], 1)
                logits = query[:, head] @ key[kv].T * self.head_size**-0.5
                weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
                out[:, head] = weights @ value[kv]
            x = x + out.flatten(1) @ self.weights[prefix + "self_attn.o_proj.weight"].T
            h = self._norm(x, prefix + "post_attention_layernorm.weight")
            mlp = {
                name: self.weights[f"{prefix}mlp.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            }
            x = x + (silu(h @ mlp["gate"].T) * (h @ mlp["up"].T)) @ mlp["down"].T
        x = self._norm(x[-1], "model.norm.weight")
        return (x @ self.weights["lm_head.weight"].T).log_softmax(-1)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Prefill:
        """Run a prompt by full attention."""
        state = Prefill(torch.empty(0))
        state.logprobs = self._forward(prompt, 0, state, None)
        return state

    @torch.inference_mode()
    def decode(
        self, state: Prefill, tokens: list[int], kept: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """Log-probabilities after the prompt and after each of ``tokens[:-1]``.

        Args:
            state: From `prefill`; it grows by the decoded tokens.
            tokens: The generated tokens, forced.
            kept: Layer -> ``[kv_heads, prompt]`` booleans; None = everything.

        Returns:
            ``[len(tokens), vocab]``.
        """
        prompt = state.keys[0].shape[1]
        rows = [state.logprobs]
        for step, token in enumerate(tokens[:-1]):
            visible = None
            if kept is not None:
                recent = torch.ones(self.kv_heads, step, dtype=torch.bool)
                visible = [torch.cat([mask, recent], 1) for mask in kept]
            rows.append(self._forward([token], prompt + step, state, visible))
        return torch.stack(rows)

    @torch.inference_mode()
    def run(
        self,
        tokens: list[int],
        prompt: int,
        cuts: Mapping[int, Cut],
        edits: Mapping[int, Edit] = MappingProxyType({}),
    ) -> Tensor:
        """Log-probabilities of everything generated, with tokens lost on the way.

        Args:
            tokens: The prompt and what was generated, forced.
            prompt: Length of the prompt.
            cuts: After so many tokens -> what is kept.
            edits: After so many tokens -> a change of keys and values, before cuts.

        Returns:
            ``[generated, vocab]``.
        """
        state = Prefill(torch.empty(0))
        steps = range(prompt, len(tokens))
        ends = sorted({*(end for end in cuts if end < prompt), *steps})
        visible: list[Tensor] = []
        rows, start = [], 0
        for end in ends:
            if start:
                new = torch.ones(self.kv_heads, start - visible[0].shape[1]).bool()
                visible = [torch.cat([mask, new], 1) for mask in visible]
            seen = visible if start else None
            row = self._forward(tokens[start:end], start, state, seen)
            if end >= prompt:
                rows.append(row)
            if not start:
                visible = [torch.ones(self.kv_heads, 0).bool()] * self.layers
            start = end
            if end in edits:
                edits[end](state, visible)
            if end in cuts:
                new = torch.ones(self.kv_heads, end - visible[0].shape[1]).bool()
                visible = [
                    self._cut(cuts[end], layer, state, torch.cat([mask, new], 1))
                    for layer, mask in enumerate(visible)
                ]
        return torch.stack(rows)

    def _cut(self, cut: Cut, layer: int, state: Prefill, visible: Tensor) -> Tensor:
        """Take all tokens but the kept ones of a layer out of sight."""

        def held(tokens: Tensor) -> list[Tensor]:
            return [own[seen] for own, seen in zip(tokens, visible, strict=True)]

        kept = cut(
            layer,
            state.queries[layer],
            held(state.keys[layer]),
            held(state.values[layer]),
        )
        left = torch.zeros_like(visible)
        for head, own in enumerate(kept):
            left[head, visible[head].nonzero()[own, 0]] = True
        return left
