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
        kept: Of each owner, ``[kv_heads, kept]``, token numbers.
        block: Tokens of a block; the last, partly filled one stays as it is.
    """

    length: int
    kept: list[Tensor]
    block: int

    @property
    def end(self) -> int:
        """Tokens in whole blocks, of which some are gone."""
        return self.length // self.block * self.block

    def of(self, owner: int, cache: Tensor) -> Tensor:
        """What is left of ``cache [1, kv_heads, length, head_dim]``."""
        kept = [head[own] for head, own in zip(cache[0], self.kept[owner], strict=True)]
        return torch.cat([torch.stack(kept)[None], cache[:, :, self.end :]], dim=2)


@torch.no_grad()
def llama_logprobs(model: Any, tokens: list[int], evicted: Evicted | None) -> Tensor:
    """CLA and LCKV token by token, ``[tokens, vocab]``."""
    layer_map, config = model.config.layer_map, model.config
    nothing = torch.empty(1, config.num_key_value_heads, 0, config.head_dim)
    cache = {owner: (nothing, nothing) for owner in layer_map.writers}
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
                pairs = zip(cache[index], attention.write(normed, rotary), strict=True)
                keys, values = (torch.cat(pair, dim=2) for pair in pairs)
                cache[index] = keys, values
            seen = (past if attention.masked else cache)[owner]
            hidden = model._after(
                layer, hidden, attention.read_token(normed, rotary, seen)
            )
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
