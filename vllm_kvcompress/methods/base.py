"""What a method is: a scorer with its parameters."""

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict


class Scorer(BaseModel):
    """Rates every prompt token of a layer; the engine keeps the best ones.

    A subclass declares its parameters as pydantic fields and implements
    ``score``. Tokens that must survive get the score ``+inf``. Selection, ties,
    copying and memory are written once, elsewhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]

    @property
    def needs_queries(self) -> int:
        """How many of the prompt's last queries ``score`` wants; 0 = keys only."""
        return 0

    @property
    def needs_values(self) -> bool:
        """Whether ``score`` looks at the values."""
        return False

    @property
    def always_kept(self) -> int:
        """How many tokens ``score`` protects with ``+inf``; a budget is larger."""
        return 0

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Rate the tokens of one layer.

        Args:
            queries: ``[needs_queries, query_heads, head_size]`` (rotated), or
                None if ``needs_queries`` is 0.
            keys: ``[kv_heads, tokens, head_size]`` (rotated).
            values: ``[kv_heads, tokens, head_size]``, or None if ``needs_values``
                is False.
            scale: The layer's factor on attention logits.
            softcap: The layer's logit soft cap, 0 = none.

        Returns:
            ``[kv_heads, tokens]`` float32; higher is kept first.
        """
        raise NotImplementedError
