"""`kvcompress plan`: what a model's KV cache takes, and what methods make of it.

Computed from the configuration: no engine starts, no weights are loaded. Block counts
are those of the engine, whole blocks of vLLM's pool.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ..arguments import (
    budget_list,
    check_files,
    gibibytes,
    json_object,
    method_list,
    positive,
    share,
)
from ..errors import ToolError
from .pool import FORMATS

LENGTHS = (1024, 4096, 32768, 131072)
POINTS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a model, config.json, or a hub name")
    add("--lengths", type=budget_list, help="tokens of prompts, such as 4096,32768")
    add("--max-model-len", type=positive, help="longest prompt (default: the model's)")
    add(
        "--batch",
        type=budget_list,
        default="1,8,64",
        help="requests at once (%(default)s)",
    )
    add("--methods", help="such as snapkv,minicache (default: all)")
    add(
        "--budgets",
        type=budget_list,
        default="1024,2048,4096",
        help="tokens kept per KV head and layer (default %(default)s)",
    )
    add(
        "--config",
        type=json_object,
        default={},
        help="more settings for all methods, as JSON, such as "
        '\'{"prefill": "incremental", "decode": {"interval": 128}}\'',
    )
    add(
        "--gpu-memory",
        type=gibibytes,
        metavar="GiB",
        help="memory of all GPUs together",
    )
    add(
        "--gpu-memory-utilization",
        type=share,
        default=0.9,
        metavar="SHARE",
        help="of it for weights and KV (default %(default)s)",
    )
    add("--weights", type=gibibytes, metavar="GiB", help="instead of the model's own")
    add("--kv-space", type=gibibytes, metavar="GiB", help="instead of --gpu-memory")
    add(
        "--kv-cache-dtype",
        choices=FORMATS,
        default="auto",
        metavar="DTYPE",
        help=f"{', '.join(FORMATS)} (default %(default)s: 16 bits)",
    )
    numbers = {
        "--block-size": (16, "tokens of a KV block"),
        "--max-num-batched-tokens": (8192, "of a step; for sliding windows"),
    }
    for flag, (default, meaning) in numbers.items():
        text = f"{meaning} (default %(default)s)"
        add(flag, type=positive, default=default, help=text)
    add("--json", type=Path, help="file to write the figures to")
    add("--plot", type=Path, help="file to draw them into: .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Plan, and show it.

    Raises:
        ToolError: There is no such model or method, or no room for KV.
    """
    from ...methods import method_names
    from .figures import records
    from .methods import options
    from .model import load, model_kv
    from .pool import Pool
    from .report import draw, show

    check_files(args)
    methods = method_list(args.methods)
    for method in methods:
        if method not in method_names():
            known = ", ".join(method_names())
            raise ToolError(f"method is {method!r}; allowed values: {known}")
    config = load(args.model)
    model = model_kv(args.model, config)
    if model.mla and FORMATS[args.kv_cache_dtype][1]:
        raise ToolError(f"--kv-cache-dtype {args.kv_cache_dtype} is not for MLA models")
    space, memory = kv_space(args, config)
    stock = Pool(
        model, args.kv_cache_dtype, args.block_size, args.max_num_batched_tokens
    )
    limit = args.max_model_len or model.max_len or max(args.lengths or LENGTHS)
    lengths = args.lengths or default_lengths(limit)
    limit = max(limit, *lengths) if not args.max_model_len else limit
    found, refused = options(stock, methods, args.budgets, args.config)
    made = records(stock, found, lengths, space, limit)
    show(stock, made, refused, args.batch, space, memory)
    if args.json:
        result = {
            "model": args.model,
            "architecture": model.architecture,
            "kv_layers": len(model.layers),
            "kv_cache_dtype": args.kv_cache_dtype,
            "block_size": args.block_size,
            "kv_space_bytes": space,
            "notes": [*model.notes, *memory],
            "records": made,
            "refused": refused,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        low, high = min(*lengths, 1024), max(lengths)
        ratio = (high / low) ** (1 / POINTS)
        points = sorted({round(low * ratio**step) for step in range(POINTS + 1)})
        curves = records(stock, found, points, None, limit)
        draw(curves, f"KV cache of {Path(args.model).name}", space, args.plot)
    return 0


def default_lengths(limit: int) -> list[int]:
    """Three lengths up to the model's longest."""
    return [*(length for length in LENGTHS if length < limit), limit][-3:]


def kv_space(args: argparse.Namespace, config: Any) -> tuple[int | None, list[str]]:
    """Bytes for KV, None if nothing was said of memory; and how they came about.

    Raises:
        ToolError: The weights leave no room.
    """
    from .report import size
    from .weights import weight_bytes

    if args.kv_space or not args.gpu_memory:
        return args.kv_space, []
    weights, source = args.weights, "as given"
    if not weights:
        weights, source = weight_bytes(args.model, config)
    usable = int(args.gpu_memory * args.gpu_memory_utilization)
    if usable <= weights:
        raise ToolError(
            f"{size(args.gpu_memory)} x {args.gpu_memory_utilization:g} is not more "
            f"than the weights of {size(weights)} ({source})"
        )
    return usable - weights, [
        f"Weights: {size(weights)} ({source}). Left for KV: {size(usable - weights)}, "
        "less what a step's activations take; vLLM's log says how much is left."
    ]
