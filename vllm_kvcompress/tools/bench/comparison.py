"""Stock against compressed: ratios, and who lost."""

from collections.abc import Mapping
from typing import Any

from ..trace import Measures, ratio

DECODE = "decode_tokens_per_s"
HIGHER_IS_BETTER = {
    DECODE: True,
    "throughput_tokens_per_s": True,
    "ttft_s": False,
    "peak_running": True,
    "kv_bytes_held": False,
    "preemptions": False,
}
Comparison = dict[str, dict[str, Any]]


def comparison(arms: Mapping[str, Measures]) -> Comparison:
    """One shape's entry in the JSON file.

    Args:
        arms: The measures of ``stock``, ``compressed`` and perhaps ``limit`` and
            ``fp8``, stock vLLM with a quantised KV cache in the same bytes.
    """
    entry: Comparison = {
        name: {key: values[key] for key in HIGHER_IS_BETTER}
        for name, values in arms.items()
    }
    stock, compressed = entry["stock"], entry["compressed"]
    entry["ratio"] = {key: ratio(compressed[key], stock[key]) for key in stock}
    if "fp8" in entry:
        entry["ratio_to_fp8"] = {
            key: ratio(compressed[key], entry["fp8"][key]) for key in stock
        }
    if "limit" in entry:
        limit = entry["limit"]
        limit["ratio_to_limit"] = ratio(compressed[DECODE], limit[DECODE])
    return entry


def lost(entry: Comparison) -> list[str]:
    """The figures in which compressed is worse than stock."""
    stock, compressed = entry["stock"], entry["compressed"]
    return [
        key
        for key, higher in HIGHER_IS_BETTER.items()
        if (compressed[key] < stock[key] if higher else compressed[key] > stock[key])
    ]
