"""What a method is: a scorer with its parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, field_validator

MOST_TOKENS = 2**31 - 1  # kernels count in 32 bits


@dataclass(frozen=True)
class Layer:
    """The attention layer whose tokens are rated.

    Attributes:
        index: Among the layers that are compressed, from 0 at the bottom.
        scale: Factor on attention logits.
        softcap: Logit soft cap, 0 = none.
        past_only: Of a KV head's query heads, whether they leave out the current
            token, as those of middle layers of LCKV do; empty = none does.
        first_head: Number of the first of the KV heads that are rated: others of the
            layer may be another tensor-parallel worker's.
    """

    index: int
    scale: float
    softcap: float = 0.0
    past_only: tuple[bool, ...] = ()
    first_head: int = 0

    @property
    def attention(self) -> dict[str, Any]:
        """What `window_scores` must know of it."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "past_only": self.past_only,
        }


class Scorer(BaseModel):
    """Rates every prompt token of a layer; the engine keeps the best ones.

    A subclass declares its parameters as pydantic fields and implements
    ``score``. Tokens that must survive get the score ``+inf``. Selection, ties,
    copying and memory are written once, elsewhere.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )

    name: ClassVar[str]

    @field_validator("*")
    @classmethod
    def _in_32_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and value > MOST_TOKENS:
            raise ValueError(f"should be less than or equal to {MOST_TOKENS}")
        return value

    @property
    def needs_queries(self) -> int:
        """How many of the prompt's last queries ``score`` wants; 0 = keys only."""
        return 0

    def queries_wanted(self, num_tokens: int) -> int:
        """The same for a prompt of ``num_tokens``, where it depends on that."""
        return self.needs_queries

    @property
    def needs_values(self) -> bool:
        """Whether ``score`` looks at the values."""
        return False

    @property
    def takes_pages(self) -> bool:
        """Whether ``score`` may be given a `PagedKeys` for its keys."""
        return False

    @property
    def always_kept(self) -> int:
        """How many tokens ``score`` protects with ``+inf``; a budget is larger."""
        return 0

    @property
    def layered(self) -> bool:
        """Whether `layer_budgets` differ, or anything else by groups of layers."""
        return False

    @property
    def uneven(self) -> bool:
        """Whether `head_shares` differ."""
        return False

    @property
    def owns_budget(self) -> bool:
        """Whether `layer_budgets` follow from the method's own parameters.

        They then never rise with depth, see `budget.whole_block_budgets`.
        """
        return False

    @property
    def across_heads(self) -> bool:
        """Whether ``score`` is the mean over heads; then so it is over all ranks'."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether a layer's dropped tokens are not computed in the layers above."""
        return False

    @property
    def generates(self) -> bool:
        """Whether `generated_lost` rules what a request generates.

        Tokens then go as they leave the ``queries_wanted`` latest ones; the prompt
        and what was decided before stay.
        """
        return False

    @property
    def merges(self) -> bool:
        """Whether `layer_pairs` share a cache."""
        return False

    @property
    def retained_share(self) -> float:
        """Share of a pair's tokens that are not merged."""
        return 0.0

    def decisions(self, prompt: int, end: int) -> Iterator[int]:
        """Lengths below ``end`` at which generated tokens go, or merge; ascending."""
        yield from ()

    def generated_lost(self, prompt: int, num_tokens: int, layers: int) -> list[int]:
        """Generated tokens that each layer has lost since its prompt.

        Args:
            prompt: Length of the prompt.
            num_tokens: Length of the request.
            layers: Layers that are compressed; the lowest comes first.
        """
        return [0] * layers

    def layer_pairs(self, num_layers: int) -> list[tuple[int, int]]:
        """Neighbouring layers that share one cache of merged tokens.

        Args:
            num_layers: Layers that are compressed.

        Returns:
            ``(shallow, deep)`` of each pair, from the bottom; see `MiniCache`.
        """
        return []

    def layer_budgets(self, num_tokens: int, budget: int, num_layers: int) -> list[int]:
        """Deal out the layers' tokens per KV head, ``budget`` on average at most.

        Args:
            num_tokens: Length of the prompt.
            budget: The average.
            num_layers: Layers that are compressed; the lowest comes first.
        """
        return [budget] * num_layers

    def head_shares(
        self, scores: Sequence[torch.Tensor], pages: int, page_size: int
    ) -> list[int]:
        """Deal out what neighbouring layers keep between their KV heads.

        Args:
            scores: Of each layer, ``[kv_heads, tokens]``, from ``score``, of all of its
                heads; ``-inf`` fills the rows of those that hold fewer.
            pages: To be dealt out, of all heads together.
            page_size: Tokens of one page; ``tokens`` is a multiple.

        Returns:
            Pages per head, ``pages`` in sum and the same in each layer.
        """
        return [pages // len(scores[0])] * len(scores[0])

    def score(
        self,
        queries: torch.Tensor | None,
        keys: Any,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """Rate the tokens of one layer.

        Args:
            queries: ``[needs_queries, query_heads, head_size]`` (rotated), or
                None if ``needs_queries`` is 0.
            keys: ``[kv_heads, tokens, head_size]`` (rotated), or the `PagedKeys` that
                hold them, where the scorer takes pages.
            values: ``[kv_heads, tokens, head_size]``, or None if ``needs_values``
                is False.
            layer: What else is known of the layer.

        Returns:
            ``[kv_heads, tokens]`` float32; higher is kept first.
        """
        raise NotImplementedError
