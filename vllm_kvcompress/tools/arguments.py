"""What several commands take: how their flags are parsed and checked."""

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import ToolError

PLOT_TYPES = (".pdf", ".png", ".svg")


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    if not isinstance(value := json.loads(text), dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


def gibibytes(text: str) -> int:
    """Parse gibibytes, as bytes."""
    if not 0 < (value := float(text)) < 2**40:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(value * 2**30)


def share(text: str) -> float:
    """Parse a share of a whole."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def budget_list(text: str) -> list[int]:
    """Parse ``64,128``."""
    try:
        return sorted({positive(part) for part in text.split(",")})
    except ValueError:
        message = f"{text!r} is not a list of numbers such as 64,256"
        raise argparse.ArgumentTypeError(message) from None


def method_list(text: str | None) -> list[str]:
    """Split ``--methods``; `plan` checks the names."""
    from ..methods import method_names

    if text is None:
        return method_names()
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def read_text(flag: str, file: Path) -> str:
    """Read a file that a flag names.

    Raises:
        ToolError: It is not there, or no text.
    """
    try:
        return file.read_text()
    except OSError as error:
        raise ToolError(f"{flag} {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ToolError(f"{flag} {file} is no text") from None


def check_files(args: argparse.Namespace) -> None:
    """Find out now, not in a quarter of an hour, what cannot be written."""
    if args.plot and args.plot.suffix not in PLOT_TYPES:
        allowed = ", ".join(PLOT_TYPES)
        raise ToolError(f"--plot {args.plot} must end in one of {allowed}")
    for flag, file in (("--json", args.json), ("--plot", args.plot)):
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except OSError as error:
            raise ToolError(
                f"{flag} {file} cannot be written: {error.strerror}"
            ) from None
