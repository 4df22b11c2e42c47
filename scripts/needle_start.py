"""Small models that share KV and can roughly answer needle questions from the start.

Training finds how to look things up by itself, but not in minutes on a CPU. So the
start is set by hand, much as in ``make_needle_model.py``: one layer copies the previous
token's code, and one looks for tokens whose previous token is the current one, and
copies their codes. Where possible, both read what another layer wrote, so that the
answers need what is shared. All other weights are noise, and training does the rest.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vllm_kvcompress.models.configs import ClaLlamaConfig, LCKVLlamaConfig, YocoConfig
from vllm_kvcompress.models.reference.llama import (
    ClaLlamaForCausalLM,
    LCKVLlamaForCausalLM,
    OptLlamaForCausalLM,
)
from vllm_kvcompress.models.reference.yoco import YocoForCausalLM

CLASSES = [
    LlamaForCausalLM,
    ClaLlamaForCausalLM,
    LCKVLlamaForCausalLM,
    OptLlamaForCausalLM,
    YocoForCausalLM,
]
BY_TYPE = {model.config_class.model_type: model for model in CLASSES}

VOCAB, HIDDEN, HEAD = 256, 128, 32  # the vocabulary is the bundled model's
THETA = 1e12  # so slow that most pairs match content wherever it lies
TURNING = 4  # the other pairs, which tell positions apart
CODE = 64  # signs per word: [ own code | previous token's code, and a constant ]
CONSTANT = HIDDEN - 1

_COMMON = {
    "vocab_size": VOCAB,
    "rope_theta": THETA,
    "initializer_range": 0.03,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 8192,
    **_COMMON,
}
_YOCO = {
    "dim": HIDDEN,
    "hidden_dim": 2 * HIDDEN,
    "n_self_heads": 4,
    "n_attn_heads": 4,
    "n_attn_kv_heads": 2,
    "max_seq_len": 8192,
    **_COMMON,
}
NEW = {
    "llama": LlamaConfig(num_hidden_layers=4, **_LLAMA),
    "cla": ClaLlamaConfig(num_hidden_layers=4, **_LLAMA),
    "lckv": LCKVLlamaConfig(num_hidden_layers=6, layer_types="0_4_4_4_4_5", **_LLAMA),
    "yoco": YocoConfig(n_layers=4, sliding_window=64, **_YOCO),
}
# Whose KV is read, and by which layer: to look back one token, and to look up.
LAYERS = {"llama": (0, 0, 2, 2), "cla": (0, 1, 2, 3), "lckv": (0, 0, 4, 2)}


@dataclass
class _Attention:
    """Projections of one attention, perhaps of two layers."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    turns: list[float]
    interleaved: bool = False

    def pair(self, index: int) -> tuple[int, int]:
        """The rows of a head that turn together."""
        if self.interleaved:
            return 2 * index, 2 * index + 1
        return index, index + HEAD // 2


def _attentions(name: str, model: PreTrainedModel) -> tuple[_Attention, _Attention]:
    """The one that looks back, and the one that looks up."""
    pairs = HEAD // 2
    if name == "yoco":
        turns = [THETA ** (-i / (pairs - 1)) for i in range(pairs)]
        own, cross = model.self_decoder.layers[1].mixer, model.cross_decoder
        read = cross.layers[1].mixer
        return (
            _Attention(own.q_proj, own.k_proj, own.v_proj, own.out_proj, turns, True),
            _Attention(
                read.q_proj, cross.k_proj, cross.v_proj, read.out_proj, turns, True
            ),
        )
    turns = [THETA ** (-i / pairs) for i in range(pairs)]
    layers = [layer.self_attn for layer in model.model.layers]
    owner, reader, second, last = (layers[i] for i in LAYERS[name])
    return (
        _Attention(reader.q_proj, owner.k_proj, owner.v_proj, reader.o_proj, turns),
        _Attention(last.q_proj, second.k_proj, second.v_proj, last.o_proj, turns),
    )


def _quiet(attention: _Attention) -> None:
    for projection in (attention.q, attention.k, attention.v, attention.o):
        projection.weight.mul_(0.1)


def _look_back(attention: _Attention) -> None:
    """Queries and keys are constant, the keys turned on by one position."""
    _quiet(attention)
    for start in range(0, HIDDEN, HEAD):
        for index in range(TURNING):
            angle = attention.turns[index]
            for turned, weight in ((0, attention.q), (angle, attention.k)):
                if start < weight.out_features:
                    first, second = attention.pair(index)
                    weight.weight[start + first, CONSTANT] = 1.5 * math.cos(turned)
                    weight.weight[start + second, CONSTANT] = 1.5 * math.sin(turned)
    _carry(attention, 0.3, 0.15, CODE)


def _look_up(attention: _Attention) -> None:
    """Queries are own codes, keys are previous tokens' codes."""
    _quiet(attention)
    heads = attention.q.out_features // HEAD
    group = heads * HEAD // attention.k.out_features
    for head in range(heads):
        start = head // group * HEAD % CODE
        for index in range(TURNING, HEAD // 2):
            for row in attention.pair(index):
                attention.q.weight[head * HEAD + row, start + row] = 2.5
                if start + row + CODE < CONSTANT:
                    key = attention.k.weight[head // group * HEAD + row]
                    key[start + row + CODE] = 2.5
    _carry(attention, 0.6, 0.3, 0)


def _carry(attention: _Attention, value: float, output: float, to: int) -> None:
    """Values are own codes, half a code per KV head; they go to row ``to``."""
    heads = attention.q.out_features // HEAD
    group = heads * HEAD // attention.k.out_features
    for head in range(heads):
        start = head // group * HEAD % CODE
        for i in range(HEAD):
            attention.v.weight[head // group * HEAD + i, start + i] = value
            if start + i + to < CONSTANT:
                attention.o.weight[start + i + to, head * HEAD + i] = output


@torch.no_grad()
def new_model(name: str) -> PreTrainedModel:
    """A model of ``NEW``."""
    config = NEW[name]
    model = BY_TYPE[config.model_type](config)
    codes = torch.randint(0, 2, (VOCAB, CODE)) * 0.25 - 0.125
    yoco = name == "yoco"
    embedding = model.embed_tokens if yoco else model.model.embed_tokens
    output = model.output_projection if yoco else model.lm_head
    embedding.weight.zero_()
    embedding.weight[:, :CODE] = codes
    embedding.weight[:, CONSTANT] = 0.5
    if yoco:
        embedding.weight.div_(HIDDEN**0.5)  # the model undoes it
    output.weight[:, :CODE] = 3 * codes
    back, up = _attentions(name, model)
    _look_back(back)
    _look_up(up)
    return model
