"""The flags that `kvcompress bench serve` and `throughput` have in common."""

import argparse
from pathlib import Path

from ...arguments import budget_list, gibibytes, json_object, positive
from ...bench_model import OWN_SHAPES
from .traffic import add_traffic_arguments

OUT = Path("build/bench")


def add_common_arguments(
    parser: argparse.ArgumentParser, datasets: tuple[str, ...]
) -> None:
    """Declare the flags that both commands take."""
    add = parser.add_argument
    own = ", ".join(OWN_SHAPES)
    add(
        "--model",
        default="small",
        help="a checkpoint, or a random-weight Llama of ours, which needs no network: "
        f"{own} (default %(default)s)",
    )
    add("--methods", default="snapkv", help="such as snapkv,keydiff (default snapkv)")
    add(
        "--budgets",
        type=budget_list,
        default=[],
        help="an arm per method and budget, such as 512,1024 (default 1024)",
    )
    add("--config", default="{}", help="more settings of all methods, as JSON")
    add("--no-fp8", action="store_true", help="leave out stock with an fp8 KV cache")
    add(
        "--kv-space",
        type=gibibytes,
        metavar="GiB",
        help="for the KV cache of every arm (default: vLLM's choice; 1 for our models)",
    )
    add("--max-model-len", type=positive, help="default: the longest request, if known")
    add(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="keywords of LLM for all arms, such as '{\"block_size\": 32}'",
    )
    add(
        "--bench",
        type=json_object,
        default={},
        metavar="JSON",
        help="more flags of vLLM's benchmark, such as '{\"burstiness\": 0.5}'",
    )
    add_traffic_arguments(parser, datasets)
    add("--out", type=Path, default=OUT, help="folder of results (default %(default)s)")
