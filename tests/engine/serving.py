"""Servers that offer every method between them, and requests that choose one each."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.engine.conftest import (
    BLOCK,
    Answer,
    chunks,
    free_blocks,
    generate,
    prompt,
    scheduler,
)
from tests.matrix import METHODS
from vllm_kvcompress.budget import Fit, Tier
from vllm_kvcompress.config import KEY, KVCompressionConfig
from vllm_kvcompress.methods.base import Scorer

LAYERS = 2
BUDGET = 128
COUNT = 40
LENGTHS = [90, 231, 400]
SHARED = 2 * BLOCK  # tokens that all prompts start with

ENTRIES = {entry["method"]: entry for entry in reversed(METHODS)}  # the first of each


def _scorer(name: str) -> Scorer:
    return KVCompressionConfig.from_dict(ENTRIES[name]).scorer


def _server(name: str, *others: str) -> dict[str, Any]:
    """Settings of a server for some methods of the matrix."""
    return {
        **{k: v for k, v in ENTRIES[name].items() if k != "keep_ratio"},
        "budget": BUDGET,
        "request_methods": {other: _scorer(other).model_dump() for other in others},
    }


EVEN = [name for name in sorted(ENTRIES) if not _scorer(name).layered]
UNEVEN = [name for name in sorted(ENTRIES) if _scorer(name).uneven]
# Who has a budget comes first: it is everybody's.
MERGING = [name for name in sorted(ENTRIES) if _scorer(name).merges]
LAYERED = sorted(
    {*ENTRIES} - {*EVEN, *UNEVEN, *MERGING}, key=lambda n: _scorer(n).owns_budget
)
PRUNING = {"decay_ratio": 0.6, "min_context": 16}
SERVERS = {
    "even": _server(*EVEN),
    "layered": _server(*LAYERED, EVEN[0]),
    "pruning": {
        **_server(LAYERED[0]),
        "request_methods": {"pyramidinfer": PRUNING, EVEN[0]: {}},
    },
    **{name: _server(name, EVEN[0]) for name in [*UNEVEN, *MERGING]},
    "selecting": {**_server(MERGING[0], *EVEN[:3]), "over": "snapkv"},
}
ENGINE = {"max_num_batched_tokens": 8192, "max_num_seqs": 32, "max_model_len": 512}
# Room for all of the longest prompt beside decodes: with less, nothing can be pruned.
STEP = max(LENGTHS) + 32
# Blocks of a KV cache group: a few more than the longest request needs.
SPACE = 3 + -(-(max(LENGTHS) + COUNT) // BLOCK)


@dataclass(frozen=True)
class Request:
    """A prompt, and by which method it is compressed."""

    config: KVCompressionConfig
    method: str
    length: int

    @property
    def scorer(self) -> Scorer:
        return self.config.scorers[self.method]

    @property
    def tokens(self) -> list[int]:
        own = list(self.config.scorers).index(self.method) * 1000 + self.length
        return [*prompt(SHARED), *prompt(self.length - SHARED, seed=own)]

    @property
    def given(self) -> dict[str, Any]:
        """What vLLM takes."""
        return {"prompt_token_ids": self.tokens}

    @property
    def params(self) -> dict[str, Any]:
        return {"extra_args": {KEY: self.method}}

    @property
    def compressions(self) -> int:
        return len(fits(self.config, self.method, self.length))

    @property
    def hits(self) -> int:
        """Tokens that a second request with this prompt need not compute."""
        if self.compressions == 0:
            return (self.length - 1) // BLOCK * BLOCK
        if self.scorer.prunes:
            return 0
        window = self.scorer.queries_wanted(self.length)
        return (self.length - max(window, 1)) // BLOCK * BLOCK


def fits(config: KVCompressionConfig, method: str, length: int) -> dict[Tier, Fit]:
    """What becomes of a prompt, in the tiers that lose something of it."""
    found = config.tier_fits(method, config.tiers(LAYERS), length, BLOCK)
    return {tier: fitted for tier, fitted in found.items() if fitted.shrinks}


def requests(settings: dict[str, Any]) -> list[Request]:
    """Prompts of all lengths for each method of a server, in turns."""
    config = KVCompressionConfig.from_dict(settings)
    return [Request(config, name, n) for n in LENGTHS for name in config.scorers]


def ask(llm: Any, asked: Sequence[Request], **params: Any) -> list[Answer]:
    """Serve requests at once."""
    each = [request.params for request in asked]
    return generate(llm, [r.given for r in asked], COUNT, each=each, **params)


@contextlib.contextmanager
def little_space(llm: Any, asked: Sequence[Request], more: int = 0) -> Iterator[None]:
    """Leave hardly more blocks, and tokens per step, than the longest one needs."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    groups = len(asked[0].config.tiers(LAYERS))
    taken = pool.get_new_blocks(free_blocks(llm) - (SPACE + more) * groups)
    try:
        with chunks(llm, STEP):
            yield
    finally:
        pool.free_blocks(taken)
