"""A dense float32 Llama whose higher layers see fewer and fewer prompt tokens."""

from collections.abc import Callable

import torch
from torch.nn.functional import silu

from tests.dense import DenseLlama

Tensor = torch.Tensor
# Keywords of an engine in which prompts of up to 792 tokens are always pruned.
ONE_STEP = {"max_num_batched_tokens": 800, "max_num_seqs": 8}
# layer, its queries [tokens, query_heads, head_size] and keys [kv_heads, tokens,
# head_size] -> which of these tokens enter the next layer, ascending.
Choice = Callable[[int, Tensor, Tensor], Tensor]
# layer, all queries of the generated tokens [tokens, query_heads, head_size], keys
# [kv_heads, held, head_size] -> which of the held tokens stay, None = all.
Shed = Callable[[int, Tensor, Tensor], Tensor | None]


class PrunedLlama(DenseLlama):
    """An ordinary Llama checkpoint, run layer by layer with a cache per layer."""

    @torch.inference_mode()
    def answer(
        self,
        prompt: list[int],
        generated: list[int],
        choose: Choice,
        shed: Shed | None = None,
    ) -> Tensor:
        """Log-probabilities of the generated tokens, which are forced.

        Returns:
            ``[generated, vocab]``.
        """
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._queries: list[list[Tensor]] = [[] for _ in range(self.layers)]
        rows = [self._run(prompt, 0, choose)]
        for step, token in enumerate(generated[:-1]):
            rows.append(self._run([token], len(prompt) + step, None))
            for layer, (keys, _) in enumerate(self._cache if shed else ()):
                assert shed is not None
                stay = shed(layer, torch.cat(self._queries[layer]), keys)
                if stay is not None:
                    self.lose(layer, stay)
        return torch.stack(rows)

    def lose(self, layer: int, stay: Tensor) -> None:
        """Take all tokens but some out of a layer's cache."""
        keys, values = self._cache[layer]
        self._cache[layer] = keys[:, stay], values[:, stay]

    def held(self) -> list[int]:
        """Tokens in each layer's cache."""
        return [keys.shape[1] for keys, _ in self._cache]

    def _run(self, tokens: list[int], start: int, choose: Choice | None) -> Tensor:
        positions = torch.arange(start, start + len(tokens))
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            h = self._norm(x, prefix + "input_layernorm.weight")

            def project(name: str, heads: int, h=h, prefix=prefix) -> Tensor:
                weight = self.weights[f"{prefix}self_attn.{name}_proj.weight"]
                return (h @ weight.T).view(len(h), heads, self.head_size)

            query = self._rotate(project("q", self.heads), positions)
            key = self._rotate(project("k", self.kv_heads), positions).transpose(0, 1)
            value = project("v", self.kv_heads).transpose(0, 1)
            if start:
                key = torch.cat([self._cache[layer][0], key], 1)
                value = torch.cat([self._cache[layer][1], value], 1)
                self._cache[layer] = key, value
                self._queries[layer].append(query)
            else:
                self._cache.append((key, value))
            count, past = len(h), key.shape[1] - len(h)
            causal = torch.ones(count, key.shape[1], dtype=torch.bool).tril(past)
            out = torch.empty(count, self.heads, self.head_size)
            for head in range(self.heads):
                kv = head // (self.heads // self.kv_heads)
                logits = query[:, head] @ key[kv].T * self.head_size**-0.5
                weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
                out[:, head] = weights @ value[kv]
            x = x + out.flatten(1) @ self.weights[prefix + "self_attn.o_proj.weight"].T
            h = self._norm(x, prefix + "post_attention_layernorm.weight")
            gate, up, down = (
                self.weights[f"{prefix}mlp.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            )
            x = x + (silu(h @ gate.T) * (h @ up.T)) @ down.T
            if choose is not None and layer + 1 < self.layers:
                left = choose(layer, query, key)
                x, positions = x[left], positions[left]
        x = self._norm(x[-1], "model.norm.weight")
        return (x @ self.weights["lm_head.weight"].T).log_softmax(-1)
