"""What runs beside what: stock vLLM, stock with an fp8 KV cache, and methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...arms import compressed_arm
from ..settings import method_settings

STOCK = "stock"
FP8 = "stock fp8"


@dataclass(frozen=True)
class Arm:
    """One configuration of vLLM.

    Attributes:
        label: Its name in files and tables.
        method: None for stock vLLM.
        keywords: What `vllm.LLM` would be told, beyond what all arms are told.
    """

    label: str
    method: str | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def engine(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """All keywords of the engine."""
        merged = {**common, **self.keywords}
        key = "additional_config"
        if key in common and key in self.keywords:
            merged[key] = {**common[key], **self.keywords[key]}
        return merged


def plan_arms(
    methods: Sequence[str], budgets: Sequence[int], config: str, *, fp8: bool
) -> list[Arm]:
    """Lay out the arms, stock first.

    Args:
        methods: Names.
        budgets: One arm for each, of methods that take one; none: the default.
        config: More settings for all methods, as JSON.
        fp8: Whether stock vLLM also runs with an fp8 KV cache.

    Raises:
        ToolError: The plugin would refuse the settings.
    """
    arms = [Arm(STOCK)]
    if fp8:
        arms.append(Arm(FP8, keywords={"kv_cache_dtype": "fp8"}))
    for method in methods:
        own: Sequence[int | None] = (
            [None] if _owns_budget(method, config) else budgets or [None]
        )
        for budget in own:
            settings = method_settings(method, budget, config)
            size = next((k for k in ("budget", "keep_ratio") if settings.get(k)), None)
            label = f"{method} {size}={settings[size]}" if size else method
            arms.append(Arm(label, method, compressed_arm(settings)))
    return arms


def _owns_budget(method: str, config: str) -> bool:
    from ....config import KVCompressionConfig

    settings = method_settings(method, None, config)
    return KVCompressionConfig.from_dict(settings).scorer.owns_budget
