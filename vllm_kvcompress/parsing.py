"""Reads what users write, and says what is wrong with it in one sentence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .methods import load_method, method_names
from .methods.base import Scorer

KEY = "kv_compression"


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


def split_method(
    settings: Any, where: str, common: Sequence[str], default: Scorer | None = None
) -> tuple[Scorer, dict[str, Any]]:
    """Split flat settings into a method with its parameters and the ``common`` keys.

    Args:
        settings: What the user wrote.
        where: Prefix of the keys in errors.
        common: Keys that are not the method's.
        default: Taken, with its parameters, if no method is named.

    Raises:
        ConfigError: Not a mapping, an unknown method or a bad parameter.
    """
    if not isinstance(settings, Mapping):
        name = f"{KEY}.{where}".rstrip(".")
        raise ConfigError(f"{name} must be a mapping, not {settings!r}")
    rest = dict(settings)
    given = {key: rest.pop(key) for key in common if key in rest}
    name = rest.pop("method", default.name if default else None)
    if not isinstance(name, str) or name not in method_names():
        known = ", ".join(method_names())
        raise ConfigError(f"{KEY}: {where}method is {name!r}; allowed values: {known}")
    cls = load_method(name)
    if default is not None and name == default.name:
        rest = {**default.model_dump(), **rest}
    allowed = [*cls.model_fields, *common]
    for key in rest.keys() - cls.model_fields.keys():
        raise ConfigError(
            f"{KEY}: unknown key {where + key!r} for {name}; "
            f"allowed keys: {', '.join(allowed)}"
        )
    return built(cls, where, **rest), given


def built(cls: type[Any], where: str, **fields: Any) -> Any:
    """Build a model, or say of its first bad field: field, value, what is allowed."""
    try:
        return cls(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = where + ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason.replace("Input should", "should")
        raise ConfigError(
            f"{KEY}: {key}={first['input']!r} {reason[0].lower()}{reason[1:]}"
        ) from None


def read_json(path: str) -> Any:
    """Read the JSON file that ``layer_budgets`` names.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{KEY}: layer_budgets={path!r} is not a readable JSON file ({error})"
        ) from None
