"""The KV cache spec of compressed layers, registered with vLLM."""

from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .manager import CompressedKVManager


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose prompt blocks may be replaced by fewer private ones.

    Pages and views are those of full attention, and so is admission, except where
    prompts are compressed while they are read.

    Attributes:
        tier: Which compressed layers, numbered from the bottom, hold equally many
            tokens; a tier is a KV cache group of its own.
        most_tokens: The most that a request ever holds, None = all of its tokens.
    """

    tier: tuple[int, ...] = ()
    most_tokens: int | None = None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request of the greatest length holds at once, per layer."""
        full = super().max_memory_usage_bytes(vllm_config)
        if self.most_tokens is None:
            return full
        blocks = -(-self.most_tokens // self.block_size)
        return min(full, blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge layers of one group; a plain spec among them is another group.

        Raises:
            AssertionError: What vLLM reads as "not the same group".
        """
        first = specs[0]
        if any(type(spec) is not cls or spec.tier != first.tier for spec in specs):
            raise AssertionError("plain layers and every tier form groups of their own")
        return replace(
            super().merge(specs), tier=first.tier, most_tokens=first.most_tokens
        )

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        """Whether all layers are compressed and of one tier."""
        return all(
            isinstance(spec, CompressedAttentionSpec) and spec.tier == self.tier
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class DraftAttentionSpec(FullAttentionSpec):
    """Full attention of a draft model, whose KV stays whole.

    A plain spec would take compressed layers into its group, whose KV then stays, too.
    """

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge layers of one group.

        Raises:
            AssertionError: What vLLM reads as "not the same group".
        """
        if any(type(spec) is not cls for spec in specs):
            raise AssertionError("a draft model's layers form groups of their own")
        return super().merge(specs)

    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        """Whether all layers are a draft model's."""
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())


# The registry adds vLLM's own specs only while it is empty, so they go first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CompressedAttentionSpec, CompressedKVManager)
KVCacheSpecRegistry.register(DraftAttentionSpec, FullAttentionManager)
