"""PyramidInfer: higher layers compute and keep fewer tokens (arXiv 2405.12532)."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ..ops.window_scores import window_scores
from .base import Layer, Scorer


class PyramidInfer(Scorer):
    """Attention of the last ``recent_ratio`` of the prompt, one set for all heads.

    Algorithm 1 of the paper as the authors' code runs it (by ratio, not by top-p).
    Between two layers the context shrinks by the layer's decay ratio, and ratios
    compound; the recent tokens and ``sinks`` always stay. What a layer drops, no
    higher layer computes (``prune``), else it is computed and only its KV is dropped.

    Mended: ``strategy`` is obeyed (theirs falls through to the constant one), the
    linear strategy falls with depth, and positions are the prompt's own.
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

    @property
    def needs_queries(self) -> int:
        return 1

    def queries_wanted(self, num_tokens: int) -> int:
        """See `Scorer.queries_wanted`."""
        return 1 + int(self.recent_ratio * num_tokens)

    @property
    def always_kept(self) -> int:
        return self.sinks + 1

    @property
    def prunes(self) -> bool:
        return self.prune

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

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`: later queries weigh more, heads are averaged."""
        if queries is None:
            raise ValueError("PyramidInfer needs the recent queries")
        recent = len(queries)
        weights = torch.linspace(1, self.distance_weight, recent, device=keys.device)
        scores = window_scores(
            queries,
            keys,
            scale=layer.scale,
            softcap=layer.softcap,
            weights=weights / recent,
        ).mean(0)
        scores[: self.sinks] = float("inf")
        scores[-recent:] = float("inf")
        return scores.expand(len(keys), -1)
