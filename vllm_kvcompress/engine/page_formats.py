"""What stands in a page for a token's key or value, and how layers read it.

A row is one token's key, or value, of one KV head as `layout` finds it in a page: the
vector itself, or codes. With a scale per token and head the scale is the row's last
four bytes, wherever the layer keeps it: vLLM has it behind the codes, the deep layer
of a merged pair beside the pages. So rows move bit for bit, whatever they mean.
"""

from typing import Any

import torch
from vllm.platforms import current_platform

from ..ops.compact import compact
from ..ops.pages import PagedKeys
from .layout import page_layout
from .one_head import one_head

UNQUANTISED = ("auto", "bfloat16", "float16", "float32")
KEYS, VALUES = 0, 1
_SCALE_BYTES = torch.float32.itemsize
_NIBBLE = 15


class Pages:
    """Pages of vectors, and what formats of codes have in common with them."""

    def __init__(self, layer: Any, by_head: bool = False) -> None:
        """Look at the KV cache of an attention layer, once it is bound.

        Args:
            layer: vLLM's.
            by_head: Whether its blocks are dealt out to heads, see `one_head`.
        """
        self.layer, self.cache = layer, layer.kv_cache
        if by_head:
            self.cache = one_head(self.cache)
        layout = page_layout(layer)
        self.halves = (layout.keys, layout.values)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.cache.shape[2]

    @property
    def code_type(self) -> torch.dtype:
        """What elements are, in memory that may be of another type."""
        return self.cache.dtype

    def take(self, half: int, blocks: torch.Tensor) -> torch.Tensor:
        """Copy all tokens of some blocks.

        Args:
            half: KEYS or VALUES.
            blocks: ``[count]`` int64.

        Returns:
            Rows, ``[kv_heads, count * block_size, row]`` in the cache's type.
        """
        return self.halves[half].take(self.cache, blocks)

    def write(self, half: int, blocks: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill whole blocks, distinct ones, with rows as from `take`."""
        self.halves[half].write(self.cache, blocks, rows)

    def compact(
        self, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Copy kept rows into whole blocks, see `compact.compact`."""
        compact(self.cache, self.halves, source, kept, target)

    def vectors(self, half: int, blocks: torch.Tensor, tokens: int) -> PagedKeys:
        """The vectors that attention sees, where they lie if they lie there.

        Args:
            half: KEYS or VALUES.
            blocks: ``[kv_heads, count]`` int64.
            tokens: How many of theirs are wanted.
        """
        return PagedKeys(
            self.codes, self.halves[half], blocks, tokens, self.factor(half)
        )

    @property
    def codes(self) -> torch.Tensor:
        """The cache, its elements as what they are."""
        return self.cache.view(self.code_type)

    def factor(self, half: int) -> float:
        """What all elements of keys, or of values, are multiplied by."""
        return 1.0

    def decode(self, half: int, rows: torch.Tensor) -> torch.Tensor:
        """The vectors that attention sees, ``[kv_heads, tokens, head_size]``."""
        return rows

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """Rows of vectors, of whole blocks' tokens; the inverse of `decode`."""
        return [vectors.to(self.cache.dtype) for vectors in (keys, values)]

    def share(
        self,
        half: int,
        blocks: torch.Tensor,
        rows: torch.Tensor,
        owner: "Pages",
        ratio: torch.Tensor,
    ) -> None:
        """Let this layer read another one's rows as ``ratio`` times its vectors.

        Args:
            half: KEYS or VALUES.
            blocks: ``[count]`` int64, which both layers have.
            rows: What is in them, as the owner wrote it.
            owner: The other layer's pages, of the same format.
            ratio: ``[kv_heads, count * block_size]`` float32.
        """
        factors = self.layer.page_scales[half]
        ratio = ratio * (owner.factor(half) / self.factor(half))
        factors[blocks] = self._paged(ratio).to(factors.dtype)

    def _paged(self, scales: torch.Tensor) -> torch.Tensor:
        """``[count, block_size, kv_heads]`` of ``[kv_heads, tokens]``."""
        return scales.unflatten(1, (-1, self.block_size)).permute(1, 2, 0)


class Fp8Pages(Pages):
    """8-bit floats with one scale for all keys of a layer, and one for all values."""

    def decode(self, half: int, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(self.code_type).float() * self.factor(half)

    @property
    def code_type(self) -> torch.dtype:
        return current_platform.fp8_dtype()

    def factor(self, half: int) -> float:
        factors = (self.layer._k_scale_float, self.layer._v_scale_float)
        return float(factors[half])

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        kind = self.code_type
        largest = torch.finfo(kind).max
        return [
            (vectors / self.factor(half))
            .clamp(-largest, largest)
            .to(kind)
            .view(self.cache.dtype)
            for half, vectors in enumerate((keys, values))
        ]


class ScaledPages(Pages):
    """8-bit codes with one scale per token and KV head."""

    @property
    def code_type(self) -> torch.dtype:
        return torch.int8

    @property
    def _caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales ``[num_blocks, block_size, kv_heads]`` float32, wherever they are."""
        return self.layer.impl._k_scale_cache, self.layer.impl._v_scale_cache

    def vectors(self, half: int, blocks: torch.Tensor, tokens: int) -> PagedKeys:
        rows = self.take(half, blocks[0])[:, :tokens]
        return PagedKeys.of(self.decode(half, rows))

    def take(self, half: int, blocks: torch.Tensor) -> torch.Tensor:
        rows = super().take(half, blocks).contiguous()
        scales = self._caches[half][blocks].permute(2, 0, 1).flatten(1)
        _scales(rows).copy_(scales)
        return rows

    def write(self, half: int, blocks: torch.Tensor, rows: torch.Tensor) -> None:
        super().write(half, blocks, rows)
        self._caches[half][blocks] = self._paged(_scales(rows))

    def decode(self, half: int, rows: torch.Tensor) -> torch.Tensor:
        codes = rows[..., :-_SCALE_BYTES].view(self.code_type)
        return codes.float() * _scales(rows)[..., None]

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        heads, tokens, _ = keys.shape
        row = self.cache.shape[3] // 2
        found = [self.cache.new_empty(heads, tokens, row) for _ in (keys, values)]
        self._quantise(
            *(vectors.transpose(0, 1) for vectors in (keys, values)),
            *(self._cells(rows).view(self.code_type) for rows in found),
            *(self._paged(_scales(rows)) for rows in found),
            torch.arange(tokens, device=keys.device),
        )
        return found

    def _cells(self, rows: torch.Tensor) -> torch.Tensor:
        """``[count, block_size, kv_heads, row]`` of ``[kv_heads, tokens, row]``."""
        return rows.unflatten(1, (-1, self.block_size)).permute(1, 2, 0, 3)

    def _quantise(self, *tensors: torch.Tensor) -> None:
        """vLLM's own writer, with keys, values, their codes, scales and slots."""
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash_per_token_head_quant,
        )

        mode = self.layer.impl._kv_quant_mode
        triton_reshape_and_cache_flash_per_token_head_quant(*tensors, mode)

    def share(
        self,
        half: int,
        blocks: torch.Tensor,
        rows: torch.Tensor,
        owner: Pages,
        ratio: torch.Tensor,
    ) -> None:
        self._caches[half][blocks] = self._paged(_scales(rows) * ratio)


class ScaledFp8Pages(ScaledPages):
    """8-bit floats with one scale per token and KV head."""

    @property
    def code_type(self) -> torch.dtype:
        return current_platform.fp8_dtype()


class PackedPages(ScaledPages):
    """Two 4-bit codes a byte, whose zero is in the low bits of the scale.

    vLLM writes vectors rotated, and rotates queries and what is found. All that is
    done here commutes with that, so vectors stay rotated.
    """

    @property
    def code_type(self) -> torch.dtype:
        return torch.uint8

    def decode(self, half: int, rows: torch.Tensor) -> torch.Tensor:
        scale, zero = _split(_scales(rows))
        packed = rows[..., :-_SCALE_BYTES]
        codes = torch.stack((packed & _NIBBLE, packed >> 4), dim=-1).flatten(-2)
        return (codes - zero[..., None].float()) * scale[..., None]

    def _quantise(self, *tensors: torch.Tensor) -> None:
        from vllm.v1.attention.ops import int4_per_token_head as int4

        names = "key value key_cache value_cache k_scale_cache v_scale_cache"
        int4._run_reshape_kernel(
            int4._reshape_cache_int4_kernel,
            **dict(zip([*names.split(), "slot_mapping"], tensors, strict=True)),
            packing_factor=2,
        )

    def share(
        self,
        half: int,
        blocks: torch.Tensor,
        rows: torch.Tensor,
        owner: Pages,
        ratio: torch.Tensor,
    ) -> None:
        scale, zero = _split(_scales(rows))
        bits = (scale * ratio).contiguous().view(torch.int32) & ~_NIBBLE | zero
        self._caches[half][blocks] = self._paged(bits.view(torch.float32))


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """The last four bytes of rows, a view ``[kv_heads, tokens]`` float32."""
    return rows.view(torch.float32)[..., -1]


def _split(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales without their low bits, and these as int32: the code of zero."""
    bits = scales.contiguous().view(torch.int32)
    return (bits & ~_NIBBLE).view(torch.float32), bits & _NIBBLE


_FORMATS: dict[str, type[Pages]] = {
    **dict.fromkeys(UNQUANTISED, Pages),
    "fp8": Fp8Pages,
    "fp8_e4m3": Fp8Pages,
    "int8_per_token_head": ScaledPages,
    "fp8_per_token_head": ScaledFp8Pages,
    "int4_per_token_head": PackedPages,
}
QUANTISED = tuple(name for name in _FORMATS if name not in UNQUANTISED)


def pages_of(layer: Any, by_head: bool = False) -> Pages:
    """The pages of an attention layer whose KV cache is bound, see `Pages`."""
    return _FORMATS[layer.kv_cache_dtype](layer, by_head)


def has_scales(kv_cache_dtype: str) -> bool:
    """Whether every token and KV head has a scale of its own."""
    return issubclass(_FORMATS[kv_cache_dtype], ScaledPages)


def find_scales(layer: Any) -> None:
    """Let a layer look for its scales in its KV cache before any layer writes.

    vLLM does so when the layer is first run, and sets them all to 1: by then layers
    with the same memory have written theirs.
    """
    impl: Any = getattr(layer, "impl", None)
    if getattr(impl, "_is_per_token_head_quant", False) and layer.kv_cache.ndim == 4:
        impl._ensure_scale_caches(layer.kv_cache)
