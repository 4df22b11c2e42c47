"""Pages of every order that vLLM has, for tests of kernels."""

import math
from dataclasses import dataclass

import torch

from vllm_kvcompress.ops.pages import Elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# In rows, as on GPUs; with heads innermost (NHD); in a buffer that other layers share;
# with keys' tokens side by side, as on CPUs; in tiles of two elements.
WITH_STRIDES = ("rows", "heads innermost", "gaps", "side by side")
ORDERS = (*WITH_STRIDES, "tiled")


@dataclass(frozen=True)
class Paged:
    """A cache and the order of its pages.

    Attributes:
        cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
        halves: Keys and values.
    """

    cache: torch.Tensor
    halves: tuple[Elements, Elements]

    def write(self, blocks: torch.Tensor, *tokens: torch.Tensor) -> None:
        """Fill blocks with keys and values, ``[kv_heads, tokens, head_size]`` each.

        What a last block has room for besides stays as it is.
        """
        bits = self.bits
        for half, held in zip(self.halves, tokens, strict=True):
            whole = half.take(bits, blocks).contiguous()
            whole[:, : held.shape[1]] = held.contiguous().view(bits.dtype)
            half.write(bits, blocks, whole)

    @property
    def bits(self) -> torch.Tensor:
        """The cache as integers, which are equal where they are the same."""
        return self.cache.view(BITS[self.cache.element_size()])


def paged(
    order: str,
    dtype: torch.dtype,
    num_blocks: int,
    kv_heads: int,
    block_size: int,
    head_size: int,
    device: str = DEVICE,
) -> Paged:
    """A cache of NaN, whose pages have one of `ORDERS`."""
    rows = torch.arange(block_size * 2 * head_size).view(block_size, -1)
    keys, values = rows.chunk(2, dim=1)
    halved = torch.arange(2 * block_size * head_size).view(2, -1)
    shape = [num_blocks, kv_heads, block_size, 2 * head_size]
    if order == "heads innermost":
        shape[1:3] = block_size, kv_heads
    if order == "gaps":
        shape[0] *= 3
    # All bits set are NaN in every type.
    size = dtype.itemsize
    flat = torch.full((math.prod(shape) * size,), 255, dtype=torch.uint8, device=device)
    cache = flat.view(dtype).view(shape)
    if order == "heads innermost":
        cache = cache.transpose(1, 2)
    elif order == "gaps":
        cache = cache[1::3]
    elif order == "side by side":
        keys = halved[0].view(head_size, block_size).T
        values = halved[1].view(block_size, head_size)
    elif order == "tiled":
        tiles = halved.view(2, head_size // 2, block_size, 2)
        keys, values = tiles.transpose(1, 2).flatten(2)
    return Paged(cache, (Elements(keys), Elements(values)))


@dataclass(frozen=True)
class Requests:
    """A cache, and the requests in it.

    Attributes:
        cache: As in `Paged`; NaN where no token is.
        halves: Keys and values.
        blocks: ``[count]`` int64, of all requests, one after another.
        starts: ``[requests + 1]`` int64, where those of each begin.
        others: int64, blocks of no request.
    """

    cache: torch.Tensor
    halves: tuple[Elements, Elements]
    blocks: torch.Tensor
    starts: torch.Tensor
    others: torch.Tensor


def requests(
    order: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    kv_heads: int,
    lens: list[int],
    seed: int,
) -> Requests:
    """Random tokens of requests of these lengths, in scattered blocks on the CPU."""
    counts = [-(-held // block_size) for held in lens]
    num_blocks = 2 * sum(counts) + 1
    pages = paged(order, dtype, num_blocks, kv_heads, block_size, head_size, "cpu")
    mixed = shuffled(num_blocks, num_blocks, seed, "cpu")
    blocks, others = mixed[: sum(counts)], mixed[sum(counts) :]
    for number, own in enumerate(blocks.split(counts)):
        shape = (kv_heads, lens[number], head_size)
        keys, values = (
            random(*shape, seed=seed + 2 * number + half, dtype=dtype, device="cpu")
            for half in (0, 1)
        )
        pages.write(own, keys, values)
    starts = torch.tensor([0, *counts]).cumsum(0)
    return Requests(pages.cache, pages.halves, blocks, starts, others)


def random(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> torch.Tensor:
    """Normal numbers of a type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def shuffled(count: int, among: int, seed: int, device: str = DEVICE) -> torch.Tensor:
    """``[count]`` int64, distinct."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(among, generator=generator)[:count].to(device)
