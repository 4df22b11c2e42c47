"""`kvcompress top`: a running server's requests, KV cache and compression, live.

Read from the server's /metrics alone; it may run anywhere that can be reached.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from ..errors import ToolError
from ..scrape import Read, metrics_url, scrape

HOUR = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("url", metavar="URL", help="of the server, as localhost:8000")
    parser.add_argument(
        "--interval",
        type=interval,
        default=2.0,
        metavar="SECONDS",
        help="between two reads (default %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="read once, and end")
    parser.add_argument("--json", action="store_true", help="a line of JSON per read")


def interval(text: str) -> float:
    """Parse a number of seconds."""
    if not 0 < (value := float(text)) <= HOUR:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0, at most {HOUR}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command; an interrupt is the way to end a live view.

    Raises:
        ToolError: At first the server does not answer, or it is none of vLLM's.
    """
    url = metrics_url(args.url)
    try:
        if args.json:
            _write(args, url)
        elif args.once:
            _show(url)
        else:
            _watch(args, url)
    except KeyboardInterrupt:
        return 130 if args.once else 0
    except BrokenPipeError:
        # The reader has gone: Python would complain of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _reads(
    args: argparse.Namespace, url: str
) -> Iterator[tuple[Read | None, Read, str]]:
    """Yield the last two reads, and what is wrong, again and again.

    While there is no answer, the last reads stay.
    """
    before, now, silent_since = None, scrape(url), ""
    yield before, now, ""
    while not args.once:
        time.sleep(args.interval)
        try:
            before, now = now, scrape(url)
            notice = silent_since = ""
        except ToolError as error:
            silent_since = silent_since or time.strftime("%H:%M:%S")
            notice = f"since {silent_since}: {error}"
        yield before, now, notice


def _write(args: argparse.Namespace, url: str) -> None:
    from .figures import record

    for before, now, notice in _reads(args, url):
        line: dict[str, Any] = {"time": time.time(), "url": url}
        line |= {"error": notice} if notice else record(before, now)
        print(json.dumps(line), flush=True)


def _show(url: str) -> None:
    from rich.console import Console

    from .view import view

    Console().print(view(url, None, scrape(url)))


def _watch(args: argparse.Namespace, url: str) -> None:
    from rich.console import Console
    from rich.live import Live

    from .view import view

    console = Console()
    if not console.is_terminal:
        raise ToolError("the live view needs a terminal; --once and --json do not")
    with Live(console=console, auto_refresh=False) as live:
        for read in _reads(args, url):
            live.update(view(url, *read), refresh=True)
