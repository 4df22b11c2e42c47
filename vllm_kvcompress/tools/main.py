"""`kvcompress`: the tools around the plugin, one module per subcommand."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import ToolError

COMMANDS = {
    "demo": "Needle questions on the bundled model: stock vLLM beside compressed.",
    "plan": "What a model's KV cache takes, and what each method makes of it.",
    "eval": "Accuracy and fidelity of methods against stock vLLM, task by task.",
    "bench": "Speed and memory of methods against stock vLLM, in three ways.",
    "report": "Results of eval and bench as one page with pictures.",
    "top": "What a running server does: requests, KV cache, compression, live.",
    "convert": "Make a model that shares KV out of an ordinary Llama, to be trained.",
}
PACKAGES = ("bench", "eval", "plan", "report", "top")
"""Commands of several modules, of which `command` is the first."""


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; only the chosen subcommand's module is imported."""
    parser = _Parser(prog="kvcompress", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in chosen:
            own = f".{name}.command" if name in PACKAGES else f".{name}"
            module = importlib.import_module(own, __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0, or 1 for a failed run, 2 for bad arguments, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv[:1]).parse_args(argv)
        return args.run(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except ToolError as error:
        print(f"kvcompress {argv[0]}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
