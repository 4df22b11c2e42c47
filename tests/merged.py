"""What MiniCache does to a dense model, and when, with loops."""

from typing import Any

import torch

from tests.dense import Cut, Edit, Prefill
from tests.oracle import minicache
from tests.quantised import FORMATS, Stored
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.methods.base import Layer
from vllm_kvcompress.ops.select import select

Tensor = torch.Tensor


class Merges:
    """One request's merges, for `DenseLlama.run`.

    Attributes:
        edits: After so many tokens -> what merges.
        cuts: After so many tokens -> what a method has selected before.
        retained: Blocks that stay apart, of the prompt.
        kept: Blocks of the prompt's whole ones that its layers hold.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        layers: int,
        length: int,
        count: int,
        size: int,
        stored: Stored = FORMATS["auto"],
    ) -> None:
        """Work out when so long a prompt merges, and ``count`` tokens after it.

        Args:
            settings: What users write.
            layers: Of the model.
            length: Of the prompt.
            count: Generated tokens.
            size: Tokens per block.
            stored: What the cache makes of merged vectors, for the shallow layer.
        """
        config = KVCompressionConfig.from_dict(settings)
        self._scorer: Any = config.scorer
        self._pairs = self._scorer.layer_pairs(layers)
        self._layers, self._size, self._stored = layers, size, stored
        self.edits: dict[int, Edit] = {}
        self.cuts: dict[int, Cut] = {}
        done = 0
        for due in [length, *self._scorer.decisions(length, length + count - 1)]:
            first, blocks, retained = done, due // size - done, 0
            if due == length:
                if config.budget:
                    blocks = min(blocks, (config.budget - due % size) // size)
                self.kept = blocks
            if not done:
                share = int(self._scorer.retain * blocks)
                retained = max(share, 1) if self._scorer.retain else 0
            if blocks <= retained:
                continue
            if not done:
                self.retained = retained
            done = due // size
            self.edits[due] = self._edit(first, done, blocks, retained)

    def _edit(self, first: int, end: int, blocks: int, retained: int) -> Edit:
        scorer, size = self._scorer, self._size

        def edit(state: Prefill, visible: Any) -> None:
            selects = blocks < end - first
            kv_heads, tokens, _ = state.keys[0].shape
            every = torch.arange(first * size, end * size).expand(kv_heads, -1)
            chosen = {}
            for layers in [*self._pairs, *self._alone()]:
                scores = sum(self._rate(layer, state) for layer in layers)
                best = select(scores[:, : end * size], blocks * size)
                chosen |= dict.fromkeys(layers, best if selects else every)
            if selects:
                tail = torch.arange(end * size, tokens)
                self.cuts[tokens] = lambda layer, *_: [
                    torch.cat([own, tail]) for own in chosen[layer]
                ]
            gamma = scorer.gamma if scorer.retention == "range" else None
            for pair in self._pairs:
                for head, own in enumerate(chosen[pair[0]]):
                    held = [
                        (state.keys[i][head, own], state.values[i][head, own])
                        for i in pair
                    ]
                    restored, stayed = minicache(
                        *held, t=scorer.t, retained=retained * size, gamma=gamma
                    )
                    merged = [i for i in range(len(own)) if i not in stayed]
                    for half, caches in enumerate((state.keys, state.values)):
                        shallow, deep = (layer[half] for layer in restored)
                        # One code for both, and what the deep layer multiplies it by.
                        code = self._stored(shallow[merged], pair[0], half)
                        ratio = deep.norm(dim=-1) / shallow.norm(dim=-1)
                        shallow[merged] = code
                        deep[merged] = code * ratio[merged, None]
                        for layer, vectors in zip(pair, (shallow, deep), strict=True):
                            caches[layer][head, own] = vectors

        return edit

    def _alone(self) -> list[tuple[int]]:
        paired = {layer for pair in self._pairs for layer in pair}
        return [(layer,) for layer in range(self._layers) if layer not in paired]

    def _rate(self, layer: int, state: Prefill) -> Tensor:
        over, keys = self._scorer.over, state.keys[layer]
        if not over:
            return keys.new_zeros(keys.shape[:2])
        queries = state.queries[layer][-over.needs_queries :]
        return over.score(queries, keys, None, Layer(layer, keys.shape[2] ** -0.5))
