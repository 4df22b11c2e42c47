"""Kernels in Triton, for GPUs: the provider `triton` of the operations in ops/.

A file has the name of its operation's file: its kernels, and below them the launcher,
whose signature is the operation's. Nothing of vLLM is imported. Without a GPU, Triton's
interpreter runs them if TRITON_INTERPRET=1 is set, slowly, for tests.

They follow rules that keep the interpreter exact: what is loaded becomes float32 first,
or the type of a product, never bfloat16 in the interpreter; offsets of blocks are
64-bit; masked loads say what is there instead. Launch parameters come from tables, see
`launch`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_kvcompress.ops.providers import Setting

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from .attend_pages import attend_pages
from .compact import compact
from .launch import INTERPRETED
from .merge import merge
from .pool import pool
from .row_shift import shift_rows
from .select import select
from .window_scores import window_scores

KERNELS: Mapping[str, Callable[..., Any]] = {
    "window_scores": window_scores,
    "select": select,
    "pool": pool,
    "compact": compact,
    "merge": merge,
    "attend_pages": attend_pages,
    "shift_rows": shift_rows,
}
# What these read of pages.
_KEYS = {"window_scores", "attend_pages", "compact"}
_VALUES = {"attend_pages", "compact"}
_PRODUCTS = {"window_scores", "attend_pages"}
_TYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn}
MOST_ELEMENTS = 256  # of a vector whose tile has room on a chip


def refusal(setting: Setting, operation: str | None) -> str | None:
    """Why these kernels cannot serve, None if they can."""
    if setting.device.type != "cuda" and not (INTERPRETED and setting.by_name):
        return "needs a GPU"
    for pages in setting.pages:
        tiled = (operation in _KEYS and pages.keys is None) or (
            operation in _VALUES and pages.values is None
        )
        if tiled:
            return "reads no tiled pages"
        if operation in _PRODUCTS:
            if pages.dtype not in _TYPES:
                return f"does not read {pages.dtype}"
            if pages.head_size > MOST_ELEMENTS:
                return f"has no room for a head size above {MOST_ELEMENTS}"
            if pages.dtype == torch.float8_e4m3fn and _old(setting.device):
                return "reads 8-bit floats from compute capability 8.9 on"
        if operation == "compact" and pages.dtype.itemsize > 4:
            return f"does not move {pages.dtype}"
    return None


def _old(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) < (8, 9)
