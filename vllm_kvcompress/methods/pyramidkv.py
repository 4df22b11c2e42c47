"""PyramidKV: SnapKV with more tokens in lower layers (arXiv 2406.02069)."""

from typing import ClassVar

from pydantic import Field

from .snapkv import SnapKV


class PyramidKV(SnapKV):
    """Budgets fall in a straight line from the lowest layer to the highest.

    As KVCache-Factory computes it (section 3.3 of the paper; ``beta`` is its 20),
    except that fractions are cut off last, so that the mean never exceeds ``budget``.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: int = Field(20, ge=1, description="Steepness; 1 = the same in all layers.")

    @property
    def layered(self) -> bool:
        return True

    def layer_budgets(self, num_tokens: int, budget: int, num_layers: int) -> list[int]:
        """See `Scorer.layer_budgets`."""
        mean, past = budget - self.window, num_tokens - self.window
        if num_layers == 1 or num_tokens < max(budget, 2 * mean):
            return [budget] * num_layers
        low = mean // self.beta
        high = 2 * mean - low
        if high > past:
            high, low = past, 2 * mean - past
        fall, steps = high - low, num_layers - 1
        # Rounded down, in integers: floats are one too low now and then.
        return [
            (high * steps - layer * fall) // steps + self.window
            for layer in range(num_layers)
        ]
