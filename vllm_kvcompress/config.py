"""The settings: one dict, into which every flag, file and keyword folds.

``additional_config={"kv_compression": {"method": "snapkv", "budget": 2048}}``
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from .budget import prompt_budget, smallest_budget
from .methods import load_method, method_names
from .methods.base import Scorer

KEY = "kv_compression"
DEFAULT_BUDGET = 2048


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


class KVCompressionConfig(BaseModel):
    """How the server compresses.

    Attributes:
        scorer: The method with its own parameters.
        budget: Tokens kept per KV head and layer, observation window included.
        keep_ratio: Share of the prompt that is kept, instead of ``budget``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scorer: SerializeAsAny[Scorer]
    budget: int | None = Field(None, ge=1, strict=True)
    keep_ratio: float | None = Field(None, gt=0, le=1)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "KVCompressionConfig":
        """Check the flat settings that users write.

        Raises:
            ConfigError: Unknown key, wrong type or impossible value.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{KEY} must be a mapping, not {settings!r}")
        rest = dict(settings)
        name = rest.pop("method", None)
        if not isinstance(name, str) or name not in method_names():
            known = ", ".join(method_names())
            raise ConfigError(f"{KEY}: method is {name!r}; allowed values: {known}")
        common = {k: rest.pop(k) for k in ("budget", "keep_ratio") if k in rest}
        scorer_cls = load_method(name)
        allowed = [*scorer_cls.model_fields, "budget", "keep_ratio"]
        try:
            scorer = scorer_cls(**rest)
            config = cls(scorer=scorer, **common)
        except ValidationError as error:
            raise ConfigError(_sentence(error, name, allowed)) from None
        if config.budget is not None and config.keep_ratio is not None:
            raise ConfigError(
                f"{KEY}: budget={config.budget} and keep_ratio={config.keep_ratio} "
                "exclude each other; give one of them"
            )
        if config.budget is None and config.keep_ratio is None:
            config = config.model_copy(update={"budget": DEFAULT_BUDGET})
        if config.budget is not None and config.budget <= scorer.always_kept:
            raise ConfigError(
                f"{KEY}: budget={config.budget} must be larger than the "
                f"{scorer.always_kept} tokens that {name} always keeps"
            )
        return config

    @property
    def method(self) -> str:
        """The method's name."""
        return self.scorer.name

    def settings(self) -> dict[str, Any]:
        """The flat settings again, defaults filled in (JSON types only)."""
        sizes = self.model_dump(include={"budget", "keep_ratio"}, exclude_none=True)
        return {"method": self.method, **sizes, **self.scorer.model_dump()}

    def smallest_budget(self, block_size: int) -> int:
        """The least budget that this method can work with."""
        return smallest_budget(block_size, self.scorer.always_kept)

    def prompt_budget(
        self, num_tokens: int, block_size: int, requested: int | None = None
    ) -> int:
        """The budget of one prompt, lowered if its request asked for less."""
        budget = prompt_budget(
            num_tokens,
            budget=self.budget,
            keep_ratio=self.keep_ratio,
            smallest=self.smallest_budget(block_size),
        )
        return budget if requested is None else min(budget, requested)


def _sentence(error: ValidationError, method: str, allowed: list[str]) -> str:
    """Pydantic's first complaint as: field, value, what is allowed."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return (
            f"{KEY}: unknown key {key!r} for {method}; "
            f"allowed keys: {', '.join(allowed)}"
        )
    reason = (
        first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    )
    return f"{KEY}: {key}={first['input']!r} {reason[0].lower()}{reason[1:]}"
