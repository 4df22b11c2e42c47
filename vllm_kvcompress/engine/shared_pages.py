"""How the deep layer of a pair reads pages of merged tokens.

They are the shallow layer's, scaled for it, so that it reads them as any others. Both
layers see the same memory (vLLM lays the groups of a model over each other), so the
deep one has them in its own rows; beside the pages it has one factor per token and KV
head for keys, and one for values: 1 in all other pages. Factors lie over each other
as pages do. Triton's kernel takes them as those of a quantised cache. The CPU's takes
none: there `restore` takes over rows with merged tokens.

Where the cache does have a scale per token and head, the factors are the deep layer's
scales, which vLLM then writes and reads here and not behind the codes.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVQuantMode

from ..config import KEY
from .page_formats import UNQUANTISED, has_scales
from .restore import RestoredRows, apart
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
    ) -> tuple[CommonAttentionMetadata, list[RestoredRows]]:
        """Split rows with merged tokens off, see `restore.apart`."""
        if not (rows := self.sharing()):
            return common, []
        return apart(common, rows, self._layers[0].kv_cache)


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
