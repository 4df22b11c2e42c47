"""How much filler makes a prompt of a given length, with few looks at long prompts."""

from collections.abc import Callable

_STRIDE = 32
_INTERPOLATIONS = 8


def fit(
    tokens: Callable[[int], int], length: int, least: int, most: int | None = None
) -> tuple[int, int]:
    """Find the number of units with which a prompt is as long as it may be.

    It is a binary search that does not cut in the middle, but where the tokens per unit
    seen so far say, and ends when less than one unit is missing. So a prompt of 100,000
    tokens is mostly tokenized once or twice.

    Args:
        tokens: Length of the prompt with so many units.
        length: What it may be at most.
        least: Units that are known to fit.
        most: Units that there are, None = no end.

    Returns:
        The units and the length of the prompt with them.
    """
    fits, used = least, tokens(least)
    too_many = None if most is None else most + 1
    sample = least + _STRIDE if most is None else min(least + _STRIDE, most)
    per_unit = (tokens(sample) - used) / max(1, sample - least)
    tries = 0
    while length - used >= per_unit and (too_many is None or too_many - fits > 1):
        guess = fits + max(1, int((length - used) / max(per_unit, 0.01)))
        if too_many is not None:
            # Where tokens are spread too unevenly to be foretold, the middle is safe.
            middle = (fits + too_many) // 2
            guess = min(guess, too_many - 1) if tries < _INTERPOLATIONS else middle
        tries += 1
        now = tokens(guess)
        per_unit = (now - used) / (guess - fits)
        if now <= length:
            fits, used = guess, now
        else:
            too_many = guess
    return fits, used
