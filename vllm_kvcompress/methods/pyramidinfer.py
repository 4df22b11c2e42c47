"""PyramidInfer: higher layers compute and keep fewer tokens (arXiv 2405.12532)."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ..ops.pages import PagedKeys
from ..ops.window_scores import window_scores
from .base import Layer, Scorer


class PyramidInfer(Scorer):
    """Attention of the last ``recent_ratio`` of the prompt, one set for all heads.

    Algorithm 1 of the paper as the authors' code runs it (by ratio, not by top-p).
    Between two layers the context shrinks by the layer's decay ratio, and ratios
    compound; the recent tokens and ``sinks`` always stay. What a layer drops, no
    higher layer computes (``prune``), else it is computed and only its KV is dropped.
    Of every ``gen_interval`` generated tokens that leave the recent ones, a layer keeps
    the share ``gen_keep_ratio``, less with depth, as soon as a whole block can go.

    Mended: ``strategy`` is obeyed (theirs falls through to the constant one), the
    linear strategy falls with depth, positions are the prompt's own, the prompt's last
    token is no candidate while generating, and what is recent does not depend on what
    the lowest layer has dropped.
    """

    name: ClassVar[str] = "pyramidinfer"

    recent_ratio: float = Field(
        0.2, gt=0, lt=1, description="Share of the prompt that votes and always stays."
    )
    decay_ratio: float = Field(
        0.9, gt=0, le=1, description="Share of the context that a layer passes on."
    )
    strategy: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="How the ratio falls with depth, from 1 to decay_ratio."
    )
    min_context: int = Field(64, ge=0, description="Context that is never undercut.")
    sinks: int = Field(4, ge=0, description="First tokens that are always kept.")
    distance_weight: float = Field(
        1.2, gt=0, description="Weight of the last vote; the first one weighs 1."
    )
    prune: bool = Field(
        True, description="Do not compute dropped tokens in higher layers."
    )
    gen_interval: int = Field(
        16, ge=0, description="Generated tokens per decision; 0 keeps all of them."
    )
    gen_keep_ratio: float = Field(
        0.9, ge=0, le=1, description="Share of them that the lowest layer keeps."
    )
    gen_decay_ratio: float = Field(
        0.1, ge=0, le=1, description="Part of that share left in the highest layer."
    )

    @property
    def needs_queries(self) -> int:
        return 1

    def queries_wanted(self, num_tokens: int) -> int:
        """See `Scorer.queries_wanted`."""
        return 1 + int(self.recent_ratio * num_tokens)

    @property
    def takes_pages(self) -> bool:
        return True

    @property
    def always_kept(self) -> int:
        return self.sinks + 1

    @property
    def across_heads(self) -> bool:
        return True

    @property
    def prunes(self) -> bool:
        return self.prune

    @property
    def generates(self) -> bool:
        return self.gen_interval > 0

    @property
    def layered(self) -> bool:
        return True

    @property
    def owns_budget(self) -> bool:
        return True

    def _ratio(self, layer: int, num_layers: int) -> float:
        depth = layer / num_layers
        falling = {
            "constant": 0.0,
            "cosine": (math.cos(math.pi * depth) + 1) / 2,
            "linear": 1 - depth,
        }[self.strategy]
        return self.decay_ratio + (1 - self.decay_ratio) * falling

    def layer_budgets(self, num_tokens: int, budget: int, num_layers: int) -> list[int]:
        """Tokens that enter each layer; ``budget`` does not matter."""
        recent = self.queries_wanted(num_tokens)
        least = min(self.min_context, num_tokens - recent)
        lengths = [num_tokens]
        for layer in range(num_layers - 1):
            context = lengths[-1] - recent
            passed = int(context * self._ratio(layer, num_layers))
            lengths.append(passed + recent if passed > least else lengths[-1])
        return lengths

    def decisions(self, prompt: int, end: int) -> Iterator[int]:
        """See `Scorer.decisions`."""
        left = self.gen_interval
        length = prompt
        while True:
            # Recent tokens grow with the length, so that this is a lower bound.
            length = max(length, int((prompt + left) / (1 - self.recent_ratio)))
            while length < end and length - self.queries_wanted(length) < prompt + left:
                length += 1
            if length >= end:
                return
            yield length
            left += self.gen_interval

    def generated_lost(self, prompt: int, num_tokens: int, layers: int) -> list[int]:
        """See `Scorer.generated_lost`."""
        left = max(0, num_tokens - self.queries_wanted(num_tokens) - prompt)
        decisions = left // self.gen_interval
        lost = []
        for layer in range(layers):
            falling = (math.cos(math.pi * layer / layers) + 1) / 2
            share = self.gen_decay_ratio + (1 - self.gen_decay_ratio) * falling
            kept = int(self.gen_interval * self.gen_keep_ratio * share)
            lost.append(decisions * (self.gen_interval - max(kept, 1)))
        return lost

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor | PagedKeys,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`: later queries weigh more, heads are averaged."""
        if queries is None:
            raise ValueError("PyramidInfer needs the recent queries")
        recent = len(queries)
        weights = torch.linspace(1, self.distance_weight, recent, device=queries.device)
        scores = window_scores(
            queries,
            keys,
            weights=weights / recent,
            **layer.attention,
        ).mean(0)
        scores[: self.sinks] = float("inf")
        scores[-recent:] = float("inf")
        return scores.expand(keys.shape[0], -1)
