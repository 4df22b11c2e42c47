"""Transformers' own multimodal models with an explicit set of visible tokens.

The oracle for prompts with pictures: one pass over a prompt and its answer, in which
each KV head of each layer sees what it is told.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.picture_models import Prompt

Tensor = torch.Tensor


class Sighted:
    """A model of `picture_models`, in float32."""

    def __init__(self, path: Path) -> None:
        from transformers import (
            AttentionInterface,
            AutoModelForImageTextToText,
            AutoProcessor,
        )

        AttentionInterface.register("sighted", self._attend)
        self._model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation={"text_config": "sighted", "vision_config": "eager"},
        ).eval()
        self._processor = AutoProcessor.from_pretrained(path)
        text = self._model.config.get_text_config()
        self.layers: int = text.num_hidden_layers
        self.kv_heads: int = text.num_key_value_heads

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        seen = torch.ones(query.shape[2], query.shape[2]).bool().tril()
        seen = seen.expand(query.shape[1], -1, -1).clone()
        if self._visible is not None:
            own = self._visible[module.layer_idx].repeat_interleave(group, 0)
            first = 0 if self._pruned and module.layer_idx else own.shape[1]
            seen[:, first:, : own.shape[1]] &= own[:, None]
            seen |= torch.eye(len(seen[0])).bool()  # what is lost looks at nothing else
        logits = query @ key.transpose(2, 3) * scaling
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    @torch.inference_mode()
    def answer(
        self,
        prompt: Prompt,
        generated: list[int],
        visible: Sequence[Tensor] | None = None,
        *,
        pruned: bool = False,
    ) -> Tensor:
        """Log-probabilities of the generated tokens, which are forced.

        Args:
            prompt: Words and pictures.
            generated: Its answer.
            visible: Layer -> ``[kv_heads, prompt]`` booleans, what of the prompt the
                answer sees; None = everything.
            pruned: Whether the prompt itself sees no more, above the lowest layer.

        Returns:
            ``[generated, vocab]``.
        """
        self._visible, self._pruned = visible, pruned
        tokens = torch.tensor([prompt.tokens + generated[:-1]])
        inputs: dict[str, Any] = {}
        if prompt.pictures:
            prepared = self._processor.image_processor(
                images=[prompt.pictures], return_tensors="pt"
            )
            inputs.update(prepared)
        if "image_grid_thw" in inputs:
            image = self._model.config.image_token_id
            inputs["mm_token_type_ids"] = (tokens == image).int()
        logits = self._model(input_ids=tokens, use_cache=False, **inputs).logits[0]
        return logits[len(prompt.tokens) - 1 :].log_softmax(-1)
