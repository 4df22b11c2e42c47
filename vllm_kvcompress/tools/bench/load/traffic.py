"""What requests are sent: flags for vLLM's datasets, checked before anything starts."""

import argparse
import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...arguments import positive, read_text
from ...errors import ToolError

INPUT_LEN, OUTPUT_LEN = 2048, 128
SHAREGPT_LIMIT = 2048  # vLLM takes no conversation that is longer
MARGIN = 16  # tokens that a tokenizer may add
LENGTHS = "lengths"
TRACE = "prompts.jsonl"


@dataclass(frozen=True)
class Traffic:
    """The requests of every run.

    Attributes:
        dataset: ``random``, ``sharegpt``, ``custom`` or ``lengths``.
        name: The same in a file name.
        flags: For ``vllm bench``, as keywords.
        input_len: Tokens of a prompt, where all are around that.
        output_len: Tokens of an answer, likewise.
        longest: Prompt and answer of the longest request, where that is known.
        trace: A file that ``vllm bench`` is to read, from the result folder.
        source: What says which file the requests are from.
    """

    dataset: str
    name: str
    flags: dict[str, Any]
    input_len: int | None = None
    output_len: int | None = None
    longest: int | None = None
    trace: str | None = None
    source: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What the configuration says of it."""
        own = {key: v for key, v in self.flags.items() if key != "dataset_path"}
        return {**own, "source": self.source}


def add_traffic_arguments(
    parser: argparse.ArgumentParser, datasets: tuple[str, ...]
) -> None:
    """Declare the flags that `traffic` reads."""
    add = parser.add_argument
    add(
        "--dataset",
        choices=datasets,
        help="vLLM's dataset of that name (default: random); of sharegpt it takes "
        "prompts of up to 1024 tokens",
    )
    add("--dataset-path", type=Path, metavar="FILE", help="of other datasets")
    if "custom" in datasets:
        add(
            "--lengths-from",
            type=Path,
            metavar="FILE",
            help="random prompts with recorded lengths: `1024,128` per line, or CSV or "
            "JSONL with columns such as input_len, output_len; traces of Azure, "
            "Mooncake and BurstGPT are read as they are",
        )
    add(
        "--input-len",
        type=positive,
        help=f"tokens of random prompts (default {INPUT_LEN})",
    )
    add(
        "--output-len",
        type=positive,
        help=f"tokens of answers (default {OUTPUT_LEN}, or the dataset's)",
    )
    add(
        "--range-ratio",
        type=_spread,
        default=0.0,
        help="how far both may lie from it, such as 0.5 for half to one and a half "
        "(default %(default)s)",
    )
    add(
        "--num-prompts",
        type=positive,
        default=64,
        help="of a run (default %(default)s)",
    )
    add(
        "--warmups",
        type=positive,
        default=4,
        help="prompts first, unmeasured (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="of prompts (default %(default)s)")


def _spread(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def traffic(args: argparse.Namespace) -> Traffic:
    """Read the flags.

    Raises:
        ToolError: They contradict each other, or a file is not what it should be.
    """
    recorded = getattr(args, "lengths_from", None)
    if recorded:
        others = (args.dataset, args.dataset_path, args.input_len, args.output_len)
        if any(others) or args.range_ratio:
            raise ToolError(
                "--lengths-from says all of the requests; drop --dataset, "
                "--dataset-path, --input-len, --output-len and --range-ratio"
            )
        return _recorded(recorded, args.num_prompts, args.seed)
    dataset = args.dataset or "random"
    if dataset == "random":
        if args.dataset_path:
            raise ToolError("--dataset-path needs --dataset, and one of files")
        return _random(
            args.input_len or INPUT_LEN, args.output_len or OUTPUT_LEN, args.range_ratio
        )
    if args.dataset_path is None:
        raise ToolError(f"--dataset {dataset} needs --dataset-path FILE")
    if args.input_len or args.range_ratio:
        raise ToolError(
            f"--dataset {dataset} has prompts; drop --input-len and --range-ratio"
        )
    check = {"sharegpt": _check_sharegpt, "custom": _check_custom}[dataset]
    check(args.dataset_path, args.output_len)
    limit = SHAREGPT_LIMIT + MARGIN if dataset == "sharegpt" else None
    return Traffic(
        dataset,
        f"{dataset}-{args.dataset_path.stem}",
        {
            "dataset_name": dataset,
            "dataset_path": str(args.dataset_path),
            "output_len": args.output_len,
        },
        output_len=args.output_len,
        longest=limit,
        source=_source(args.dataset_path),
    )


def _random(input_len: int, output_len: int, spread: float) -> Traffic:
    longest = math.ceil(input_len * (1 + spread)) + math.ceil(output_len * (1 + spread))
    around = f"-around-{spread:g}" if spread else ""
    return Traffic(
        "random",
        f"random-{input_len}+{output_len}{around}",
        {
            "dataset_name": "random",
            "random_input_len": input_len,
            "random_output_len": output_len,
            "random_range_ratio": spread,
        },
        input_len,
        output_len,
        longest + MARGIN,
    )


def _recorded(file: Path, count: int, seed: int) -> Traffic:
    from .lengths import draw, read_lengths, timed_trace

    pairs = draw(read_lengths(file), count, seed)
    return Traffic(
        LENGTHS,
        f"lengths-{file.stem}",
        {
            "dataset_name": "timed_trace",
            "self_timed": False,
            "timed_trace_chunk_hash_size": max(prompt for prompt, _ in pairs),
        },
        longest=max(map(sum, pairs)) + MARGIN,
        trace=timed_trace(pairs),
        source=_source(file),
    )


def _source(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"file": file.name, "sha256": digest}


def _check_sharegpt(file: Path, output_len: int | None) -> None:
    try:
        entries = json.loads(read_text("--dataset-path", file))
        turns = [len(entry.get("conversations", ())) for entry in entries]
    except (AttributeError, TypeError, ValueError):
        turns = []
    if max(turns, default=0) < 2:
        raise ToolError(
            f"--dataset-path {file} is no ShareGPT file: a JSON list of objects with "
            "`conversations` of two turns or more"
        )


def _check_custom(file: Path, output_len: int | None) -> None:
    needed = {"prompt"} if output_len else {"prompt", "output_tokens"}
    try:
        rows = [
            json.loads(line)
            for line in read_text("--dataset-path", file).splitlines()
            if line.strip()
        ]
        good = bool(rows) and all(needed <= row.keys() for row in rows)
    except (AttributeError, ValueError):
        good = False
    if not good or file.suffix != ".jsonl":
        raise ToolError(
            f"--dataset-path {file} is no .jsonl file of objects with `prompt` and, "
            "without --output-len, `output_tokens`"
        )
    if not importlib.util.find_spec("pandas"):
        raise ToolError("--dataset custom of vLLM needs pandas: pip install pandas")
