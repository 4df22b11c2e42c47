"""Operations in C++ for processors, compiled when they are first asked for.

PyTorch keeps what it has compiled, so that takes a quarter of a minute once. Sources
are in the root folder csrc/, which is installed as `vllm_kvcompress.csrc`.
"""

import functools
import logging
from collections.abc import Callable
from importlib.resources import files

import torch
from torch.utils import cpp_extension

logger = logging.getLogger("vllm.plugins.kv_compression")

AttendPages = Callable[..., torch.Tensor]


@functools.cache
def attend_pages() -> AttendPages | None:
    """The kernel of attend_pages.cpp, or None where it cannot be compiled.

    It takes ``query [rows, query_heads, head_size]`` float32, a token of each row;
    ``cache [num_blocks, kv_heads, block_size, 2 * head_size]``, float32 or bfloat16,
    whose pages hold keys by element and values by token; ``blocks [count]`` int64 of
    all rows, one after another; ``starts [rows + 1]`` int64, where those of a row
    begin; ``lens [rows]`` int64, the tokens of each; ``scales [2, num_blocks,
    block_size, kv_heads]`` float32 or float16; the factor on logits; and their soft
    cap, 0 = none. It returns float32 of the query's shape. See `attend`.
    """
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_").lower()
    try:
        module = cpp_extension.load(
            f"vllm_kvcompress_{capability}",
            [str(files("vllm_kvcompress.csrc") / "attend_pages.cpp")],
            extra_cflags=["-O3", "-march=native"],
        )
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        logger.warning(
            "KV compression: no C++ compiler works here (%s), so merged pages are "
            "restored in every step, which makes decoding slower.",
            reason[0] if reason else type(error).__name__,
        )
        return None
    return module.attend_pages
