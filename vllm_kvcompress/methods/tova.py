"""TOVA: keep what the last token looks at (arXiv 2401.06104)."""

from typing import ClassVar

import torch

from ..ops.pages import PagedKeys
from ..ops.window_scores import window_scores
from .base import Layer, Scorer


class TOVA(Scorer):
    """Attention of the last query, mean over all query heads of the layer.

    All KV heads keep the same tokens, the last one among them. The paper drops one
    token per step, its reader included.
    """

    name: ClassVar[str] = "tova"

    @property
    def needs_queries(self) -> int:
        return 1

    @property
    def takes_pages(self) -> bool:
        return True

    @property
    def always_kept(self) -> int:
        return 1

    @property
    def across_heads(self) -> bool:
        return True

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor | PagedKeys,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        if queries is None:
            raise ValueError("TOVA needs the last query")
        scores = window_scores(
            queries,
            keys,
            **layer.attention,
        )
        shared = scores.mean(0)
        shared[-1] = float("inf")
        return shared.expand_as(scores)
