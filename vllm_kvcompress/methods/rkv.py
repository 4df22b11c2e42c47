"""R-KV: keep what is looked at and not said twice (arXiv 2505.24133)."""

from typing import ClassVar

import torch
from pydantic import Field

from ..ops.past_scores import past_scores
from ..ops.pool import pool
from ..ops.redundancy import redundancy
from .base import Layer, Scorer
from .snapkv import KernelSize


class RKV(Scorer):
    """Importance mixed with redundancy; the window is always kept.

    Made for `decode`: it compares all stored keys with one another, and reasoning
    repeats itself. As the authors' code does it (R-KV d15c976), with the paper's
    ``mix_lambda`` (the code's is 0.07), in float32, and without a side effect of
    the code: tokens that have nothing similar protect token 0.
    """

    name: ClassVar[str] = "rkv"

    window: int = Field(8, ge=1, description="Last tokens that vote.")
    kernel_size: KernelSize = Field(
        7, ge=1, description="Max-pooling width of the importance, odd; 1 = none."
    )
    mix_lambda: float = Field(
        0.1, ge=0, le=1, description="Weight of importance; the rest is redundancy's."
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="Cosine above which two keys say the same."
    )
    recent: int = Field(
        1, ge=0, description="Latest tokens that say the same and are not redundant."
    )

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def always_kept(self) -> int:
        return self.window

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        if queries is None:
            raise ValueError("R-KV needs the observation window's queries")
        past = keys.shape[1] - self.window
        importance = past_scores(
            queries, keys[:, :past], scale=layer.scale, softcap=layer.softcap
        )
        importance = pool(importance, kernel_size=self.kernel_size, pooling="max")
        scores = redundancy(keys, threshold=self.threshold, recent=self.recent)
        scores *= self.mix_lambda - 1
        scores[:, :past] += self.mix_lambda * importance
        scores[:, past:] = float("inf")
        return scores
