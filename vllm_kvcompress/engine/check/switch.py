"""How often invariants are checked, from the environment.

vLLM's own processes inherit it; Ray's workers get all variables that begin like this.
"""

import os
from dataclasses import dataclass
from typing import Self

from ...config import ConfigError

VARIABLE = "VLLM_KVCOMPRESS_CHECK"


@dataclass(frozen=True)
class Switch:
    """What is checked.

    Attributes:
        every: Each step of so many.
        poison: Whether blocks that nobody may read are filled with huge values.
    """

    every: int = 1
    poison: bool = False

    @classmethod
    def read(cls) -> Self | None:
        """The environment's, None if nothing is to be checked.

        Raises:
            ConfigError: It says something else.
        """
        value = os.environ.get(VARIABLE, "")
        if value in ("", "0"):
            return None
        if value == "poison":
            return cls(poison=True)
        if value.isascii() and value.isdigit() and int(value):
            return cls(int(value))
        raise ConfigError(
            f"{VARIABLE}={value!r} is not possible; use 1 to check every step, "
            "N to check every N-th, poison to also fill stale blocks with huge "
            "values, or unset it"
        )
