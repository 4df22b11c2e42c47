"""StreamingLLM: attention sinks and the most recent tokens (arXiv 2309.17453)."""

from typing import ClassVar

import torch
from pydantic import Field

from .base import Layer, Scorer


class StreamingLLM(Scorer):
    """Keep the first ``sinks`` tokens and otherwise the latest ones.

    Keys keep their original rotation (the paper re-rotates them to positions
    inside the cache; vLLM's positions stay logical).
    """

    name: ClassVar[str] = "streamingllm"

    sinks: int = Field(4, ge=0, description="First tokens that are always kept.")

    @property
    def always_kept(self) -> int:
        return self.sinks

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`: a token's position is its score."""
        kv_heads, tokens, _ = keys.shape
        position = torch.arange(tokens, dtype=torch.float32, device=keys.device)
        position[: self.sinks] = float("inf")
        return position.expand(kv_heads, tokens)
