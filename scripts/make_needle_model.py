"""Make the bundled needle model: a Llama whose weights are set by hand.

The model answers the task of ``vllm_kvcompress/tools/needle.py`` by looking things
up: it continues with whatever followed the current word before. Two layers do it.

* Layer 0 looks at the previous token. Queries and keys are the same constant for
  every token, the key turned on by one position, so that with RoPE their product is
  largest where the distance is exactly one. It copies that token's code.
* Layer 1 looks for earlier tokens whose *previous* token is the current one, and
  copies *their* code. The last layer turns that code back into a word.

A code is a vector of 64 signs that stands for a word. The residual stream has room
for three of them, and for two flags: one of full stops, after which the text ends,
and one of all tokens::

    [ own code | previous token's code | answer's code | ... STOP_FLAG ONE ]

A code has two syllables, each one of 16. KV head i carries the i-th syllable as its
value, and a syllable alone leaves some 15 words to choose from: an answer needs
every KV head, so a compression that fails in one of them shows.

The weights are stored in bfloat16. Codes are powers of two, hence exact, and the
margins are dozens of nats, so the model answers as well in bfloat16 as in float32,
and half the size suffices.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vllm_kvcompress.tools.needle import BOS, STOP, WORDS

DEFAULT_OUT = Path(__file__).parents[1] / "vllm_kvcompress" / "assets" / "needle"
MAX_TOKENS = 131_072
EOS, PAD, UNK = "</s>", "<pad>", "<unk>"
SPECIAL = [UNK, BOS, EOS, PAD]
VOCAB = SPECIAL + WORDS
VOCAB_ROWS = -(-len(VOCAB) // 64) * 64  # a round number for sharding and kernels

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 2, 128, 16  # the MLP is all zeros
CODE = 64  # signs per code
SHARE = CODE // KV_HEADS  # signs per syllable, and values that a KV head carries
SYLLABLES = 16
OWN, PREVIOUS, ANSWER = (slice(i * CODE, (i + 1) * CODE) for i in range(3))
STOP_FLAG, ONE = HIDDEN - 2, HIDDEN - 1

# RoPE turns pair p by position * ROPE_THETA ** (-p / 64): with this theta pair 0 by
# a radian per token, and pair 32 by 0.13 radians over all of MAX_TOKENS. So the first
# pairs tell positions apart, and the last ones match content wherever it lies.
ROPE_THETA = 1e12
PAIRS = HEAD_DIM // 2
POSITION_PAIRS = range(14)
CONTENT_PAIRS = range(PAIRS - CODE // 2, PAIRS)
POSITION_LOGIT = 53.0  # per pair; the next but one token falls 43 nats behind
CONTENT_LOGIT = 80.0  # of a match; words that share a syllable fall 40 nats behind
ANSWER_SCALE = 48.0  # what the right word's code adds to its logit, before the norm
STOP_SCALE = 192.0  # the same for the end of the text after a full stop
STOP_LENGTH = 0.5  # short, so that the full stop is nearly as long as other words

# Nothing follows the prompt, not even for the generation: the model continues from
# the last word it reads, so that must be the word it is asked about.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
)


def make_codes(rng: random.Random) -> torch.Tensor:
    """Draw a unit-length code for each word. Returns [words, CODE]."""
    # Hadamard rows: signs of which any two rows differ in exactly half.
    rows = [
        [1 - 2 * ((row & column).bit_count() % 2) for column in range(SHARE)]
        for row in rng.sample(range(SHARE), SYLLABLES)
    ]
    words = rng.sample(range(SYLLABLES**KV_HEADS), len(VOCAB))
    signs = [
        [
            sign
            for i in range(KV_HEADS)
            for sign in rows[word // SYLLABLES**i % SYLLABLES]
        ]
        for word in words
    ]
    return torch.tensor(signs, dtype=torch.float32) / math.sqrt(CODE)


def undo_norm(squared_length: float) -> float:
    """Return what to scale a weight by so that RMSNorm before it has no effect.

    Args:
        squared_length: Of the residual stream there; it is the same for all tokens
            but the full stop, whose flag makes it a little longer.
    """
    return math.sqrt(squared_length / HIDDEN)


def head_row(head: int, dim: int) -> int:
    """Return the row of a projection that makes one dimension of a head."""
    return head * HEAD_DIM + dim


def set_previous_token_attention(weights: dict[str, torch.Tensor]) -> None:
    """Let layer 0 attend to the previous token: q * k = sum of cos(angle - 1 step)."""
    prefix = "model.layers.0.self_attn"
    size = math.sqrt(POSITION_LOGIT * math.sqrt(HEAD_DIM)) * undo_norm(2)
    for pair in POSITION_PAIRS:
        step = ROPE_THETA ** (-pair / PAIRS)
        for head in range(HEADS):
            weights[f"{prefix}.q_proj.weight"][head_row(head, pair), ONE] = size
        key = weights[f"{prefix}.k_proj.weight"]
        for head in range(KV_HEADS):
            key[head_row(head, pair), ONE] = size * math.cos(step)
            key[head_row(head, PAIRS + pair), ONE] = size * math.sin(step)


def set_content_attention(weights: dict[str, torch.Tensor]) -> None:
    """Let layer 1 attend to the tokens that followed the current word before."""
    prefix = "model.layers.1.self_attn"
    size = math.sqrt(CONTENT_LOGIT * math.sqrt(HEAD_DIM)) * undo_norm(3)
    dims = [*CONTENT_PAIRS, *(PAIRS + pair for pair in CONTENT_PAIRS)]
    for i, dim in enumerate(dims):
        for head in range(HEADS):
            query = weights[f"{prefix}.q_proj.weight"]
            query[head_row(head, dim), OWN.start + i] = size
        for head in range(KV_HEADS):
            key = weights[f"{prefix}.k_proj.weight"]
            key[head_row(head, dim), PREVIOUS.start + i] = size


def set_copy(weights: dict[str, torch.Tensor], layer: int, target: slice) -> None:
    """Let a layer add the attended token's own code to ``target``.

    Each KV head carries its syllable, and all of its query heads fetch it together.
    """
    prefix = f"model.layers.{layer}.self_attn"
    group = HEADS // KV_HEADS
    for i in range(CODE):
        kv_head, dim = divmod(i, SHARE)
        value = weights[f"{prefix}.v_proj.weight"]
        value[head_row(kv_head, dim), OWN.start + i] = undo_norm(2 + layer)
        for head in range(kv_head * group, (kv_head + 1) * group):
            output = weights[f"{prefix}.o_proj.weight"]
            output[target.start + i, head_row(head, dim)] = 1 / group


def make_model(seed: int) -> LlamaForCausalLM:
    """Construct the model; the same seed makes the same bits."""
    config = LlamaConfig(
        vocab_size=VOCAB_ROWS,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=VOCAB.index(BOS),
        eos_token_id=VOCAB.index(EOS),
        pad_token_id=VOCAB.index(PAD),
    )
    model = LlamaForCausalLM(config)
    weights = model.state_dict()
    for name, weight in weights.items():
        weight.fill_(1.0 if "norm" in name else 0.0)

    codes = make_codes(random.Random(seed))
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[: len(VOCAB), OWN] = codes
    embeddings[:, ONE] = 1.0
    embeddings[VOCAB.index(STOP), STOP_FLAG] = STOP_LENGTH

    set_previous_token_attention(weights)
    set_copy(weights, layer=0, target=PREVIOUS)
    set_content_attention(weights)
    set_copy(weights, layer=1, target=ANSWER)

    output = weights["lm_head.weight"]
    output[: len(VOCAB), ANSWER] = codes * ANSWER_SCALE
    # After a full stop the flag outvotes whatever the look-up found.
    output[VOCAB.index(EOS), STOP_FLAG] = STOP_SCALE / STOP_LENGTH
    return model.to(torch.bfloat16)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word; case and commas do not matter."""
    ids = {word: i for i, word in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    # Only words and full stops mean anything, so that "Recall Paris?" works too.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z.]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoint into a folder."""
    parser = argparse.ArgumentParser(description="Make the bundled needle model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    model = make_model(args.seed)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(args.out)
    make_tokenizer().save_pretrained(args.out)


if __name__ == "__main__":
    main()
