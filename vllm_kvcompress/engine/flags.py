"""The command line: ``--kv-compression`` and ``--kv-compression-config``."""

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from .. import models
from ..config import DEFAULT_BUDGET, ConfigError
from ..methods import load_method, method_names
from ..parsing import shown
from .args import fold

GROUP = "KVCompression"
DESCRIPTION = (
    "Compresses the KV cache of long prompts and gives the freed blocks back to "
    "vLLM (plugin vllm_kvcompress)."
)
COMMON_HELP = f"""Settings of the method, as JSON or one by one \
(--kv-compression-config.budget 1024):
- budget: Tokens kept per KV head and layer, observation window included \
(default: {DEFAULT_BUDGET}).
- keep_ratio: Share of the prompt that is kept, 0 < r <= 1, instead of budget."""


def with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args`` so that the parser knows our flags."""

    @functools.wraps(add_cli_args)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(GROUP, DESCRIPTION)
        names = method_names()
        group.add_argument(
            "--kv-compression",
            metavar="METHOD",
            choices=[*names, *models.METHODS],
            default=argparse.SUPPRESS,
            help=f"Compress the KV cache with this method: {', '.join(names)}. "
            "Without this flag nothing is compressed. Models whose layers share KV "
            f"({', '.join(models.METHODS)}) need no flag; given one of these names, "
            "vLLM starts with such a model only.",
        )
        group.add_argument(
            "--kv-compression-config",
            metavar="JSON",
            type=_json_object,
            action=_Merge,
            default=argparse.SUPPRESS,
            help="\n".join([COMMON_HELP, *map(_method_help, names)]),
        )
        _fold_when_parsed(parser)
        return parser

    return add


class _Merge(argparse.Action):
    """Later settings change single keys of earlier ones, such as a preset's."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, {})
        setattr(namespace, self.dest, {**earlier, **values})


def _fold_when_parsed(parser: argparse.ArgumentParser) -> None:
    """Leave only ``additional_config`` in the namespace, whatever the flags' order.

    The namespace travels to processes that build ``EngineArgs`` from it before
    they load plugins.
    """
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        namespace, rest = parse(*args, **kwargs)
        method = namespace.__dict__.pop("kv_compression", None)
        settings = namespace.__dict__.pop("kv_compression_config", None)
        try:
            namespace.additional_config = fold(
                namespace.additional_config, method, settings
            )
        except ConfigError as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a JSON object such as '{{\"budget\": 1024}}'"
        )
    return value


def _method_help(name: str) -> str:
    """A method's own settings as list items, from its pydantic fields."""
    try:
        fields = load_method(name).model_fields
    except Exception as error:
        # A third party's broken method must not stop a server that ignores it.
        return f"- {name} cannot be imported ({type(error).__name__})."
    items = []
    for key, field in fields.items():
        choices = ""
        if get_origin(field.annotation) is Literal:
            choices = f"{', '.join(map(str, get_args(field.annotation)))}; "
        about = (field.description or "").rstrip(".")
        items.append(f"- {key} ({name}): {about} ({choices}default: {field.default}).")
    return "\n".join(items).replace("%", "%%")
