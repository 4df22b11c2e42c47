"""Reads what users write, and says what is wrong with it in one sentence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .methods import load_method, method_names
from .methods.base import Scorer

KEY = "kv_compression"
LONGEST = 200  # characters of a value in an error


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))


def shown(value: Any) -> str:
    """What a user wrote, for an error: no more of it than can be read."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or too many digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


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
    if not (
        isinstance(settings, Mapping) and all(isinstance(k, str) for k in settings)
    ):
        name = f"{KEY}.{where}".rstrip(".")
        raise ConfigError(f"{name} must be a mapping of names, not {shown(settings)}")
    rest = dict(settings)
    given = {key: rest.pop(key) for key in common if key in rest}
    name = rest.pop("method", default.name if default else None)
    _check_name(name, f"{where}method")
    cls = load_method(name)
    if default is not None and name == default.name:
        rest = {**default.model_dump(), **rest}
    allowed = [*cls.model_fields, *common]
    for key in rest.keys() - cls.model_fields.keys():
        raise ConfigError(
            f"{KEY}: unknown key {shown(where + key)} for {name}; "
            f"allowed keys: {', '.join(allowed)}"
        )
    return built(cls, where, **rest), given


def named_method(name: Any, own: Any, where: str) -> Scorer:
    """A method from its name and its parameters, a mapping.

    Raises:
        ConfigError: An unknown method, another one inside, or a bad parameter.
    """
    _check_name(name, f"a name in {where.rstrip('.')}")
    where = f"{where}{name}."
    if isinstance(own, Mapping):
        own = {"method": name, **own}
        if own["method"] != name:
            raise ConfigError(
                f"{KEY}: {where}method={shown(own['method'])} is another one; drop it"
            )
    return split_method(own, where, ())[0]


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or name not in method_names():
        allowed = ", ".join(method_names())
        raise ConfigError(f"{KEY}: {where} is {shown(name)}; allowed values: {allowed}")


def built(cls: type[Any], where: str, **fields: Any) -> Any:
    """Build a model, or say of its first bad field: field, value, what is allowed."""
    try:
        return cls(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = where + ".".join(str(part)[:LONGEST] for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason.replace("Input should", "should")
        raise ConfigError(
            f"{KEY}: {key}={shown(first['input'])} {reason[0].lower()}{reason[1:]}"
        ) from None


def read_json(path: str) -> Any:
    """Read the JSON file that ``layer_budgets`` names.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no file")  # such as a device, which never ends
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{KEY}: layer_budgets={shown(path)} is not a readable JSON file ({error})"
        ) from None
