"""What clients of a soaked server ask for, and how they behave."""

import random
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.tools.needle import needle_prompts

MODEL, BLOCK, BLOCKS, MAX_LEN = "needle", 32, 68, 2048
BUDGET, METHODS = 256, ["keydiff", "streamingllm", "tova"]
STOCK_FLAGS = [
    *("--block-size", str(BLOCK), "--max-model-len", str(MAX_LEN)),
    *("--num-gpu-blocks-override", str(BLOCKS + 1), "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "512", "--served-model-name", MODEL),
    *("--dtype", "float32", "--enforce-eager"),
]
FLAGS = [
    *STOCK_FLAGS,
    *("--kv-compression", "snapkv", "--kv-compression-config.budget", str(BUDGET)),
    *("--kv-compression-config.request_methods", '["keydiff", "streamingllm", "tova"]'),
    *("--kv-compression-config.decode", '{"method": "rkv", "interval": 48}'),
]
# Up to nine tenths of the space.
LENGTHS = [70, 130, 257, 400, 640, 900, 1200, 1600, 1880]
XARGS: list[dict[str, Any]] = [
    *({}, {}, {}),
    {"kv_compression": "off"},
    *({"kv_compression_budget": budget} for budget in (96, 128, 192)),
    *({"kv_compression": method} for method in METHODS),
]
BAD: list[bytes | dict[str, Any]] = [
    b"{",
    b"\xff\xfe",
    b"[1, 2]",
    {"prompt": [1, 4, 5], "max_tokens": "many"},
    {"prompt": [1, 4, 5], "max_tokens": -1},
    {"prompt": {"text": "recall"}},
    {"prompt": [1, 4, 5], "temperature": -1},
    {"prompt": [1, 4, 5], "n": 0},
    {"prompt": [4] * (MAX_LEN + 1)},
    {"prompt": [1, 4, 5], "model": "another"},
    {"prompt": [1, 4, 5], "vllm_xargs": [1]},
]
# Stock vLLM has nothing against these.
BAD_SETTINGS: list[bytes | dict[str, Any]] = [
    {"prompt": [1, 4, 5], "vllm_xargs": xargs, "stream": stream}
    for stream in (False, True)
    for xargs in (
        {"kv_compression": "nope"},
        {"kv_compression": "pyramidkv"},
        {"kv_compression": 1},
        {"kv_compression_budget": BUDGET + 1},
        {"kv_compression_budget": 1},
        {"kv_compression_budget": "many"},
        {"kv_compression_window": 8},
    )
]
ENDS = ["whole", "streamed", "aborted while reading", "aborted while writing", "bad"]


@dataclass(frozen=True)
class Visit:
    """One request, and how its client ends it.

    Attributes:
        kind: Number of what is asked, see `kinds`; of bad bodies, which.
        end: One of `ENDS`.
        patience: Seconds, or pieces of the answer, after which a client leaves.
    """

    kind: int
    end: str
    patience: float


def kinds(count: int, several: bool = True) -> list[dict[str, Any]]:
    """Bodies whose answers are to be the same under load.

    Args:
        count: How many.
        several: Whether some ask for more than one answer.
    """
    rng, found = random.Random(0), []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        (needle,) = needle_prompts(num_tokens=length, needles=1, count=1, seed=number)
        body = {
            "model": MODEL,
            "prompt": needle.token_ids,
            "max_tokens": 8,
            "temperature": 0,
            "vllm_xargs": {**rng.choice(XARGS), "kv_compression_usage": True},
        }
        if number % 4 == 1:  # long enough for two compressions of what is generated
            body |= {"max_tokens": rng.randint(20, 160), "ignore_eos": True}
        elif (
            several and number % 4 == 2
        ):  # vLLM wants a temperature where answers are several
            body |= {"n": rng.choice([2, 3]), "temperature": 1, "top_k": 1}
        found.append(body)
    return found


def visits(count: int, of: int, seed: int) -> list[Visit]:
    """So many requests of so many kinds."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        (end,) = rng.choices(ENDS, [40, 25, 12, 12, 11])
        patience = rng.uniform(0, 0.3) if end.endswith("reading") else rng.randint(1, 9)
        kind = rng.randrange(len(BAD + BAD_SETTINGS) if end == "bad" else of)
        found.append(Visit(kind, end, patience))
    return found
