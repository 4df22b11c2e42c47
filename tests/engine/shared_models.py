"""Small random models that share KV across layers, and what each must answer.

Attention is as sharp as can be while float32 still settles the answer: condensed
layers feed back into themselves, and with larger weights they are chaotic.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.engine.conftest import VOCAB

WINDOW = 40
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
YOCO: dict[str, Any] = {
    "dim": 128,
    "hidden_dim": 256,
    "n_layers": 6,
    "n_self_heads": 4,
    "n_attn_heads": 4,
    "n_attn_kv_heads": 2,
    "vocab_size": VOCAB,
    "max_seq_len": 4096,
}


@dataclass(frozen=True)
class Recipe:
    """How to make a model.

    Attributes:
        reference: Name of the class of the reference.
        settings: Of its configuration.
        exact: `hf_overrides` with which vLLM gives the definition's logits everywhere.
    """

    reference: str
    settings: dict[str, Any]
    exact: dict[str, Any] = field(default_factory=dict)


def _cla(layers: int, **settings: Any) -> Recipe:
    return Recipe("ClaLlamaForCausalLM", {"num_hidden_layers": layers, **settings})


def _lckv(string: str, **more: Any) -> Recipe:
    settings = {
        "num_hidden_layers": len(string.split("_")),
        "layer_types": string,
        "sliding_window": WINDOW,
        "forward_passes": 3,
        "backward_passes": 2,
        **more,
    }
    return Recipe("LCKVLlamaForCausalLM", settings, {"use_sequential": True})


def _yoco(window: int | None) -> Recipe:
    settings = {**YOCO, "sliding_window": window}
    return Recipe("YocoForCausalLM", settings, {"early_exit": False})


_OPT = {"num_hidden_layers": 5, "layer_types": "0_1_1_2_0", "target_layer": 3}
RECIPES = {
    "cla2": _cla(5),
    "cla3": _cla(7, cla_share_factor=3),
    "cla_ends": _cla(6, cla_map="keep_ends"),
    "cla_norms": _cla(5, use_qk_norm=True),
    "lckv": _lckv("0_4_4_4_4_5"),
    "lckv_no_warmup": _lckv("3_3_3_3"),
    "lckv_middle": _lckv("0_3_3_3_3_3_6"),
    "lckv_targets": _lckv("0_2_2_4_4_5"),
    "lckv_slides": _lckv("0s_1s_2_2_2"),
    "lckv_top_slides": _lckv("0_3s_3s_3s_4"),
    "lckv_some_slide": _lckv("0_3s_3_3s_4"),
    "lckv_nodiag": _lckv("0_4_4_4_4_5", force_nodiag=True),
    "opt": Recipe("OptLlamaForCausalLM", _OPT, {"use_sequential": True}),
    "yoco": _yoco(WINDOW),
    "yoco_retention": _yoco(None),
}


@dataclass
class Made:
    """A model on disk and in memory.

    Attributes:
        exact: See `Recipe`.
    """

    path: Path
    reference: Any
    exact: dict[str, Any]

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """What the definition says after each of ``tokens``, ``[tokens, VOCAB]``."""
        ids = torch.tensor([tokens])
        if hasattr(self.reference, "sequential"):
            return self.reference.sequential(ids)[0].log_softmax(-1)
        return self.reference(ids).logits[0].log_softmax(-1)

    def error(self, tokens: list[int], found: torch.Tensor) -> float:
        """How far ``found`` is off after the last of ``tokens`` that it has rows of.

        Args:
            tokens: The prompt and what was generated.
            found: Log-probabilities of all tokens but the first few.
        """
        wanted = self.logprobs(tokens[:-1])[-len(found) :]
        return float((wanted - found).abs().max())


def make(name: str, path: Path, **settings: Any) -> Made:
    """Write a random model; ``settings`` change the recipe's."""
    from vllm_kvcompress.models.reference import llama, yoco

    recipe = RECIPES[name]
    module = yoco if recipe.reference.startswith("Yoco") else llama
    kind: Callable[..., Any] = getattr(module, recipe.reference)
    common = {} if module is yoco else LLAMA
    config = kind.config_class(**{**common, **recipe.settings, **settings})
    torch.manual_seed(0)
    reference = kind(config).eval()
    with torch.no_grad():
        for key, weight in reference.named_parameters():
            if "norm" in key:
                weight.copy_(torch.rand_like(weight) + 0.5)
            else:
                sharp = "q_proj" in key or "k_proj" in key
                weight.mul_(6.0 if sharp else 3.0)
    reference.save_pretrained(path)
    return Made(path, reference, recipe.exact)
