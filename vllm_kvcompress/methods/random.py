"""Random: the floor that every other method has to beat."""

from typing import ClassVar

import torch
from pydantic import Field

from .base import Layer, Scorer


class Random(Scorer):
    """Chance decides, for every KV head on its own, whatever the tokens are.

    The choice depends on the seed, the layer, the head and the number of tokens alone,
    so it is the same in every run and process, and for as many tensor-parallel workers.
    """

    name: ClassVar[str] = "random"

    # torch's CPU generator looks at 32 bits; the other 16 number the layer.
    seed: int = Field(0, ge=0, lt=2**16, description="Another seed, other tokens.")

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`."""
        generator = torch.Generator().manual_seed(self.seed << 16 | layer.index)
        heads, tokens = keys.shape[:2]
        # Numbers of lower heads, which other workers hold, are drawn and left.
        drawn = torch.rand(layer.first_head + heads, tokens, generator=generator)
        return drawn[layer.first_head :].to(keys.device)
