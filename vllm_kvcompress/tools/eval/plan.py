"""Which arms an evaluation compares: stock first, then method by method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...config import ConfigError, KVCompressionConfig
from ...contradictions import SIZE_KEYS
from ..errors import ToolError

STOCK = "stock"
Settings = dict[str, Any]
BUDGETS = [64, 256, 512, 1024]
OWN_SETTINGS: dict[str, list[Settings]] = {
    "pyramidinfer": [{"decay_ratio": ratio} for ratio in (0.9, 0.5, 0.1)],
    "minicache": [{"retain": share} for share in (0.05, 0.5)],
}
"""What is varied instead of the budget where a method does not take one."""

BUNDLED_OWN_SETTINGS = {
    **OWN_SETTINGS,
    # All layers, since the bundled model has only two.
    "minicache": [{"start_layer": 0, **own} for own in OWN_SETTINGS["minicache"]],
}


@dataclass(frozen=True)
class Arm:
    """One way to answer the questions.

    Attributes:
        method: Its name, or `STOCK`.
        own: What sets it apart from the method's other arms, as given.
        common: More settings, which all arms but stock have.
    """

    method: str
    own: Settings = field(default_factory=dict)
    common: Settings = field(default_factory=dict)

    @property
    def settings(self) -> Settings | None:
        """What users write as ``kv_compression``; None = nothing is compressed."""
        if self.method == STOCK:
            return None
        return {"method": self.method, **self.own, **self.common}

    @property
    def label(self) -> str:
        """The arm in a few words."""
        pairs = (f"{key}={value}" for key, value in self.own.items())
        return " ".join([self.method, *pairs])


@dataclass
class Plan:
    """The arms, and sentences on what is left out."""

    arms: list[Arm]
    skipped: list[str] = field(default_factory=list)


def sizes(
    budgets: Sequence[int] | None, ratios: Sequence[float] | None
) -> list[Settings]:
    """The settings that say how much is kept, of which each method gets all."""
    if budgets:
        return [{"budget": budget} for budget in budgets]
    return [{"keep_ratio": ratio} for ratio in ratios or ()] or [{}]


def plan(
    methods: Sequence[str],
    kept: Sequence[Settings],
    *,
    block_size: int | None = None,
    common: Mapping[str, Any] | None = None,
    own: Mapping[str, Sequence[Settings]] = OWN_SETTINGS,
) -> Plan:
    """Lay out an evaluation.

    Args:
        methods: Names.
        kept: Of `sizes`.
        block_size: Tokens per KV block, where it is known.
        common: Settings for all methods; arms that refuse them are skipped.
        own: What is varied instead where a method takes no budget.

    Raises:
        ToolError: The plugin refuses a method.
    """
    common = dict(common or {})
    if fixed := common.keys() & set(SIZE_KEYS):
        if any(kept):
            names = ", ".join(sorted(fixed))
            raise ToolError(f"--config says {names}; drop --budgets and --keep-ratios")
        kept = [{}]
    made = Plan([Arm(STOCK)])
    for method in methods:
        config = _checked({"method": method})
        choices = list(kept)
        if config.scorer.owns_budget:
            varied = own.get(method, [{}])
            choices = [each for each in varied if not each.keys() & common.keys()]
            choices = choices or [{}]
        elif block_size:
            least = config.smallest_budget(block_size)
            choices = [each for each in kept if each.get("budget", least) >= least]
            if small := [f"{each['budget']}" for each in kept if each not in choices]:
                made.skipped.append(
                    f"{method} needs a budget of at least {least} with KV blocks "
                    f"of {block_size} tokens; skipped: {', '.join(small)}"
                )
        for each in choices:
            arm = Arm(method, each, common)
            try:
                _checked(arm.settings or {})
            except ToolError as refusal:
                if not common:
                    raise
                made.skipped.append(f"{arm.label} is skipped: {refusal}")
                continue
            made.arms.append(arm)
    return made


def _checked(settings: Settings) -> KVCompressionConfig:
    try:
        return KVCompressionConfig.from_dict(settings)
    except ConfigError as error:
        raise ToolError(str(error)) from None
