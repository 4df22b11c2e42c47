"""`kvcompress eval`: what compression costs in accuracy, against stock vLLM.

Stock and every method at every budget answer the same questions. Each arm has a
folder of its own under --out; the same command again goes on where it stopped.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import budget_list, json_object, positive
from ..errors import ToolError
from .arguments import depth_list, length_list, natural, ratio_list

if TYPE_CHECKING:
    from .metrics import Done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("--model", help="folder or hub name (default: the bundled needle model)")
    add(
        "--tasks",
        help="such as niah_single,vt,qa; longbench and lm_eval:NAME are run by "
        "lm-evaluation-harness (default: niah_single; of the bundled model, needle)",
    )
    add(
        "--lengths",
        type=length_list,
        default=[4096],
        help="tokens of the prompts, such as 4096,8192 (default 4096)",
    )
    add(
        "--depths",
        type=depth_list,
        help="where the needle lies, in percent, such as 0,25,50,75,100 "
        "(default: anywhere)",
    )
    add(
        "--haystack",
        default="noise",
        help="what needles are hidden in: noise, essay or a text file "
        "(default %(default)s)",
    )
    add("--qa-file", type=Path, help="questions for qa, as SQuAD's JSON")
    add(
        "--samples",
        type=positive,
        default=16,
        help="questions of each task, length and depth (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="the same seed asks the same questions")
    add(
        "--question",
        choices=("inside", "outside"),
        default="inside",
        help="whether the question is part of the prompt that is compressed, or "
        "comes after it (default %(default)s)",
    )
    add("--methods", help="such as snapkv,keydiff (default: all; of a server, its own)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--budgets",
        type=budget_list,
        help="tokens kept per KV head and layer, such as 256,1024 (default: "
        "64,256,512,1024; of a server, its own)",
    )
    size.add_argument(
        "--keep-ratios",
        type=ratio_list,
        help="shares of the prompt that are kept instead, such as 0.25,0.5",
    )
    add(
        "--config",
        type=json_object,
        default={},
        help="more settings for all methods, as JSON, such as "
        '\'{"decode": {"interval": 128}}\'',
    )
    add(
        "--fidelity-tokens",
        type=natural,
        default=32,
        metavar="N",
        help="compare next-token distributions with stock's along so many tokens of "
        "its answer; 0 = do not (default %(default)s)",
    )
    add(
        "--batch",
        type=positive,
        default=16,
        help="questions answered at once, and then written (default %(default)s)",
    )
    add(
        "--engine",
        type=json_object,
        default={},
        help="keywords of LLM for all arms, as JSON, such as '{\"block_size\": 32}'",
    )
    add("--url", help="a running server that compresses, instead of engines of our own")
    add(
        "--stock-url",
        help="another server that does not (default: the same server, "
        "asked not to compress)",
    )
    add(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder of the results (default %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if an arm failed."""
    from rich.console import Console

    from ..progress import progress_bars, task_adder
    from .setup import prepare
    from .table import tables

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(
            f"--out {args.out} cannot be written: {error.strerror}"
        ) from None
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    runners, planned = prepare(args)
    for sentence in planned.skipped:
        notes.print(f"note: {sentence}")
    failures: list[str] = []
    for runner in runners:
        done: list[Done] = []
        with progress_bars() as bars:
            add_bar = task_adder(bars)
            for arm in planned.arms:
                try:
                    found, worked = runner.run(arm, add_bar(arm.label))
                except ToolError as error:
                    failures.append(f"{arm.label}: {error}")
                    continue
                if not worked:
                    bars.console.print(f"{arm.label} was finished before")
                done.append(found)
        for table in tables(done):
            Console().print(table)
    for sentence in failures:
        notes.print(f"failed: {sentence}")
    notes.print(f"results are in {args.out}")
    return int(bool(failures))
