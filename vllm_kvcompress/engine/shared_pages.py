"""How the deep layer of a pair reads pages of merged tokens.

They are the shallow layer's, scaled for it, so that it reads them as any others. Both
layers see the same memory (vLLM lays the groups of a model over each other), so the
deep one has them in its own rows; beside the pages it has one factor per token and KV
head for keys, and one for values: 1 in all other pages. Factors lie over each other
as pages do. Triton's kernel takes them as those of a quantised cache. The CPU's takes
none: there pages of rows with merged tokens are restored first.

Where the cache does have a scale per token and head, the factors are the deep layer's
scales, which vLLM then writes and reads here and not behind the codes.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVQuantMode

from ..config import KEY
from ..ops.attend import attend
from .layout import page_layout
from .page_formats import KEYS, UNQUANTISED, VALUES, has_scales, pages_of
from .restore import Restorer
from .rows import RowShift

READERS = ("CPU_ATTN", "TRITON_ATTN")


def scale_dtype(cache: torch.dtype) -> torch.dtype:
    """What factors are stored in, beside pages of such a type."""
    return torch.float16 if cache.itemsize == 2 else torch.float32


def new_scales(kv_cache: torch.Tensor) -> torch.Tensor:
    """Factors of all pages of a deep layer, all 1.

    Args:
        kv_cache: ``[num_blocks, kv_heads, block_size, 2 * row]``.

    Returns:
        ``[2, num_blocks, block_size, kv_heads]``, of keys and of values.
    """
    blocks, kv_heads, block_size, _ = kv_cache.shape
    return torch.ones(
        (2, blocks, block_size, kv_heads),
        dtype=scale_dtype(kv_cache.dtype),
        device=kv_cache.device,
    )


_restorer = Restorer()


class SharingRows(RowShift):
    """Rows of a group of deep layers, some with blocks of merged tokens."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        super().__init__(max_num_reqs, device)
        self._layers: Sequence[Any] = ()
        self._shared: dict[str, torch.Tensor] = {}

    def bind(
        self, pairs: Sequence[tuple[Any, Any]], factors: dict[int, torch.Tensor]
    ) -> None:
        """Give each ``(shallow, deep)`` pair its factors, once KV caches exist.

        Args:
            pairs: Attention layers.
            factors: Address of a KV cache -> its factors; grows. One block belongs to
                one group, so deep layers with one memory share factors as well.

        Raises:
            RuntimeError: vLLM has not laid a pair's caches over each other.
        """
        self._layers = [deep for _, deep in pairs]
        for shallow, deep in pairs:
            caches = [layer.kv_cache for layer in (shallow, deep)]
            if len({(cache.data_ptr(), cache.stride()) for cache in caches}) > 1:
                raise RuntimeError(f"{KEY}: two layers to merge have memory apart")
            cache = deep.kv_cache
            if cache.data_ptr() not in factors:
                factors[cache.data_ptr()] = new_scales(cache)
            deep.page_scales = factors[cache.data_ptr()]
            if has_scales(deep.kv_cache_dtype):
                deep.impl._k_scale_cache, deep.impl._v_scale_cache = deep.page_scales

    def share(self, request_id: str, blocks: torch.Tensor) -> None:
        """Remember blocks of a request that hold merged tokens, ``[count]`` int64."""
        earlier = self._shared.get(request_id, blocks[:0])
        self._shared[request_id] = torch.cat([earlier, blocks])

    def forget(self, request_id: str) -> None:
        """See `RowShift.forget`; the blocks are ordinary ones again."""
        super().forget(request_id)
        if (blocks := self._shared.pop(request_id, None)) is not None:
            for layer in self._layers:
                layer.page_scales[:, blocks] = 1

    def sharing(self) -> list[int]:
        """Rows of the coming batch that have merged tokens."""
        return [i for i, name in enumerate(self._rows) if name in self._shared]

    def apart(
        self, common: CommonAttentionMetadata
    ) -> tuple[CommonAttentionMetadata, list["SharedRow"]]:
        """Split rows with merged tokens off for `attend_rows`.

        vLLM's kernel still gets them, as short as can be: what it finds is replaced.

        Args:
            common: Metadata of the group, as kernels read them.

        Returns:
            The same with these rows short, and each of them.
        """
        rows = self.sharing()
        if not rows:
            return common, []
        starts = common.query_start_loc_cpu.tolist()
        lens, table = common.seq_lens, common.block_table_tensor
        short, found = lens.clone(), []
        for row in rows:
            first, end, tokens = starts[row], starts[row + 1], int(lens[row])
            short[row] = end - first
            found.append(SharedRow(common, row, first, end, tokens, table[row].long()))
        return common.replace(seq_lens=short), found


