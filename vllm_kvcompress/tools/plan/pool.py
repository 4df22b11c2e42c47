"""What requests hold of vLLM's block pool: lengths only, no tensors.

Layers whose blocks are handed out together form a group, and the pool's blocks are as
large as the largest group needs. So ``bytes = blocks of all groups * block_bytes``.
What a compressed prompt keeps is `KVCompressionConfig.tier_fits`, as in the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...budget import Fit, Tier
from ...config import KVCompressionConfig
from .layers import KVLayer
from .model import ModelKV

SCALE_BYTES = 4
STEPS_AHEAD = 2  # with asynchronous scheduling, vLLM's default
FORMATS = {
    "auto": (16, False),  # vLLM takes 16 bits for models that are stored in float32
    "float16": (16, False),
    "bfloat16": (16, False),
    "float32": (32, False),
    "fp8": (8, False),
    "fp8_e4m3": (8, False),
    "fp8_e5m2": (8, False),
    "int8_per_token_head": (8, True),
    "fp8_per_token_head": (8, True),
    "int4_per_token_head": (4, True),
}
"""Bits of an element, and whether a token has scales in each head."""


def token_bytes(dtype: str, elements: int) -> int:
    """Bytes of a token's key and value of one KV head, with scales.

    Args:
        dtype: One of `FORMATS`.
        elements: Of key and value.
    """
    bits, scaled = FORMATS[dtype]
    return elements * bits // 8 + 2 * SCALE_BYTES * scaled


def factor_bytes(dtype: str) -> int:
    """Bytes of the two factors of a merged token, see `footprint`."""
    return 4 if FORMATS[dtype][0] == 16 else 8


@dataclass(frozen=True)
class Bucket:
    """Layers whose requests hold equally many blocks.

    Attributes:
        layers: See `KVLayer`; alike.
        block_size: Tokens per block.
        tier: Which of the compressed layers they are, None = they slide.
        groups: KV cache groups that vLLM makes of them.
    """

    layers: tuple[KVLayer, ...]
    block_size: int
    tier: Tier | None
    groups: int

    @property
    def widest(self) -> int:
        """Layers of the largest group."""
        return -(-len(self.layers) // self.groups)


def group_counts(sizes: Sequence[int]) -> list[int]:
    """Into how many groups vLLM splits buckets of so many layers."""
    size = min(sizes)
    if max(sizes) < 1.5 * size:
        size = max(sizes)
    return [-(-count // size) for count in sizes]


@dataclass(frozen=True)
class Pool:
    """The block pool of one model under one method.

    Attributes:
        model: Whose layers.
        dtype: Of the KV cache, one of `FORMATS`.
        block_size: Tokens per block of the layers with the largest pages.
        batched_tokens: Most tokens of a step; what sliding windows hold beside theirs.
        config: How prompts are compressed; None = they are not.
    """

    model: ModelKV
    dtype: str
    block_size: int
    batched_tokens: int
    config: KVCompressionConfig | None = None

    def _page(self, layer: KVLayer) -> int:
        token = layer.kv_heads * token_bytes(self.dtype, layer.elements)
        return self.block_size * token

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Tiers of compressed layers, and layers by their windows.

        Raises:
            ConfigError: The method cannot divide this model's layers.
        """
        full = self.model.full
        tiers: list[Tier] = [tuple(range(len(full)))] if full else []
        if self.config and full:
            tiers = self.config.tiers(len(full))
        parts: list[tuple[Tier | None, tuple[KVLayer, ...]]] = [
            (tier, tuple(full[index] for index in tier)) for tier in tiers
        ]
        sliding: dict[tuple[int, bool], list[KVLayer]] = {}
        for layer in self.model.layers:
            if layer.window is not None:
                sliding.setdefault((layer.window, layer.chunked), []).append(layer)
        parts += [(None, tuple(layers)) for layers in sliding.values()]
        largest = max(map(self._page, self.model.layers))
        counts = group_counts([len(layers) for _, layers in parts])
        return tuple(
            # vLLM gives layers with smaller pages larger blocks, if they are a part.
            Bucket(
                layers,
                self.block_size
                * (1 if largest % page or len(parts) == 1 else largest // page),
                tier,
                count,
            )
            for (tier, layers), count in zip(parts, counts, strict=True)
            for page in [max(map(self._page, layers))]
        )

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block of the pool, in all layers that it serves."""
        largest = max(map(self._page, self.model.layers))
        if len(self.buckets) == 1:
            return sum(map(self._page, self.model.layers))
        pages = max(bucket.widest for bucket in self.buckets) * largest
        deep = {layer for _, layer in self._pairs}
        scaled = [b for b in self.buckets if b.tier and deep.issuperset(b.tier)]
        return pages + max(
            (
                b.widest
                * b.block_size
                * b.layers[0].kv_heads
                * factor_bytes(self.dtype)
                for b in scaled
            ),
            default=0,
        )

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return self.config.pairs(len(self.model.full)) if self.config else []

    def _fits(self, num_tokens: int) -> dict[Tier, Fit]:
        if self.config is None or not self.model.full:
            return {}
        tiers = [bucket.tier for bucket in self.buckets if bucket.tier]
        block_size = next(b.block_size for b in self.buckets if b.tier)
        method = self.config.method
        return self.config.tier_fits(method, tiers, num_tokens, block_size)

    def held(self, num_tokens: int) -> int:
        """Blocks that a request holds when its prompt is read."""
        fits = self._fits(num_tokens)
        blocks = 0
        for bucket in self.buckets:
            if bucket.tier in fits:
                fit = fits[bucket.tier]
                blocks += bucket.groups * (fit.own_blocks + bool(fit.tail_tokens))
            else:
                blocks += bucket.groups * _window_blocks(bucket, num_tokens)
        return blocks

    def needed(self, num_tokens: int) -> int:
        """Blocks without which a prompt cannot be read."""
        most = self.config.most_tokens if self.config else None
        blocks = 0
        for bucket in self.buckets:
            count = -(-num_tokens // bucket.block_size)
            if bucket.tier is None:
                count = min(count, self._chunk_blocks(bucket, num_tokens))
            elif most is not None:
                count = min(count, -(-most // bucket.block_size))
            blocks += bucket.groups * count
        return blocks

    def peak(self, num_tokens: int) -> int:
        """Blocks held at the most: a prompt's, and beside them those of what is kept.

        With fewer free blocks a prompt's own are taken over, see `CompressedKVManager`.
        """
        blocks = self.needed(num_tokens)
        if self.config is None or self.config.most_tokens is not None:
            return blocks
        fits = self._fits(num_tokens)
        for bucket in self.buckets:
            if bucket.tier in fits and fits[bucket.tier].shrinks:
                blocks += bucket.groups * fits[bucket.tier].own_blocks
        return blocks

    def _chunk_blocks(self, bucket: Bucket, num_tokens: int) -> int:
        """What vLLM admits of a sliding layer while a prompt is read."""
        window, chunked = bucket.layers[0].window or 0, bucket.layers[0].chunked
        tokens = window - (not chunked) + STEPS_AHEAD * self.batched_tokens
        tokens = min(tokens, num_tokens)
        return -(-tokens // bucket.block_size) + (not chunked)

    def blocks_in(self, space: int) -> int:
        """Blocks that vLLM can hand out of so many bytes; one is its null block."""
        return max(0, space // self.block_bytes - 1)

    def requests(self, num_tokens: int, space: int) -> int:
        """Requests of one length that fit while the last one's prompt is read."""
        left = self.blocks_in(space) - self.needed(num_tokens)
        return left // max(1, self.held(num_tokens)) + 1 if left >= 0 else 0

    def longest(self, space: int, limit: int) -> int:
        """The longest prompt that fits, at most ``limit`` tokens."""
        blocks = self.blocks_in(space)
        fitting, too_long = 0, limit + 1
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            if self.needed(middle) <= blocks:
                fitting = middle
            else:
                too_long = middle
        return fitting


def _window_blocks(bucket: Bucket, num_tokens: int) -> int:
    """Blocks of layers that are not compressed, when a prompt is read."""
    window, chunked = bucket.layers[0].window, bucket.layers[0].chunked
    blocks = -(-num_tokens // bucket.block_size)
    if window is None:
        return blocks
    gone = num_tokens // window * window if chunked else num_tokens - window + 1
    return blocks - max(0, gone) // bucket.block_size
