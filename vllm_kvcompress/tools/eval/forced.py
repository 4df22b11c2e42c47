"""Tokens that a request must generate first, whatever the model would say.

A logits processor for `vllm.LLM` and `vllm serve`, both model runners::

    vllm serve MODEL --logits-processors vllm_kvcompress.tools.eval.forced:ForcedTokens

The request names them: ``SamplingParams(extra_args={"forced_tokens": [5, 9]})``, or
``vllm_xargs`` in HTTP. They count as output, and ``max_tokens`` counts them. A stop
token among them ends the request, unless it says ``ignore_eos``. Logprobs are the
model's own, since vLLM reads them before logits are processed.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

KEY = "forced_tokens"


def forced_tokens(params: "SamplingParams") -> list[int]:
    """What a request asks for.

    Raises:
        ValueError: It is no list of token ids.
    """
    given = (params.extra_args or {}).get(KEY, [])
    if not isinstance(given, list) or any(
        type(token) is not int or token < 0 for token in given
    ):
        raise ValueError(f"{KEY} must be a list of token ids, not {given!r}")
    return given


def _force(logits: torch.Tensor, tokens: list[int], position: int) -> None:
    """Leave one row no other choice; ids that the model lacks are left out."""
    if position < len(tokens) and tokens[position] < logits.shape[-1]:
        logits.fill_(-torch.inf)
        logits[tokens[position]] = 0.0


class ForcedTokens(AdapterLogitsProcessor, LogitsProcessor):
    """Forces what requests ask for, in the V1 and in the V2 model runner.

    The runners have an interface each; a server is given one name for both.
    """

    def __init__(self, vllm_config: Any, *about_runner: Any) -> None:
        self._by_slot: dict[int, list[int]] = {}
        if len(about_runner) == 2:  # V1: device, is_pin_memory
            super().__init__(vllm_config, *about_runner)
        else:
            (self._requests,) = about_runner

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a request, before it reaches the engine."""
        forced_tokens(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """It is not (V1)."""
        return False

    def new_req_logits_processor(self, params: "SamplingParams") -> Any:
        """What is done to a request's row (V1)."""
        tokens = forced_tokens(params)
        return partial(_forced_row, tokens) if tokens else None

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Remember what a slot's new request wants (V2)."""
        self._by_slot.pop(req_idx, None)
        if tokens := forced_tokens(sampling_params):
            self._by_slot[req_idx] = tokens
        return bool(tokens)

    def apply(
        self, logits: torch.Tensor, ctx: "LogitsContext | None" = None
    ) -> torch.Tensor:
        """Force all rows; only V2 says whose they are."""
        if ctx is None:
            return super().apply(logits)
        if not self._by_slot:
            return logits
        slots, positions = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            made = position + 1 - int(self._requests.prompt_len.np[slot])
            if made >= 0:
                _force(logits[row], self._by_slot.get(slot, []), made)
        return logits


def _forced_row(
    tokens: list[int], made: list[int], logits: torch.Tensor
) -> torch.Tensor:
    _force(logits, tokens, len(made))
    return logits
