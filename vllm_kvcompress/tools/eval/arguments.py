"""How lists of lengths, depths and shares are parsed."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from ..arguments import positive, share

T = TypeVar("T", int, float)


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _depth(text: str) -> float:
    """Parse percent, as a share."""
    if not 0 <= (value := float(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100 percent")
    return value / 100


def _list(parse: Callable[[str], T], example: str) -> Callable[[str], list[T]]:
    """Make a parser of sorted lists without repetitions."""

    def parse_list(text: str) -> list[T]:
        try:
            return sorted({parse(part) for part in text.split(",")})
        except ValueError:
            message = f"{text!r} is not a list of numbers such as {example}"
            raise argparse.ArgumentTypeError(message) from None

    return parse_list


length_list = _list(positive, "4096,8192")
depth_list = _list(_depth, "0,50,100")
ratio_list = _list(share, "0.25,0.5")
