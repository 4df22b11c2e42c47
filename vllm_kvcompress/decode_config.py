"""Settings of the compression of what a request generates."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from .methods.base import MOST_TOKENS, Scorer
from .parsing import built, split_method

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS, strict=True)]


class DecodeConfig(BaseModel):
    """Compression of what a request generates, and of its prompt again.

    Attributes:
        scorer: The method with its own parameters.
        interval: Generated tokens between two compressions.
        budget: Tokens kept per KV head and layer; None = as many as of the prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer: SerializeAsAny[Scorer]
    interval: Tokens = 128
    budget: Tokens | None = None


def decode_config(settings: Any, default: Scorer) -> DecodeConfig:
    """Check the mapping under ``decode``; its method is ``default`` unless named.

    Raises:
        ConfigError: Unknown key, wrong type or impossible value.
    """
    scorer, given = split_method(settings, "decode.", ("interval", "budget"), default)
    return built(DecodeConfig, "decode.", scorer=scorer, **given)
