"""What the shadow memory of simulations knows of each request's KV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kvcompress.engine.check.ledger import require
from vllm_kvcompress.plan import Compress

BLOCK = 4  # tokens
STOP, VOCAB = 0, 50
Slot = tuple[Any, ...]
MERGED = -1  # in place of a slot's group


def chain(tokens: list[int]) -> list[int]:
    """Content identity: a token's KV depends on the token and all before it."""
    links = [0]
    for token in tokens:
        links.append(hash((links[-1], token)))
    return links[1:]


def answer(tokens: list[int]) -> int:
    """The model's next token; now and then it stops by surprise."""
    link = chain(tokens)[-1]
    return STOP if link % 16 == 0 else 1 + link % (VOCAB - 1)


@dataclass
class Life:
    """A request on the worker, from an admission until it is removed.

    Its latest step began with token ``began``, and the last ``drafted`` of its tokens
    may be wrong. ``slots[group][position]`` says what the KV of a token is: ``(group,
    link)`` if it is full attention's, ``(group, link, uid)`` if it saw a compressed
    context. What two layers merged begins with `MERGED` and the uid.
    """

    uid: int
    tokens: list[int]
    prompt: int
    slots: list[list[Slot]]
    computed: int = 0
    drafted: int = 0
    began: int = 0
    kept: dict[int, Compress] = field(default_factory=dict)
    private: dict[int, list[Slot]] = field(default_factory=dict)

    def compute(self, tokens: int, pruned: bool = False) -> range:
        """Go on by some tokens, and return their positions."""
        new = range(self.computed, self.computed + tokens)
        self.began = new.start
        require(new.stop <= len(self.tokens), "a token is scheduled that is unknown")
        mark = (self.uid,) if self.kept or pruned else ()
        links = chain(self.tokens)[new.start : new.stop]
        for group, slots in enumerate(self.slots):
            slots += [(group, link, *mark) for link in links]
        self.computed = new.stop
        return new

    def draft(self, tokens: int, hopeless: bool) -> None:
        """Guess the next tokens, some of them right."""
        for _ in range(tokens):
            right = answer(self.tokens)
            wrong = hopeless or chain(self.tokens)[-1] % 3 == 0
            self.tokens.append((right + wrong) % VOCAB)
        self.drafted = tokens

    def sample(self) -> list[int]:
        """Judge the drafts, forget what follows a wrong one, and answer."""
        known = len(self.tokens) - self.drafted
        end = known
        while end < len(self.tokens) and self.tokens[end] == answer(self.tokens[:end]):
            end += 1
        self.tokens[end:] = [answer(self.tokens[:end])]
        self.computed = end
        for slots in self.slots:
            del slots[end:]
        return self.tokens[known:]

    def pack(self, group: int, do: Compress) -> None:
        """Say what private blocks hold from now on, the i-th token chosen as ``-i``."""
        held, replaced = self.held(group), (do.end_block - do.shift) * BLOCK
        first, end = do.candidates or (0, replaced)
        left = len(do.destination) * BLOCK - first - (replaced - end)
        require(0 <= left <= end - first, left, "of the candidates stay", do)
        chosen = [(group, -i, self.uid, do.num_tokens) for i in range(left)]
        self.private[group] = held[:first] + chosen + held[end:replaced]
        self.kept[group] = do

    def merge(self, pair: Sequence[int], dos: Mapping[int, Compress]) -> None:
        """The same where two groups merge; in order, if all that they replace does."""
        do = dos[pair[1]]
        replaced = (do.end_block - do.shift) * BLOCK
        first, end = do.candidates or (0, replaced)
        require(end == replaced, do, "keeps tokens behind the merged ones")
        require(do.end_block * BLOCK <= do.num_tokens, do, "merges a part of a block")
        held = [self.held(group)[:replaced] for group in pair]
        both = list(zip(*(slots[first:] for slots in held), strict=True))
        twice = [slot for slots in both for slot in slots if slot[0] == MERGED]
        require(not twice, do, "merges again", twice)
        count = do.merged_blocks * BLOCK
        left = len(do.destination) * BLOCK - first - count
        require(0 <= left <= len(both) - count, left, "are retained", do)
        merged: list[Slot] = [(MERGED, self.uid, *slots) for slots in both]
        if count < len(both):
            merged = [
                (MERGED, self.uid, *pair, -i, do.num_tokens) for i in range(count)
            ]
        for group, slots in zip(pair, held, strict=True):
            chosen = [(group, -i, self.uid, do.num_tokens) for i in range(left)]
            self.private[group] = slots[:first] + merged + chosen
            self.kept[group] = dos[group]

    def held(self, group: int) -> list[Slot]:
        """All that attention reads: private blocks, and what lies behind them."""
        replaced = self.kept[group].end_block if group in self.kept else 0
        return self.private.get(group, []) + self.slots[group][replaced * BLOCK :]

    def check_window(self, queries: torch.Tensor, do: Compress) -> None:
        """Invariant 7: a scorer sees the latest queries."""
        seen = queries.tolist()
        wanted = [
            [self.uid, i] for i in range(do.num_tokens - do.window, do.num_tokens)
        ]
        require(seen == wanted, "observed", seen, "instead of", wanted)

    def merges(self, group: int) -> bool:
        """Whether merged tokens are among what a group reads."""
        return any(slot[0] == MERGED for slot in self.private.get(group, ()))

    def factors(self, slots: list[Slot]) -> list[int]:
        """What the deep layer of a pair multiplies such tokens with, in the shadow."""
        return [1 + slot[1] if slot[0] == MERGED else 1 for slot in slots]


@dataclass(eq=False)
class Layer:
    """An attention layer, one for each KV cache group."""

    kv_cache_dtype = "auto"
    group: int
    kv_cache: torch.Tensor
