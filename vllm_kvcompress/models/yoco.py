"""YOCO, You Only Cache Once (arXiv 2405.05254), for vLLM.

The lower half of the layers, the self-decoder, keeps a window or a state. Its output
gives the one global KV cache, which all layers of the upper half read. So a prompt's
tokens need not go through the upper half at all, but for the last.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
)

from ..engine.batch_parts import last_tokens
from .configs import YocoConfig
from .layer_span import SpanRunner
from .yoco_decoders import CrossDecoder, SelfDecoder


class YocoModel(nn.Module):
    """Embeddings, both halves, and the last norm."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".ffn.fc2.": ".ffn.down_proj."},
        orig_to_new_stacked={
            ".ffn.fc1.": (".ffn.gate_up_proj.", 0),
            ".ffn.gate.": (".ffn.gate_up_proj.", 1),
            "cross_decoder.k_proj.": ("cross_decoder.kv_proj.", 0),
            "cross_decoder.v_proj.": ("cross_decoder.kv_proj.", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.dim, quant_config=vllm_config.quant_config
        )
        self.self_decoder = SelfDecoder(vllm_config, f"{prefix}.self_decoder")
        self.cross_decoder = CrossDecoder(vllm_config, f"{prefix}.cross_decoder")
        self.layer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.run = SpanRunner(vllm_config, config.dim)
        self.lower = self.run.span("self_decoder", self.self_decoder.layers)
        self.upper = self.run.span("cross_decoder", self.cross_decoder.layers)
        lower = {
            f"self_decoder.layers.{layer}.mixer.{shard}_proj.": (
                f"self_decoder.layers.{layer}.mixer.qkv_proj.",
                shard,
            )
            for layer in range(config.n_layers // 2)
            for shard in "qkv"
        }
        self.hf_to_vllm_mapper = self.hf_to_vllm_mapper | WeightsMapper(
            orig_to_new_stacked=lower
        )

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """``[tokens, dim]``."""
        return self.embed_tokens(input_ids) * self.config.dim**0.5

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the batch.

        Returns:
            ``[tokens, dim]``; with early exit zeros where no logits can be wanted.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states, residual = self.run(self.lower, positions, inputs_embeds, None)
        hidden_states = hidden_states + residual
        self.cross_decoder.store(positions, hidden_states)
        if not self.cross_decoder.exits_early:
            return self._upper(positions, hidden_states)
        with last_tokens(self.cross_decoder.owner) as tokens:
            if tokens is None:
                return self._upper(positions, hidden_states)
            output = torch.zeros_like(hidden_states)
            output[tokens] = self._upper(positions[tokens], hidden_states[tokens])
            return output

    def _upper(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        found = self.run(self.upper, positions, hidden_states, None)
        return self.layer_norm(*found)[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the authors' names."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


class YocoForCausalLM(nn.Module, SupportsQuant):
    """YOCO with sliding windows in its lower half."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "output_projection.": "lm_head.",
            "embed_tokens.": "model.embed_tokens.",
            "self_decoder.": "model.self_decoder.",
            "cross_decoder.": "model.cross_decoder.",
            "layer_norm.": "model.layer_norm.",
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["fc1", "gate"],
        "kv_proj": ["k_proj", "v_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: YocoConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = YocoModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.dim,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[tokens, dim]``."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's models; pipeline parallelism is refused by vLLM."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """``[tokens, vocab]``."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint with the authors' names."""
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)


class YocoRetentionForCausalLM(YocoForCausalLM, HasInnerState, IsHybrid):
    """YOCO with gated retention in its lower half.

    Raises:
        ValueError: Speculative decoding is on.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.num_speculative_tokens:
            raise ValueError(
                "YOCO with gated retention cannot take rejected drafts out of its "
                "states; do without speculative decoding (--speculative-config)"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @classmethod
    def get_mamba_state_dtype_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[torch.dtype]:
        """For vLLM, which sizes pages before the model exists."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int, int], ...]:
        """The same."""
        config: YocoConfig = vllm_config.model_config.hf_config
        return MambaStateShapeCalculator.linear_attention_state_shape(
            num_heads=config.n_self_heads,
            tp_size=vllm_config.parallel_config.tensor_parallel_size,
            head_dim=config.dim // config.n_self_heads,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How vLLM copies states at the end of a cached prefix."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()
