"""Layers that run over a part of the batch only.

Over the last tokens of each request: those that a prompt may skip (YOCO's upper half).
Over requests with several tokens: those that need more passes than a decode does
(LCKV's middle). Metadata of the part go into vLLM's forward context for the while.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)

from .args import config_of


def last_queries_only(layer: Attention, vllm_config: VllmConfig) -> bool:
    """Give ``layer`` the last tokens of each request only.

    As many as may be sampled from, or are wanted to compress the layer's KV cache.

    Returns:
        False if the layer has to be given all: a method wants more with longer prompts.
    """
    count = 1 + vllm_config.num_speculative_tokens
    if config := config_of(vllm_config):
        count = max(count, config.window)
        longest = vllm_config.model_config.max_model_len
        if any(s.queries_wanted(longest) > count for s in config.scorers.values()):
            return False
    layer.attn_backend = _last_only(layer.attn_backend, count)
    return True


def in_several_passes(layer: Attention) -> None:
    """Let ``layer`` run again over requests with several tokens, see `again`."""
    layer.attn_backend = _in_passes(layer.attn_backend)


@contextmanager
def last_tokens(layer: Attention) -> Iterator[torch.Tensor | None]:
    """The tokens that ``layer`` of `last_queries_only` is given, while it runs.

    Yields:
        ``[tokens]`` int64, ascending; None = all of the batch.
    """
    metadata: Any = get_forward_context().attn_metadata
    tokens = metadata[layer.layer_name].last_tokens if metadata else None
    with _graphs(tokens is None):
        yield tokens


def passes_needed(layer: Attention) -> int:
    """Tokens of the longest chunk of the batch; 1 where vLLM measures memory."""
    metadata: Any = get_forward_context().attn_metadata
    return metadata[layer.layer_name].longest if metadata else 1


@contextmanager
def again(layers: Sequence[Attention]) -> Iterator[torch.Tensor | None]:
    """Run ``layers`` once more, over the requests with several tokens.

    Yields:
        ``[tokens]`` int64, ascending: theirs; None = all of the batch.
    """
    context: Any = get_forward_context()
    whole, slots = context.attn_metadata, context.slot_mapping
    names = [layer.layer_name for layer in layers]
    parts = {name: whole[name].several() for name in names}
    tokens = next(iter(parts.values()))[1]
    if tokens is None:
        yield None
        return
    context.attn_metadata = {**whole, **{name: parts[name][0] for name in names}}
    context.slot_mapping = {**slots, **{name: slots[name][tokens] for name in names}}
    try:
        with _graphs(False):
            yield tokens
    finally:
        context.attn_metadata, context.slot_mapping = whole, slots


@contextmanager
def _graphs(allowed: bool) -> Iterator[None]:
    """Without CUDA graphs, where they are not: the batch's size chooses them."""
    context: Any = get_forward_context()
    mode = context.cudagraph_runtime_mode
    if not allowed:
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode


def _part(
    common: CommonAttentionMetadata, rows: torch.Tensor | None, counts: torch.Tensor
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The metadata of the last tokens of some requests, and those tokens.

    Args:
        common: Of the whole batch.
        rows: ``[requests]`` int64 on the CPU; None = all.
        counts: How many tokens of each, on the CPU.

    Returns:
        The metadata, and ``[tokens]`` int64 on the CPU.
    """
    device = common.query_start_loc.device
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    total = int(starts[-1])
    ends = common.query_start_loc_cpu[1:]
    ends = ends if rows is None else ends[rows]
    # Token i of the part lies so much further back in the whole batch.
    skipped = (ends - starts[1:]).repeat_interleave(counts, output_size=total)
    tokens = torch.arange(total) + skipped
    here = tokens.to(device, non_blocking=True)
    fields = {
        "query_start_loc": starts.to(device, non_blocking=True),
        "query_start_loc_cpu": starts,
        "num_actual_tokens": total,
        "max_query_len": int(counts.max()),
        "slot_mapping": common.slot_mapping[here],
        "positions": None if common.positions is None else common.positions[here],
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    if rows is not None:
        fields["num_reqs"] = len(rows)
        if common.req_idx is not None:
            fields["req_idx"] = common.req_idx[rows.numpy()]
        for name in ("seq_lens", "block_table_tensor"):
            fields[name] = getattr(common, name)[rows.to(device)]
        for name in ("seq_lens_cpu_upper_bound", "is_prefilling"):
            whole = getattr(common, name)
            fields[name] = None if whole is None else whole[rows.to(whole.device)]
    return common.replace(**fields), tokens


def builder_to_extend(backend: type[AttentionBackend]) -> Any:
    """The backend's metadata builder, as a base of one that changes what it is given.

    Full CUDA graphs are left for decodes alone: they would freeze what differs from one
    prompt to the next.
    """
    base: Any = backend.get_builder_cls()

    class Builder(base):
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
            support = super().get_cudagraph_support(*args)
            least = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, least, key=lambda each: each.value)

    return Builder


@functools.cache
def _last_only(base: type[AttentionBackend], count: int) -> type[AttentionBackend]:
    """``base`` with metadata of the last ``count`` tokens of each request."""
    builder_base: Any = builder_to_extend(base)

    class LastBuilder(builder_base):
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            common, tokens = common_attn_metadata, None
            if common.max_query_len > count:
                counts = common.query_start_loc_cpu.diff().clamp_(max=count)
                common, tokens = _part(common, None, counts)
            metadata = super().build(common_prefix_len, common, *args, **kwargs)
            if tokens is not None:
                metadata.given_tokens = tokens.numpy()
                tokens = tokens.to(self.device, non_blocking=True)
            metadata.last_tokens = tokens
            return metadata

    return subclass_attention_backend_with_overrides(
        f"Last{count}", base, {"get_builder_cls": staticmethod(lambda: LastBuilder)}
    )


@functools.cache
def _in_passes(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """``base`` whose metadata can tell those of the requests with several tokens."""
    builder_base: Any = builder_to_extend(base)

    class PassesBuilder(builder_base):
        # Buffers of a builder hold one batch.
        _second: Any = None

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            metadata = super().build(
                common_prefix_len, common_attn_metadata, *args, **kwargs
            )
            metadata.longest = common_attn_metadata.max_query_len
            # All layers of this builder share the answer.
            metadata.several = functools.cache(
                functools.partial(self._several, metadata, common_attn_metadata)
            )
            return metadata

        def _several(
            self, metadata: Any, common: CommonAttentionMetadata
        ) -> tuple[Any, torch.Tensor | None]:
            counts = common.query_start_loc_cpu.diff()
            rows = (counts > 1).nonzero()[:, 0]
            if len(rows) == len(counts):
                return metadata, None
            if self._second is None:
                self._second = builder_base(
                    self.kv_cache_spec, self.layer_names, self.vllm_config, self.device
                )
            if getattr(self, "row_shift", None) is not None:
                self._second.row_shift = self.row_shift.of_rows(rows.tolist())
            part, tokens = _part(common, rows, counts[rows])
            second = self._second.build(0, part)
            second.given_tokens = tokens.numpy()
            return second, tokens.to(self.device, non_blocking=True)

    return subclass_attention_backend_with_overrides(
        "Passes", base, {"get_builder_cls": staticmethod(lambda: PassesBuilder)}
    )