@dataclass
class SharedRow:
    """A request of the batch with merged tokens.

    Attributes:
        batch: Metadata of all rows.
        row: Its number.
        first: Its first token in the batch.
        end: Behind its last one.
        tokens: All that it holds.
        table: ``[width]`` int64, its row of the block table.
        metadata: A backend's, of this row alone with pages 0, 1, 2 and so on.
    """

    batch: CommonAttentionMetadata
    row: int
    first: int
    end: int
    tokens: int
    table: torch.Tensor
    metadata: Any = None

    @property
    def in_batch(self) -> slice:
        """Its tokens."""
        return slice(self.first, self.end)

    def alone(self) -> CommonAttentionMetadata:
        """Metadata of this row, to build a backend's from."""
        starts = torch.tensor([0, self.end - self.first], dtype=torch.int32)
        lens = torch.tensor([self.tokens], dtype=torch.int32)
        pages = torch.arange(len(self.table), dtype=torch.int32)
        return self.batch.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            num_reqs=1,
            num_actual_tokens=self.end - self.first,
            max_query_len=self.end - self.first,
            max_seq_len=self.tokens,
            block_table_tensor=pages[None],
            slot_mapping=self.batch.slot_mapping[self.in_batch],
            _num_computed_tokens_cache=None,
        )


def attend_rows(
    forward: Callable[..., Any],
    layer: Any,
    rows: Sequence[SharedRow],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Fill in what rows with merged tokens attend to, over restored pages.

    Args:
        forward: Of the backend's implementation of attention.
        layer: Of a pair the deep one.
        rows: From `SharingRows.apart`.
        query: ``[tokens, query_heads, head_size]``.
        key: Not read.
        value: Not read.
        kv_cache: ``[num_blocks, kv_heads, block_size, 2 * head_size]``.
        output: ``[tokens, query_heads, head_size]``.
    """
    block_size = kv_cache.shape[2]
    for row in rows:
        blocks, own = row.table[: -(-row.tokens // block_size)], row.in_batch
        if layer.kv_cache_dtype in UNQUANTISED:
            pages = _restorer.restore(
                page_layout(layer), kv_cache, blocks, layer.page_scales
            )
            forward(layer, query[own], key, value, pages, row.metadata, output[own])
        else:
            output[own] = _attend(layer, query[own], blocks, row.tokens)


def _attend(
    layer: Any, query: torch.Tensor, blocks: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Attention over pages of codes, in torch; see `attend`."""
    pages = pages_of(layer)
    scales = layer.page_scales[:, blocks].flatten(1, 2).transpose(1, 2)
    keys, values = (
        pages.decode(half, pages.take(half, blocks))[:, :tokens]
        for half in (KEYS, VALUES)
    )
    return attend(
        query,
        keys,
        values,
        *scales[:, :, :tokens],
        scale=layer.impl.scale,
        softcap=layer.impl.logits_soft_cap or 0.0,
    )


def scaled_forward(forward: Callable[..., Any], impl: Any, layer: Any) -> Any:
    """Triton's ``forward`` for a deep layer, bound to what reads its factors.

    Args:
        forward: Of vLLM's class.
        impl: The layer's implementation of attention.
        layer: With ``page_scales``.
    """
    if has_scales(layer.kv_cache_dtype):
        return functools.partial(forward, impl)
    scaled = copy.copy(impl)
    # In these modes the kernel applies factors to logits and weights; what a page
    # holds it only casts, whatever its type.
    scaled._kv_quant_mode = KVQuantMode.INT8_PER_TOKEN_HEAD
    scaled._is_per_token_head_quant = True
    scaled._k_scale_cache, scaled._v_scale_cache = layer.page_scales
    if layer.kv_cache_dtype in UNQUANTISED:
        return functools.partial(forward, scaled)
    scaled._kv_quant_mode = KVQuantMode.FP8_PER_TOKEN_HEAD
    scaled.scale = impl.scale * layer._k_scale_float
    return functools.partial(_restored, forward, scaled)


def _restored(
    forward: Callable[..., Any], impl: Any, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """``forward`` over values that are still to be multiplied by the layer's scale."""
    found = forward(impl, layer, *args, **kwargs)
    return found.mul_(layer._v_scale_float)
