"""Attention backends that read a compressed prompt as a shorter one.

Each is derived from vLLM's own backend of the same name. Its metadata builder
shifts a compressed request's block-table row left and shortens its length; its
implementation lets the observation window be seen. Kernels stay vLLM's.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention import selector
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from .head_pages import HeadPages
from .one_head import attend_by_head, one_head_builder, one_head_impl
from .restore import RestoredRows, attend_restored
from .rows import RowShift
from .shared_pages import SharingRows, scaled_forward

SUPPORTED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
_PREFIX = "Compressed_"


@functools.cache
def _derive(base: type[AttentionBackend]) -> type[AttentionBackend]:
    builder_base: Any = base.get_builder_cls()
    impl_base: Any = base.get_impl_cls()
    scales = base.get_name() == "TRITON_ATTN"  # factors of pages, in its kernel

    class CompressedBuilder(builder_base):
        # Groups differ in lengths, not only in their tables.
        supports_update_block_table = False
        # Set by the runner where the group is compressed; None passes through.
        row_shift: RowShift | None = None
        _lens: torch.Tensor | None = None
        # What the last metadata were built of, for the tiers of a pruned batch.
        physical: CommonAttentionMetadata | None = None

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            # Prefill must run Python, where the observation window is captured.
            support = super().get_cudagraph_support(*args)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=_by_value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self.row_shift is not None:
                if self._lens is None:
                    self._lens = self.row_shift.new_lens()
                common_attn_metadata = self.row_shift.physical(
                    common_attn_metadata, self.kv_cache_spec.block_size, self._lens
                )
                self.physical = common_attn_metadata
            if isinstance(self.row_shift, HeadPages) and (
                by_head := self.row_shift.by_head(
                    common_attn_metadata, self.kv_cache_spec.block_size
                )
            ):
                metadata = builder_base.build(self._one_head, 0, by_head)
                metadata.kv_heads = self.kv_cache_spec.num_kv_heads
                return metadata
            parts: list[RestoredRows] = []
            if isinstance(self.row_shift, SharingRows) and not scales:
                common_attn_metadata, parts = self.row_shift.apart(common_attn_metadata)
            metadata = super().build(
                common_prefix_len, common_attn_metadata, *args, **kwargs
            )
            if parts:
                for part in parts:
                    part.metadata = super().build(0, part.common)
                metadata.restored = parts
            return metadata

        @functools.cached_property
        def _one_head(self) -> Any:
            return one_head_builder(self, base.get_name())

        def build_physical(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
            return super().build(0, common_attn_metadata)

    class CompressedImpl(impl_base):
        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if window := getattr(layer, "observation_window", None):
                given = getattr(attn_metadata, "given_tokens", None)
                window.capture(query, given, layer._q_scale)
            forward: Callable[..., Any] = super().forward
            if kv_heads := getattr(attn_metadata, "kv_heads", 0):
                one_head = functools.partial(impl_base.forward, self._one_head)
                forward = functools.partial(attend_by_head, one_head, kv_heads)
            if scales and hasattr(layer, "page_scales"):
                forward = scaled_forward(impl_base.forward, self, layer)
            parts = getattr(attn_metadata, "restored", ())
            alone = sum(len(part.lens) for part in parts)
            if not parts or alone < len(attn_metadata.seq_lens):
                output = forward(
                    layer,
                    query,
                    key,
                    value,
                    kv_cache,
                    attn_metadata,
                    output,
                    *args,
                    **kwargs,
                )
            attend_restored(super().forward, layer, parts, query, key, value, output)
            return output

        @functools.cached_property
        def _one_head(self) -> Any:
            return one_head_impl(self)

    derived = subclass_attention_backend_with_overrides(
        _PREFIX,
        base,
        {
            "get_builder_cls": staticmethod(lambda: CompressedBuilder),
            "get_impl_cls": staticmethod(lambda: CompressedImpl),
        },
    )
    return derived


def _by_value(support: AttentionCGSupport) -> int:
    return support.value


def __getattr__(name: str) -> type[AttentionBackend]:
    """Derive a backend when it is chosen: no platform's code is imported before.

    vLLM finds the class again by module and name, so it carries both.
    """
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    base = resolve_obj_by_qualname(AttentionBackendEnum[name[len(_PREFIX) :]].value)
    derived = _derive(base)
    derived.__module__, derived.__name__, derived.__qualname__ = __name__, name, name
    return derived


@contextmanager
def registered() -> Iterator[None]:
    """Register the backends with vLLM while one model is built, and no longer.

    Another engine in this process, started without compression, gets vLLM's own.
    """
    names = [AttentionBackendEnum[name] for name in SUPPORTED]
    selector._cached_get_attn_backend.cache_clear()
    for backend in names:
        register_backend(backend, f"{__name__}.{_PREFIX}{backend.name}")
    try:
        yield
    finally:
        for backend in names:
            backend.clear_override()
        selector._cached_get_attn_backend.cache_clear()
