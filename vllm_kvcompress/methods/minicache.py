"""MiniCache: neighbouring deep layers share one cache (arXiv 2405.14366)."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer

from ..parsing import KEY, ConfigError, split_method
from .base import Layer, Scorer


def _over(given: Any) -> Any:
    """A method by its name, or with parameters as a mapping."""
    if given is None or isinstance(given, Scorer):
        return given
    named = {"method": given} if isinstance(given, str) else given
    try:
        return split_method(named, "over.", ())[0]
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{KEY}: ")) from None


def _named(scorer: Scorer | None) -> dict[str, Any] | None:
    return {"method": scorer.name, **scorer.model_dump()} if scorer else None


Over = Annotated[Scorer | None, BeforeValidator(_over), PlainSerializer(_named)]


class MiniCache(Scorer):
    """Pairs of layers keep one direction per token, and its length for each.

    From ``start_layer`` on layers pair up; of an odd number the last stays alone.
    Tokens whose directions differ most are retained, exactly, for both layers; how
    many is a share, in whole blocks. What is generated joins in every ``interval``
    tokens, of which none are retained (the paper leaves this open).
    """

    name: ClassVar[str] = "minicache"

    start_layer: int | None = Field(
        None, ge=0, description="The first layer to be merged; None = the middle."
    )
    t: float = Field(
        0.6, ge=0, le=1, description="0 = the shallow layer's direction, 1 = the other."
    )
    retain: float = Field(
        0.05, ge=0, le=1, description="Share of tokens kept exact for both layers."
    )
    retention: Literal["rank", "range"] = Field(
        "rank",
        description="Which: the least alike, or those near the largest distance.",
    )
    gamma: float = Field(
        0.05, ge=0, le=1, description="How near, as a share of the distances' range."
    )
    interval: int | None = Field(
        128, ge=1, description="Generated tokens between two merges; None = no merges."
    )
    over: Over = Field(
        None, description="A method that first selects tokens, such as snapkv."
    )

    @property
    def needs_queries(self) -> int:
        return self.over.needs_queries if self.over else 0

    def queries_wanted(self, num_tokens: int) -> int:
        """See `Scorer.queries_wanted`."""
        return self.over.queries_wanted(num_tokens) if self.over else 0

    @property
    def needs_values(self) -> bool:
        return self.over is not None and self.over.needs_values

    @property
    def always_kept(self) -> int:
        return self.over.always_kept if self.over else 0

    @property
    def across_heads(self) -> bool:
        return self.over is not None and self.over.across_heads

    @property
    def layered(self) -> bool:
        return True

    @property
    def owns_budget(self) -> bool:
        return self.over is None

    @property
    def merges(self) -> bool:
        return True

    @property
    def retained_share(self) -> float:
        return self.retain

    def layer_pairs(self, num_layers: int) -> list[tuple[int, int]]:
        """See `Scorer.layer_pairs`."""
        first = num_layers // 2 if self.start_layer is None else self.start_layer
        return [(layer, layer + 1) for layer in range(first, num_layers - 1, 2)]

    def decisions(self, prompt: int, end: int) -> Iterator[int]:
        """See `Scorer.decisions`."""
        if self.interval:
            yield from range(prompt + self.interval, end, self.interval)

    def layer_budgets(self, num_tokens: int, budget: int, num_layers: int) -> list[int]:
        """See `Scorer.layer_budgets`."""
        return [budget if self.over else num_tokens] * num_layers

    def score(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """See `Scorer.score`; of both layers of a pair the sum counts."""
        if self.over is None:
            return keys.new_zeros(keys.shape[:2], dtype=torch.float32)
        return self.over.score(queries, keys, values, layer)
