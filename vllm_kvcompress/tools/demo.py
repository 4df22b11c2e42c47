"""`kvcompress demo`: needle questions on the bundled model, three times.

Real vLLM answers the same questions about long texts with its full cache, with
SnapKV, and with recency alone at the same budget.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arguments import positive
from .errors import ToolError
from .trace import ratio

METHODS = ("snapkv", "streamingllm")
OUTPUT_TOKENS = 128  # long enough that all prompts decode together for a while
Results = dict[str, dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    numbers = {
        "--prompts": (32, "questions"),
        "--prompt-len": (8192, "tokens of each text"),
        "--needles": (8, "facts in each text, of which one is asked for"),
        "--budget": (256, "tokens kept per KV head and layer"),
    }
    for flag, (default, meaning) in numbers.items():
        text = f"{meaning} (default %(default)s)"
        parser.add_argument(flag, type=positive, default=default, help=text)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        help="folder for result.json and demo.png (default %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show vLLM's own output")


def _arms(budget: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments of each arm; bad budgets are refused before any runs."""
    from ..config import ConfigError, KVCompressionConfig
    from .arms import compressed_arm

    arms: dict[str, dict[str, Any]] = {"stock": {}}
    for method in METHODS:
        settings = {"method": method, "budget": budget}
        try:
            KVCompressionConfig.from_dict(settings)
        except ConfigError as error:
            raise ToolError(str(error)) from None
        arms[method] = compressed_arm(settings)
    return arms


def _measure(args: argparse.Namespace) -> Results:
    """Run every arm and grade its answers."""
    from .needle_run import NeedleRun
    from .progress import progress_bars, task_adder

    arms = _arms(args.budget)
    task = NeedleRun.prepare(
        prompt_len=args.prompt_len,
        count=args.prompts,
        needles=args.needles,
        max_tokens=OUTPUT_TOKENS,
    )
    results: Results = {}
    with progress_bars() as bars:
        add_task = task_adder(bars)
        for name, arm in arms.items():
            report = add_task(name)
            results[name] = task.run(name, arm, report=report, verbose=args.verbose)
    return results


def _show(results: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    heads = ("KV blocks / request", "KV MiB / request", "decode tokens/s", "speed")
    for head in (*heads, "right answers"):
        table.add_column(head, justify="right")
    stock = results["stock"]["decode_tokens_per_s"]
    for name, row in results.items():
        speed = ratio(row["decode_tokens_per_s"], stock)
        table.add_row(
            name,
            f"{row['kv_blocks_per_request']:.1f}",
            f"{row['kv_mib_per_request']:.2f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            "-" if speed is None else f"{speed:.1f}x",
            f"{row['accuracy']:.0%}",
        )
    Console().print(table)


def _draw(results: Mapping[str, Mapping[str, float]], title: str, file: Path) -> None:
    """Draw memory, speed and accuracy side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "kv_mib_per_request": ("KV memory per request, MiB", "{:.1f}"),
        "decode_tokens_per_s": ("decode, tokens/s", "{:,.0f}"),
        "accuracy": ("right answers", "{:.0%}"),
    }
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colors = ["#8a8f98", "#2a78d6", "#e08a2e"]
    axes = figure.subplots(1, len(panels))
    for axis, (key, (label, form)) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(list(results), [row[key] for row in results.values()])
        for bar, color in zip(bars, colors, strict=True):
            bar.set_color(color)
        axis.bar_label(bars, [form.format(row[key]) for row in results.values()])
        axis.set_title(label, fontsize=10)
        axis.margins(y=0.15)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, dpi=150)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.budget >= args.prompt_len:
        raise ToolError(
            f"--budget {args.budget} must be below --prompt-len {args.prompt_len}"
        )
    results = _measure(args)
    title = (
        f"{args.prompts} texts of {args.prompt_len:,} tokens, {args.needles} needles, "
        f"budget {args.budget}"
    )
    _show(results, title)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "result.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    _draw(results, title, args.out / "demo.png")
    print(f"{file} and {args.out / 'demo.png'} written")
    return 0
