"""How near a compressed engine's next-token distributions are to stock's.

Of each distribution only its most likely tokens are known. Tokens that both lists
name stay apart, all others are one bucket: merging outcomes never makes a KL
divergence larger, so what is computed here is a lower bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOP = 20  # tokens of each distribution; vLLM's own limit, unless told otherwise
_LEAST = 1e-9  # of a bucket; float32 logprobs say no more
Top = Mapping[int, float]


@dataclass(frozen=True)
class Fidelity:
    """Of some generated positions.

    Attributes:
        agreement: Share of them at which stock's token is the most likely one.
        kl: KL(stock || compressed), a lower bound, in nats per token.
        tokens: How many positions.
    """

    agreement: float
    kl: float
    tokens: int


def coarse_kl(stock: Top, other: Top) -> float:
    """KL(stock || other) over the tokens that both name and one bucket for the rest.

    Args:
        stock: Log-probabilities of some tokens.
        other: Of some tokens of another distribution.
    """
    both = stock.keys() & other.keys()
    kl = sum(math.exp(stock[t]) * (stock[t] - other[t]) for t in sorted(both))
    rest = 1 - math.fsum(math.exp(stock[t]) for t in both)
    other_rest = max(1 - math.fsum(math.exp(other[t]) for t in both), _LEAST)
    if rest > _LEAST:
        kl += rest * math.log(rest / other_rest)
    return max(kl, 0.0)


def agrees(token: int, other: Top) -> bool:
    """Whether no token is more likely than this one."""
    return other.get(token, -math.inf) >= max(other.values())


def fidelity(
    tokens: Sequence[int], stock: Sequence[Top], other: Sequence[Top]
) -> Fidelity | None:
    """Compare position by position, as far as both go.

    Args:
        tokens: What stock generated.
        stock: Its log-probabilities at these positions.
        other: Those of another engine that was made to generate the same tokens.

    Returns:
        None if there is no position.
    """
    count = min(len(tokens), len(stock), len(other))
    if not count:
        return None
    pairs = list(zip(tokens, stock, other, strict=False))
    return Fidelity(
        agreement=sum(agrees(token, those) for token, _, those in pairs) / count,
        kl=math.fsum(coarse_kl(these, those) for _, these, those in pairs) / count,
        tokens=count,
    )


def pooled(parts: Sequence[Fidelity]) -> Fidelity | None:
    """All of them as one, each weighted by its positions."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return None
    return Fidelity(
        agreement=math.fsum(part.agreement * part.tokens for part in parts) / tokens,
        kl=math.fsum(part.kl * part.tokens for part in parts) / tokens,
        tokens=tokens,
    )
