"""Recorded request lengths, such as those of the Azure, Mooncake or BurstGPT traces."""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...arguments import read_text
from ...errors import ToolError

INPUT_NAMES = (
    *("input_len", "input_length", "prompt_tokens"),
    *("request_tokens", "contexttokens"),  # BurstGPT, Azure
)
OUTPUT_NAMES = (
    *("output_len", "output_length", "completion_tokens"),
    *("response_tokens", "generatedtokens"),
)
Pair = tuple[int, int]


def read_lengths(file: Path) -> list[Pair]:
    """Read input and output lengths, a request per line.

    The file is JSONL, CSV with a header that names them, or two numbers per line.
    Requests without input or output, which traces have for failed ones, are left out.

    Raises:
        ToolError: It cannot be read, or holds no lengths.
    """
    text = read_text("--lengths-from", file)
    lines = [line for line in text.splitlines() if line.strip()]
    rows = _json_rows(lines) if text.lstrip().startswith("{") else _csv_rows(lines)
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pair = int(_named(row, INPUT_NAMES)), int(_named(row, OUTPUT_NAMES))
        except (KeyError, TypeError, ValueError):
            raise ToolError(
                f"--lengths-from {file}: request {number} has no input and output "
                "length; a line is `1024,128`, or CSV or JSONL with columns such as "
                f"{INPUT_NAMES[0]} and {OUTPUT_NAMES[0]}"
            ) from None
        if min(pair) > 0:
            pairs.append(pair)
    if not pairs:
        raise ToolError(f"--lengths-from {file} holds no requests")
    return pairs


def _json_rows(lines: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = {}
        yield row if isinstance(row, dict) else {}


def _csv_rows(lines: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    header = [INPUT_NAMES[0], OUTPUT_NAMES[0]]
    first, *others = csv.reader(lines) if lines else [[]]
    if any(not cell.strip().isdigit() for cell in first):
        header = first
    else:
        others = [first, *others]
    for cells in others:
        yield dict(zip(header, cells, strict=False))


def _named(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    plain = {key.strip().lower().replace(" ", "_"): row[key] for key in row}
    for name in names:
        if name in plain:
            return plain[name]
    raise KeyError(names[0])


def draw(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Draw requests; the same ones for the same seed."""
    return random.Random(seed).choices(pairs, k=count)


def timed_trace(pairs: Sequence[Pair]) -> str:
    """The file of vLLM's dataset ``timed_trace``, whose prompts are random tokens.

    A hash stands for a whole prompt, so that no two begin alike.
    """
    rows = [
        {
            "timestamp": 0,
            "input_length": prompt,
            "output_length": output,
            "hash_ids": [number],
        }
        for number, (prompt, output) in enumerate(pairs)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
