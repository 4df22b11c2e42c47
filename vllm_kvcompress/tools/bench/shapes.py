"""The benchmark's traffic: what each shape sends, and how much KV space it gets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompts = Sequence[Sequence[int]]

SLACK_TOKENS = 256  # vLLM's null block, and half-filled blocks


@dataclass(frozen=True)
class Traffic:
    """What one shape sends.

    Attributes:
        requests: How many prompts, all sent at once.
        prompt_len: Tokens of each.
        shared: Tokens at the start of a prompt that all of them share.
        max_tokens: Output tokens of each.
        kv_tokens: KV space in tokens of stock vLLM.
        passes: How often one process measures it, each time with new prompts.
    """

    requests: int
    prompt_len: int
    max_tokens: int
    kv_tokens: int
    shared: int = 0
    passes: int = 1

    def prompts(self, vocab_size: int) -> list[Prompts]:
        """Random prompts for every pass; the same on every call."""
        return [self._one_pass(vocab_size, seed) for seed in range(1, self.passes + 1)]

    def _one_pass(self, vocab_size: int, seed: int) -> Prompts:
        source = random.Random(seed)
        prefix = _tokens(source, vocab_size, self.shared)
        tail = self.prompt_len - self.shared
        return [
            prefix + _tokens(source, vocab_size, tail) for _ in range(self.requests)
        ]

    def warmup(self, vocab_size: int, kept: int) -> Prompts:
        """One prompt that runs every code path once, compression included."""
        length = min(self.prompt_len, 2 * kept + 512)
        return [_tokens(random.Random(0), vocab_size, length)]


def _tokens(source: random.Random, vocab_size: int, count: int) -> list[int]:
    return source.choices(range(vocab_size), k=count)


def long_decode(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """A few long requests, space for all: the speed of decoding."""
    n, t = requests or 4, max_tokens or 128
    return Traffic(n, prompt_len, t, kv_tokens=int(1.25 * n * (prompt_len + t)))


def limit(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """`long_decode` with prompts of only ``kept`` tokens: a perfect compressor."""
    return long_decode(kept, kept, requests, max_tokens)


def tight(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """Many long requests in space for not quite two: how many run at once."""
    n, t = requests or 9, max_tokens or 2304
    return Traffic(n, prompt_len, t, kv_tokens=int(1.7 * (prompt_len + t)))


def ample(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """Short requests that no method shrinks, much space: compression can only lose."""
    n, t, short = requests or 16, max_tokens or 128, min(256, kept)
    return Traffic(n, short, t, kv_tokens=4 * n * (short + t), passes=5)


def shared_prefix(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """Requests that differ in their last tokens only: prefix caching at work."""
    n, t = requests or 16, max_tokens or 64
    tail = max(1, prompt_len // 32)
    space = 2 * (prompt_len + n * (kept + tail + t))
    return Traffic(n, prompt_len, t, kv_tokens=space, shared=prompt_len - tail)


def decode_heavy(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """Hardly a prompt, long answers, space for few: LCKV's own setting."""
    n, t = requests or 48, max_tokens or 2043
    return Traffic(n, 5, t, kv_tokens=2 * (5 + t))


def prefill(
    prompt_len: int, kept: int, requests: int | None, max_tokens: int | None
) -> Traffic:
    """One long prompt and its first token."""
    return Traffic(requests or 1, prompt_len, 1, kv_tokens=2 * prompt_len)


SHAPES = {
    "long_decode": long_decode,
    "tight": tight,
    "ample": ample,
    "shared_prefix": shared_prefix,
    "decode_heavy": decode_heavy,
    "prefill": prefill,
}
EVICTION_SHAPES = ("long_decode", "tight", "ample", "shared_prefix")
SHARING_SHAPES = ("long_decode", "tight", "decode_heavy", "prefill")


def kv_space_bytes(traffic: Traffic, token_bytes: int) -> int:
    """KV space of a shape in bytes."""
    return (traffic.kv_tokens + SLACK_TOKENS) * token_bytes
