"""Which arms a sweep runs, and how much of a prompt each of them keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ...config import ConfigError, KVCompressionConfig
from ..errors import ToolError

STOCK = "stock"
OWN_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "pyramidinfer": [{"decay_ratio": ratio} for ratio in (0.9, 0.5, 0.1)],
    # All layers, since the bundled model has only two.
    "minicache": [{"start_layer": 0, "retain": share} for share in (0.05, 0.5)],
}
"""What is swept instead of ``budget`` where a method does not take one."""


@dataclass(frozen=True)
class Arm:
    """One engine of a sweep.

    Attributes:
        method: Its name, or `STOCK`.
        budget: As given; None where there is none.
        parameters: Of the method, as given.
        kept_tokens: How many tokens of a prompt stay, in the mean of all layers.
        common: More settings, which all arms but stock have.
    """

    method: str
    budget: int | None
    parameters: dict[str, Any]
    kept_tokens: float
    common: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What users write as ``kv_compression``."""
        return {"method": self.method, **self._own, **self.common}

    @property
    def _own(self) -> dict[str, Any]:
        budget = {} if self.budget is None else {"budget": self.budget}
        return {**budget, **self.parameters}

    @property
    def label(self) -> str:
        """The arm in a few words."""
        pairs = self._own.items()
        return " ".join([self.method, *(f"{key}={value}" for key, value in pairs)])


@dataclass
class Plan:
    """The arms, stock first and then method by method.

    Attributes:
        arms: What runs.
        skipped: Sentences on what does not.
    """

    arms: list[Arm]
    skipped: list[str] = field(default_factory=list)


def plan(
    methods: Sequence[str],
    budgets: Sequence[int],
    *,
    prompt_len: int,
    block_size: int,
    layers: int,
    common: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Lay out a sweep.

    Args:
        methods: Names.
        budgets: In tokens per KV head and layer.
        prompt_len: Length of all prompts.
        block_size: Tokens per KV block.
        layers: Of the model.
        common: Settings for all methods; those that refuse them are skipped.

    Raises:
        ToolError: The plugin refuses a method, or a budget holds a whole prompt.
    """
    if max(budgets) >= prompt_len:
        raise ToolError(
            f"--budgets {max(budgets)} must be below --prompt-len {prompt_len}"
        )
    made = Plan([Arm(STOCK, None, {}, prompt_len)])
    for method in methods:
        config = _config({"method": method})
        choices: list[tuple[int | None, dict[str, Any]]]
        if config.scorer.owns_budget:
            choices = [(None, own) for own in OWN_SETTINGS.get(method, [{}])]
        else:
            smallest = config.smallest_budget(block_size)
            choices = [(budget, {}) for budget in budgets if budget >= smallest]
            if small := [str(budget) for budget in budgets if budget < smallest]:
                made.skipped.append(
                    f"{method} needs a budget of at least {smallest} with KV blocks "
                    f"of {block_size} tokens; skipped: {', '.join(small)}"
                )
        for budget, parameters in choices:
            arm = Arm(method, budget, parameters, 0, dict(common))
            try:
                kept = kept_tokens(arm.settings, prompt_len, block_size, layers)
            except ToolError as refusal:
                if not common:
                    raise
                made.skipped.append(f"{arm.label} is skipped: {refusal}")
                continue
            if kept < prompt_len:
                made.arms.append(replace(arm, kept_tokens=kept))
            else:
                made.skipped.append(f"{arm.label} keeps whole prompts; skipped")
    return made


def kept_tokens(
    settings: dict[str, Any], prompt_len: int, block_size: int, layers: int
) -> float:
    """How many tokens of a prompt stay per KV head, in the mean of all layers."""
    config = _config(settings)
    tiers = config.tiers(layers)
    fits = config.tier_fits(config.method, tiers, prompt_len, block_size)
    freed = sum(fits[tier].freed_blocks * len(tier) for tier in tiers)
    return prompt_len - freed * block_size / layers


def _config(settings: dict[str, Any]) -> KVCompressionConfig:
    try:
        return KVCompressionConfig.from_dict(settings)
    except ConfigError as error:
        raise ToolError(str(error)) from None
