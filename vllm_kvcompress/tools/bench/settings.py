"""What a compressed arm is told, from the flags that say it."""

import json
from typing import Any

from ..errors import ToolError

DEFAULT_BUDGET = 1024


def method_settings(method: str, budget: int | None, config: str) -> dict[str, Any]:
    """Fold the flags into the method's settings, checked, defaults filled in.

    Raises:
        ToolError: The plugin would refuse them.
    """
    from ...config import ConfigError, KVCompressionConfig
    from ...contradictions import SIZE_KEYS

    try:
        settings = {"method": method, **json.loads(config)}
    except (json.JSONDecodeError, TypeError):
        raise ToolError(f"--config {config!r} is not a JSON object") from None
    if budget is not None:
        settings["budget"] = budget
    try:
        checked = KVCompressionConfig.from_dict(settings)
        if not (checked.scorer.owns_budget or settings.keys() & set(SIZE_KEYS)):
            checked = checked.model_copy(update={"budget": DEFAULT_BUDGET})
        return checked.settings()
    except ConfigError as error:
        raise ToolError(str(error)) from None
