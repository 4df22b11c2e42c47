"""The loads of a sweep: request rates, and numbers of requests at once."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

INFINITE = "inf"
RATES: list[float | str] = [1.0, 2.0, 4.0, INFINITE]


@dataclass(frozen=True)
class Point:
    """One load, in the words of ``vllm bench serve``.

    Attributes:
        request_rate: Requests that arrive per second; ``inf``: all at once.
        max_concurrency: More than these wait with the client; None: nobody does.
    """

    request_rate: float | str = INFINITE
    max_concurrency: int | None = None

    def __str__(self) -> str:
        if self.max_concurrency:
            return f"concurrency {self.max_concurrency}"
        rate = self.request_rate
        return f"rate {rate if rate == INFINITE else format(rate, 'g')}"


def rate_list(text: str) -> list[float | str]:
    """Parse ``1,2.5,inf``."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of requests per second such as 1,2.5,inf"
        )
    ordered = sorted(set(rates))
    return [rate if math.isfinite(rate) else INFINITE for rate in ordered]


def points(
    rates: Sequence[float | str] | None, concurrencies: Sequence[int] | None
) -> list[Point]:
    """A sweep over rates and another one, at an infinite rate, over concurrencies."""
    if rates is None:
        rates = () if concurrencies else RATES
    by_rate = [Point(rate) for rate in rates]
    return by_rate + [Point(max_concurrency=count) for count in concurrencies or ()]
