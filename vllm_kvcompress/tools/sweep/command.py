"""`kvcompress sweep`: accuracy over budget, all methods, on the bundled model.

Stock vLLM and every method at every budget answer the same needle questions, each in
an engine process of its own.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import (
    budget_list,
    check_files,
    json_object,
    method_list,
    positive,
)
from ..errors import ToolError

if TYPE_CHECKING:
    from ..needle_run import NeedleRun
    from .plan import Arm

BUDGETS = "64,256,512,1024"
NEEDLES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("--methods", help="which methods, such as snapkv,random (default: all)")
    add(
        "--budgets",
        type=budget_list,
        default=BUDGETS,
        help="tokens kept per KV head and layer (default %(default)s)",
    )
    add(
        "--config",
        type=json_object,
        default={},
        help="more settings for all methods, as JSON, such as "
        '\'{"prefill": "incremental", "decode": {"interval": 128}}\'',
    )
    numbers = {
        "--prompt-len": (4096, "tokens of each prompt"),
        "--requests": (16, "prompts, the same for all"),
        "--block-size": (32, "tokens of a KV block"),
    }
    for flag, (default, meaning) in numbers.items():
        text = f"{meaning} (default %(default)s)"
        add(flag, type=positive, default=default, help=text)
    add("--json", type=Path, help="file to write the figures to")
    add("--plot", type=Path, help="file to draw them into: .png, .svg or .pdf")
    add("--verbose", action="store_true", help="show vLLM's own output")


def _task(args: argparse.Namespace) -> "NeedleRun":
    """The questions, and an engine that all methods can work in."""
    from ..needle_run import NeedleRun

    return NeedleRun.prepare(
        prompt_len=args.prompt_len,
        count=args.requests,
        needles=NEEDLES,
        # A step reads about one prompt; so all of them decode together in the end.
        max_tokens=args.requests + 4,
        block_size=args.block_size,
        max_num_seqs=args.requests,
        # PyramidInfer prunes only prompts that always find room in one step.
        max_num_batched_tokens=args.prompt_len + args.requests,
        enforce_eager=True,  # compiling takes longer than the answers
    )


def _run_arm(
    task: "NeedleRun", arm: "Arm", report: Callable[[float], None], verbose: bool
) -> dict[str, Any]:
    """One arm's record; a failed one says why."""
    from ..arms import compressed_arm
    from .plan import STOCK

    record = {**asdict(arm), "label": arm.label}
    extra = {} if arm.method == STOCK else compressed_arm(arm.settings)
    try:
        result = task.run(arm.label, extra, report=report, verbose=verbose)
    except ToolError as error:
        return {**record, "error": str(error)}
    return {**record, **result}


def _run_all(
    task: "NeedleRun", arms: list["Arm"], verbose: bool
) -> Iterator[dict[str, Any]]:
    """Run arm by arm, with one progress bar per method."""
    from ..progress import progress_bars, task_adder

    with progress_bars() as bars:
        add_task = task_adder(bars)
        for method, group in groupby(arms, key=lambda arm: arm.method):
            same = list(group)
            update = add_task(method)
            for done, arm in enumerate(same):
                report = _part(update, done, len(same))
                yield _run_arm(task, arm, report, verbose)


def _part(
    update: Callable[[float], None], done: int, parts: int
) -> Callable[[float], None]:
    """Make the progress of one part that of all of them."""
    return lambda share: update((done + share) / parts)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if an arm failed."""
    from rich.console import Console

    from ..environment import environment
    from .plan import plan
    from .report import draw, sweep_table

    task = _task(args)
    planned = plan(
        method_list(args.methods),
        args.budgets,
        prompt_len=args.prompt_len,
        block_size=args.block_size,
        layers=task.model.about["layers"],
        common=args.config,
    )
    check_files(args)
    console, notes = Console(), Console(stderr=True, highlight=False, soft_wrap=True)
    for sentence in planned.skipped:
        notes.print(f"note: {sentence}")
    records: list[dict[str, Any]] = []
    document = {
        "settings": {
            "budgets": args.budgets,
            "prompt_len": args.prompt_len,
            "requests": args.requests,
            "needles": NEEDLES,
            "block_size": args.block_size,
            "config": args.config,
            "model": task.model.about,
        },
        "environment": environment(),
        "skipped": planned.skipped,
        "arms": records,
    }
    for record in _run_all(task, planned.arms, args.verbose):
        records.append(record)
        if args.json:  # after each arm, so that an interrupted run is not lost
            args.json.write_text(json.dumps(document, indent=2) + "\n")
    title = (
        f"{args.requests} prompts of {args.prompt_len:,} tokens, {NEEDLES} needles, "
        f"KV blocks of {args.block_size} tokens"
    )
    console.print(sweep_table(records, args.budgets, title))
    if args.plot:
        draw(records, title, args.plot)
    failed = [record["error"] for record in records if "error" in record]
    for sentence in failed:
        notes.print(f"failed: {sentence}")
    return int(bool(failed))
