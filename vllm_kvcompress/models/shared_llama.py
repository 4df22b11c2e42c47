"""Llamas whose layers share KV, for vLLM: CLA and Layer-Condensed KV.

One decoder driven by a `LayerMap`. Where a layer reads a later one, a prompt takes
several passes over the span between them (arXiv 2405.10637, section 2.3): the cache
then holds what the pass before wrote.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
)
from vllm.sequence import IntermediateTensors

from ..engine.batch_parts import again, in_several_passes, passes_needed
from ..engine.kv_views import store_zeros
from .layer_map import LayerMap
from .layer_span import LayerSpan, SpanRunner
from .shared_attention import SharedDecoderLayer


class SharedLlamaModel(nn.Module):
    """The decoder: embeddings, spans of layers, and the last norm.

    Raises:
        ValueError: Layers that share KV lie on different pipeline stages.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        layer_map: LayerMap = config.layer_map
        for index in layer_map.writers:
            if layer_map.owners[index] != index:
                raise ValueError(
                    f"layer {index} stores keys and values for others but reads those "
                    f"of layer {layer_map.owners[index]}; a layer that stores them "
                    "must read its own"
                )
        stages = get_pp_group()
        if stages.is_first_rank or (config.tie_word_embeddings and stages.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: SharedDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        own = range(self.start_layer, self.end_layer)
        for index in own:
            if layer_map.owners[index] not in own:
                raise ValueError(
                    f"layer {index} reads the KV of layer {layer_map.owners[index]}, "
                    "which is on another pipeline stage; use "
                    "--pipeline-parallel-size 1, or cut the stages elsewhere with "
                    "VLLM_PP_LAYER_PARTITION"
                )
        self.run = SpanRunner(vllm_config, config.hidden_size)
        self.spans = []
        for span in layer_map.spans:
            first = max(span.first, self.start_layer)
            end = min(span.end, self.end_layer)
            if first < end:
                module = self.run.span(f"layers_{first}_{end}", self.layers[first:end])
                self.spans.append((span.repeats, module))
                if span.repeats:
                    for attention in module.attention:
                        in_several_passes(attention.attn)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not stages.is_last_rank:
            self.norm = PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        self.hf_to_vllm_mapper = _stacked(layer_map)

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """``[tokens, hidden_size]``."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """As vLLM's ``LlamaModel``."""
        if intermediate_tensors is not None:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        else:
            hidden_states = inputs_embeds
            if hidden_states is None:
                hidden_states = self.embed_input_ids(input_ids)
            residual = None
        for repeats, span in self.spans:
            run = self._repeat if repeats else self.run
            hidden_states, residual = run(span, positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(
                {"hidden_states": hidden_states, "residual": residual}
            )
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states

    def _repeat(
        self,
        span: LayerSpan,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As many passes as the batch's longest chunk needs, or the model allows.

        After k passes the first k tokens of every chunk are exact.
        """
        attention = span.attention
        needed = passes_needed(attention[0].attn)
        if needed == 1:
            return self.run(span, positions, hidden_states, residual)
        if residual is not None:
            hidden_states, residual = hidden_states.clone(), residual.clone()
        for each in attention:
            if each.owns:
                store_zeros(each.attn, hidden_states)
        outputs = self.run(span, positions, hidden_states, residual)
        exact = self.config.use_sequential
        needed = needed if exact else min(needed, self.config.passes)
        with again([each.attn for each in attention]) as tokens:
            if tokens is not None:
                outputs = outputs[0].clone(), outputs[1].clone()
                hidden_states, positions = hidden_states[tokens], positions[tokens]
                residual = None if residual is None else residual[tokens]
            found = outputs
            for _ in range(needed - 1):
                before = found[0].clone() if exact else None
                found = self.run(span, positions, hidden_states, residual)
                if before is not None and _settled(before, found[0]):
                    break
        if tokens is None:
            return found
        for whole, part in zip(outputs, found, strict=True):
            whole[tokens] = part
        return outputs

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load ordinary Llama names; only owners have keys and values."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _settled(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a pass has changed nothing, ``[tokens, hidden_size]`` each.

    In float32 the order of additions keeps the last bits moving; coarser types round
    them away.
    """
    if before.shape != after.shape:
        return False
    if after.dtype != torch.float32:
        return torch.equal(before, after)
    change = (after - before).norm(dim=-1)
    still = change <= 16 * torch.finfo(after.dtype).eps * after.norm(dim=-1)
    return bool(still.all())


def _stacked(layer_map: LayerMap) -> WeightsMapper:
    """Where vLLM fuses projections, by name of the checkpoint."""
    stacked: dict[str, tuple[str, Any]] = {
        ".gate_proj": (".gate_up_proj", 0),
        ".up_proj": (".gate_up_proj", 1),
    }
    for owner in layer_map.writers:
        for shard in "qkv":
            name = f"layers.{owner}.self_attn."
            stacked[f"{name}{shard}_proj"] = (f"{name}qkv_proj", shard)
    return WeightsMapper(orig_to_new_stacked=stacked)


class _SharedLlamaForCausalLM(LlamaForCausalLM):
    """With a head on top, as vLLM's ``LlamaForCausalLM``."""

    hf_to_vllm_mapper = WeightsMapper()

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None
    ) -> SharedLlamaModel:
        return SharedLlamaModel(vllm_config=vllm_config, prefix=prefix)


class ClaLlamaForCausalLM(_SharedLlamaForCausalLM):
    """Cross-Layer Attention (arXiv 2405.12981)."""


class LCKVLlamaForCausalLM(_SharedLlamaForCausalLM):
    """Layer-Condensed KV (arXiv 2405.10637)."""


class OptLlamaForCausalLM(LCKVLlamaForCausalLM):
    """The same, from the first code base of its authors."""
