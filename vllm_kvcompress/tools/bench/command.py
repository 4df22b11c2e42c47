"""`kvcompress bench`: three ways to measure against stock vLLM."""

import argparse

from . import shape_command
from .load import serve, throughput

WAYS = {
    "shapes": (
        shape_command,
        "A method against stock vLLM on chosen traffic, one engine step at a time.",
    ),
    "serve": (
        serve,
        "`vllm bench serve` against one `vllm serve` per arm: latency over load.",
    ),
    "throughput": (
        throughput,
        "`vllm bench throughput` per arm: all requests at once, no server.",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    ways = parser.add_subparsers(dest="way", metavar="WAY", required=True)
    for name, (module, summary) in WAYS.items():
        way = ways.add_parser(name, help=summary, description=summary)
        module.add_arguments(way)
        way.set_defaults(run_way=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return args.run_way(args)
