"""K-norm: keep the shortest keys (arXiv 2406.11430)."""

from typing import ClassVar

import torch

from .base import Layer, Scorer


class KNorm(Scorer):
    """Minus a key's L2 norm: short keys were seen to draw the most attention.

    In every layer; the paper leaves the first two uncompressed.
    """

    name: ClassVar[str] = "knorm"

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        return -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
