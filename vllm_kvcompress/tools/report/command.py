"""`kvcompress report`: results of eval and bench as one page with pictures.

The page is one file that needs no network; the pictures can be written beside it.
"""

import argparse
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..errors import ToolError

FORMATS = ("png", "svg", "pdf")
TITLE = "KV cache compression: results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="results of kvcompress eval or bench, or a folder of them",
    )
    add(
        "--out",
        type=Path,
        default=Path("report.html"),
        help="the page (default %(default)s)",
    )
    add("--pictures", type=Path, metavar="DIR", help="write each picture here too")
    add(
        "--format",
        choices=FORMATS,
        default="png",
        help="of these pictures (default %(default)s)",
    )
    add("--title", default=TITLE, help="of the page (default %(default)r)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from .page import bench_section, eval_section, file_of, page
    from .pictures import bench_pictures, eval_pictures, palette
    from .read import read_results

    results = read_results(args.folders)
    look = palette(results)
    evals = [
        eval_section(group, list(eval_pictures(group, results, look)))
        for group in results.groups
    ]
    benches = [
        bench_section(bench, list(bench_pictures(bench, look)))
        for bench in results.benches
    ]
    contents = {
        args.out: page(
            args.title, results, evals, benches, shlex.join(_command(args))
        ).encode()
    }
    if args.pictures:
        for number, section in enumerate([*evals, *benches], 1):
            for picture in section.pictures:
                name = re.sub(r"[^\w-]+", "_", f"{number}-{picture.name}")
                file = args.pictures / f"{name}.{args.format}"
                contents[file] = file_of(picture.figure, args.format)
    _write(contents)
    for note in results.notes:
        print(f"note: {note}")
    beside = f", {len(contents) - 1} pictures in {args.pictures}" * bool(args.pictures)
    print(f"{args.out} written{beside}")
    return 0


def _command(args: argparse.Namespace) -> Iterator[str]:
    """The command line that makes the same page."""
    yield from ("kvcompress", "report", *map(str, args.folders))
    yield from ("--out", str(args.out))
    if args.title != TITLE:
        yield from ("--title", args.title)


def _write(contents: dict[Path, bytes]) -> None:
    """Write all files, or none if one would replace what is not ours."""
    from .page import MARK

    try:
        for file in contents:
            if file.exists() and MARK.encode() not in file.read_bytes():
                raise ToolError(
                    f"{file} exists and is no report of ours; remove it or name another"
                )
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            part.write_bytes(content)
            os.replace(part, file)  # so that a report is never half-written
    except OSError as error:
        raise ToolError(
            f"{error.filename} cannot be written: {error.strerror}"
        ) from None
