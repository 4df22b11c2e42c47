"""SnapKV: keep what the end of the prompt looks at (arXiv 2404.14469)."""

from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field

from ..ops.pages import PagedKeys
from ..ops.pool import Pooling, pool
from ..ops.window_scores import window_scores
from .base import Layer, Scorer


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, such as 5 or 7")
    return value


KernelSize = Annotated[int, AfterValidator(_odd)]


class SnapKV(Scorer):
    """Attention of the last ``window`` queries, pooled over neighbours.

    Sum over the window, mean over the query heads of a KV head, then pooling
    over ``[0, n - window)``; the window itself is always kept (section 4.1; for
    GQA the authors' issue 22 and KVCache-Factory's "kv_head" mode).
    """

    name: ClassVar[str] = "snapkv"

    window: int = Field(32, ge=1, description="Last prompt tokens that vote.")
    kernel_size: KernelSize = Field(
        7, ge=1, description="Pooling width, odd; 1 = none."
    )
    pooling: Pooling = Field("max", description="How neighbours are smoothed.")

    @property
    def needs_queries(self) -> int:
        return self.window

    @property
    def takes_pages(self) -> bool:
        return True

    @property
    def always_kept(self) -> int:
        return self.window

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor | PagedKeys,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        if queries is None:
            raise ValueError("SnapKV needs the observation window's queries")
        scores = window_scores(
            queries,
            keys,
            **layer.attention,
        )
        past = scores.shape[1] - self.window
        scores[:, :past] = pool(
            scores[:, :past], kernel_size=self.kernel_size, pooling=self.pooling
        )
        scores[:, past:] = float("inf")
        return scores
