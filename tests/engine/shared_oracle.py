"""Models that share KV, with tokens out of sight of all layers that read them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import max_pool1d

Tensor = torch.Tensor


@dataclass
class Evicted:
    """What is gone once a prompt is read.

    Attributes:
        length: Of the prompt.
        kept: Of each owner and KV head, ``[kept]`` token numbers.
        block: Tokens of a block; the last, partly filled one stays as it is.
    """

    length: int
    kept: list[Any]
    block: int

    @property
    def end(self) -> int:
        """Tokens in whole blocks, of which some are gone."""
        return self.length // self.block * self.block

    def of(self, owner: int, heads: list[Tensor]) -> list[Tensor]:
        """What is left of ``[length, head_dim]`` of each KV head."""
        return [
            torch.cat([head[own], head[self.end :]])
            for head, own in zip(heads, self.kept[owner], strict=True)
        ]


def _read(attention: Any, query: Tensor, cache: tuple[list[Tensor], ...]) -> Tensor:
    """Attention of one token, ``[1, query_heads, 1, head_dim]``, head by head."""
    group = attention.num_key_value_groups
    found = torch.zeros_like(query)
    for head in range(query.shape[1]):
        keys, values = (part[head // group] for part in cache)
        if attention.window is not None:
            raise NotImplementedError("sliding windows")
        weights = (keys @ query[0, head, 0] * attention.scaling).softmax(0)
        found[0, head, 0] = weights @ values
    return attention._project(found)


@torch.no_grad()
def llama_logprobs(model: Any, tokens: list[int], evicted: Evicted | None) -> Tensor:
    """CLA and LCKV token by token, ``[tokens, vocab]``."""
    layer_map, config = model.config.layer_map, model.config
    none = [torch.empty(0, config.head_dim)] * config.num_key_value_heads
    cache = {owner: (none, none) for owner in layer_map.writers}
    found = []
    for position, token in enumerate(tokens):
        if evicted and position == evicted.length:
            for index, owner in enumerate(layer_map.writers):
                keys, values = cache[owner]
                cache[owner] = evicted.of(index, keys), evicted.of(index, values)
        # A masked layer sees what was there before this token.
        past = dict(cache)
        hidden = model.model.embed_tokens(torch.tensor([[token]]))
        rotary = model._rotary(hidden, position)
        for index, layer in enumerate(model.model.layers):
            attention, owner = layer.self_attn, layer_map.owners[index]
            normed = layer.input_layernorm(hidden)
            if attention.writes:
                keys, values = (
                    [torch.cat(pair) for pair in zip(old, new[0], strict=True)]
                    for old, new in zip(
                        cache[index], attention.write(normed, rotary), strict=True
                    )
                )
                cache[index] = keys, values
            seen = (past if attention.masked else cache)[owner]
            query = attention._query(normed, rotary)
            hidden = model._after(layer, hidden, _read(attention, query, seen))
        found.append(model.lm_head(model.model.norm(hidden))[0, 0])
    return torch.stack(found).log_softmax(-1)


@torch.no_grad()
def yoco_logprobs(model: Any, tokens: list[int], evicted: Evicted | None) -> Tensor:
    """YOCO with the global KV of a prompt out of sight, ``[tokens, vocab]``."""
    from vllm_kvcompress.models.reference.yoco_layers import rotate, turns

    config = model.config
    hidden = model.embed_tokens(torch.tensor([tokens])) * math.sqrt(config.dim)
    for layer in model.self_decoder.layers:
        hidden = layer(hidden)
    cross, heads = model.cross_decoder, config.n_attn_heads
    angles = turns(config, heads, len(tokens))
    normed = cross.kv_layer_norm(hidden)
    split = (config.n_attn_kv_heads, -1)
    keys = rotate(cross.k_proj(normed).unflatten(-1, split), angles)
    values = cross.v_proj(normed).unflatten(-1, split)
    visible = torch.ones(heads, len(tokens), len(tokens), dtype=torch.bool).tril()
    group = heads // config.n_attn_kv_heads
    if evicted:
        for head in range(heads):
            lost = torch.ones(evicted.end, dtype=torch.bool)
            lost[evicted.kept[0][head // group]] = False
            visible[head, evicted.length :, : evicted.end] &= ~lost
    keys, values = (x[0].repeat_interleave(group, dim=1) for x in (keys, values))
    for layer in cross.layers:
        query = layer.mixer.q_proj(layer.mixer_layer_norm(hidden))
        query = rotate(query.unflatten(-1, (heads, -1)), angles)[0]
        logits = torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1])
        weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
        hidden = hidden + layer.mixer.out_proj(mixed)[None]
        hidden = hidden + layer.ffn(layer.final_layer_norm(hidden))
    return model.output_projection(model.layer_norm(hidden))[0].log_softmax(-1)


@torch.no_grad()
def lckv_votes(model: Any, tokens: list[int], window: int, kernel: int) -> list[Tensor]:
    """SnapKV's scores of each owner, in loops: every reader's query heads vote.

    Returns:
        Of each owner ``[kv_heads, tokens]``; the window itself is infinite.
    """
    layer_map, config, count = model.config.layer_map, model.config, len(tokens)
    group = config.num_attention_heads // config.num_key_value_heads
    queries: dict[int, list[Tensor]] = {}
    keys: dict[int, list[Tensor]] = {}
    originals = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        originals.append((attention, attention._query))

        def listen(hidden: Tensor, rotary: Any, own=attention, index=index) -> Tensor:
            found = type(own)._query(own, hidden, rotary)
            queries.setdefault(index, []).append(found[0, :, 0])
            if own.writes:
                keys.setdefault(index, []).append(own.write(hidden, rotary)[0][0, :, 0])
            return found

        attention._query = listen
    model.sequential(torch.tensor([tokens]))
    for attention, original in originals:
        attention._query = original
    votes = []
    for owner in layer_map.writers:
        scores = torch.zeros(config.num_key_value_heads, count)
        readers = layer_map.readers(owner)
        for head in range(config.num_key_value_heads):
            held = torch.stack([key[head] for key in keys[owner]])
            for reader in readers:
                for query_head in range(head * group, (head + 1) * group):
                    for position in range(count - window, count):
                        end = position + 1 - layer_map.masked[reader]
                        query = queries[reader][position][query_head]
                        logits = held[:end] @ query / math.sqrt(config.head_dim)
                        scores[head, :end] += logits.softmax(-1)
        scores /= group * len(readers)
        past = scores[:, : count - window]
        scores[:, : count - window] = max_pool1d(past, kernel, 1, kernel // 2)
        scores[:, count - window :] = math.inf
        votes.append(scores)
    return votes
