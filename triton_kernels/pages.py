"""Where tokens lie in pages, for kernels."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.ops.pages import Elements

from .launch import INTERPRETED

Steps = tuple[int, int, int, int, int]
# Of products of float32; AMD's chips multiply it as it is.
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
_TYPES = {torch.float16: tl.float16}
if not INTERPRETED:  # whose products of bfloat16 are wrong
    _TYPES[torch.bfloat16] = tl.bfloat16


def steps(half: Elements, cache: torch.Tensor) -> Steps:
    """Elements of memory to the next block, head, token and element; to the first.

    Args:
        half: The order of keys in a page, or that of values.
        cache: ``[num_blocks, kv_heads, block_size, row]``.

    Raises:
        ValueError: The order is tiled.
    """
    strides = half.strides(cache)
    if strides is None:
        raise ValueError("Triton kernels read no tiled pages")
    first, slot, element = strides
    # Pages of one head are addressed by their blocks alone.
    head = cache.stride(1) if cache.shape[1] > 1 else 0
    return cache.stride(0), head, slot, element, first


def dot_type(queries: torch.Tensor, keys: torch.Tensor) -> tl.dtype:
    """The narrowest type that holds both exactly and can be multiplied.

    Args:
        queries: Of any shape and type.
        keys: The same; every 8-bit float is one of 16 bits, too.
    """
    if keys.dtype not in (queries.dtype, torch.float8_e4m3fn):
        return tl.float32
    return _TYPES.get(queries.dtype, tl.float32)


def power_of_2(count: int) -> int:
    """The next one, which a tile's side must be."""
    return int(triton.next_power_of_2(count))


def fitted(side: int, block_head: int, dot: tl.dtype) -> int:
    """A tile's tokens or rows: fewer where a vector has more than 256 bytes.

    Args:
        side: How many the table has.
        block_head: Elements of a vector in the tile.
        dot: Their type.
    """
    return max(16, side // max(1, block_head * dot.primitive_bitwidth // 8 // 256))


@triton.jit
def offsets(blocks_ptr, token, inside, head, block_size, steps):
    """Where tokens begin, ``[tokens]`` int64.

    Args:
        blocks_ptr: Int64, the blocks that hold them.
        token: ``[tokens]``, positions in those blocks.
        inside: ``[tokens]``, which of them there are.
        head: The KV head.
        block_size: Tokens of a block.
        steps: See the function of that name.
    """
    block = tl.load(blocks_ptr + token // block_size, mask=inside, other=0)
    slot = (token % block_size).to(tl.int64)
    place = block.to(tl.int64) * steps[0] + slot * steps[2]
    return place + tl.cast(head, tl.int64) * steps[1] + steps[4]


@triton.jit
def tile(
    cache_ptr,
    place,
    inside,
    element_step,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Tokens ``[tokens, BLOCK_HEAD]`` of a type, zeros where there is nothing."""
    column = tl.arange(0, BLOCK_HEAD)
    mask = inside[:, None] & (column < HEAD_SIZE)[None, :]
    at = place[:, None] + column[None, :] * element_step
    return tl.load(cache_ptr + at, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def capped(logits, scale, softcap, CAPPED: tl.constexpr):
    """Scaled logits, or ``softcap * tanh(logits / softcap)`` of them."""
    logits *= scale
    if CAPPED:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits
