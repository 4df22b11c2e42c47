"""The KV cache spec of compressed layers, registered with vLLM."""

from dataclasses import dataclass
from typing import Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .manager import CompressedKVManager


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose prompt blocks may be replaced by fewer private ones.

    Pages, views and admission are those of full attention: a prompt needs all of
    its blocks until it is compressed.
    """

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge layers of one group; a plain spec among them is another group.

        Raises:
            AssertionError: What vLLM reads as "not the same group".
        """
        if any(type(spec) is not cls for spec in specs):
            raise AssertionError("compressed and plain layers form two groups")
        return super().merge(specs)

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        """Whether all layers carry this very spec."""
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())


# The registry adds vLLM's own specs only while it is empty, so they go first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedKVManager)
