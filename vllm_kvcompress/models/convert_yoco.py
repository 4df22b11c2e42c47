"""YOCO (arXiv 2405.05254), initialised from an ordinary Llama.

With a sliding window and as many layers as two, the result is the same model as long
as texts fit the window; with more, the layers of the upper half share what each of
them had alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from .configs import YocoConfig

Weights = Mapping[str, torch.Tensor]


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Their mean, taken in float32, in their dtype."""
    return torch.stack([t.float() for t in tensors]).mean(0).to(tensors[0].dtype)


def yoco_config(
    source: PreTrainedConfig, window: int | None, retention: bool
) -> YocoConfig:
    """The configuration of a Llama turned into YOCO.

    Rotations are kept: YOCO's slowest pair turns by ``1 / rope_theta``, a Llama's
    by one step less.

    Args:
        source: Of a Llama.
        window: Of the self-decoder; 1024 if None.
        retention: Gated retention in its place.

    Raises:
        ValueError: YOCO has no place for something the Llama has.
    """
    heads, layers = source.num_attention_heads, source.num_hidden_layers
    rope = source.rope_parameters
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // heads
    wrong: dict[str, Any] = {
        f"{layers=}, which must be even": layers % 2,
        "biases": getattr(source, "attention_bias", False)
        or getattr(source, "mlp_bias", False),
        f"hidden_act={source.hidden_act}": source.hidden_act != "silu",
        f"rope_type={rope['rope_type']}": rope["rope_type"] != "default",
        f"{head_dim=} times {heads} heads, which is not hidden_size": (
            head_dim * heads != source.hidden_size
        ),
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise ValueError(f"a model with {found[0]} cannot become YOCO")
    pairs = head_dim // 2
    return YocoConfig(
        dim=source.hidden_size,
        n_layers=layers,
        hidden_dim=source.intermediate_size,
        n_self_heads=heads,
        n_attn_heads=heads,
        n_attn_kv_heads=source.num_key_value_heads,
        vocab_size=source.vocab_size,
        max_seq_len=source.max_position_embeddings,
        rope_theta=float(rope["rope_theta"] ** ((pairs - 1) / pairs)),
        norm_eps=source.rms_norm_eps,
        sliding_window=None if retention else window or 1024,
        initializer_range=source.initializer_range,
        dtype=source.dtype,
        **{
            name: getattr(source, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    )


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose pairs lie half a head apart, moved next to each other."""
    split = weight.unflatten(0, (heads, 2, -1))
    return split.transpose(1, 2).flatten(0, 2)


def yoco_weights(weights: Weights, config: YocoConfig) -> dict[str, torch.Tensor]:
    """The weights of a Llama under YOCO's names.

    The upper half's keys, values and input norms become their means.

    Raises:
        KeyError: A weight is missing.
    """
    heads, kv_heads = config.n_attn_heads, config.n_attn_kv_heads
    half = config.n_layers // 2
    embedding = weights["model.embed_tokens.weight"]
    made = {
        "embed_tokens.weight": embedding / config.dim**0.5,
        "output_projection.weight": weights.get("lm_head.weight", embedding).clone(),
        "layer_norm.weight": weights["model.norm.weight"],
    }
    upper: dict[str, list[torch.Tensor]] = {"k": [], "v": [], "norm": []}
    generator = torch.Generator().manual_seed(0)
    for index in range(config.n_layers):
        source = f"model.layers.{index}"
        room, place = ("self", index) if index < half else ("cross", index - half)
        to = f"{room}_decoder.layers.{place}"
        q, k, v, o = (
            weights[f"{source}.self_attn.{name}_proj.weight"] for name in "qkvo"
        )
        norm = weights[f"{source}.input_layernorm.weight"]
        made |= {
            f"{to}.mixer.q_proj.weight": _interleaved(q, heads),
            f"{to}.mixer.out_proj.weight": o,
            f"{to}.mixer_layer_norm.weight": norm,
            f"{to}.final_layer_norm.weight": weights[
                f"{source}.post_attention_layernorm.weight"
            ],
            # The authors' `gate` is what a Llama calls `up`.
            f"{to}.ffn.fc1.weight": weights[f"{source}.mlp.gate_proj.weight"],
            f"{to}.ffn.gate.weight": weights[f"{source}.mlp.up_proj.weight"],
            f"{to}.ffn.fc2.weight": weights[f"{source}.mlp.down_proj.weight"],
        }
        k = _interleaved(k, kv_heads)
        if room == "cross":
            for name, weight in (("k", k), ("v", v), ("norm", norm)):
                upper[name].append(weight)
            continue
        for name, weight in (("k", k), ("v", v)):
            each = weight.unflatten(0, (kv_heads, -1))
            repeated = each.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)
            made[f"{to}.mixer.{name}_proj.weight"] = repeated
        if config.sliding_window is None:
            # No Llama has these. Zero logits of the decay are 0.96 a token.
            noise = torch.randn(q.shape, generator=generator) * config.initializer_range
            made[f"{to}.mixer.g_proj.weight"] = noise.to(q.dtype)
            made[f"{to}.mixer.gt_proj.weight"] = q.new_zeros(heads, config.dim)
    return made | {
        "cross_decoder.k_proj.weight": mean(upper["k"]),
        "cross_decoder.v_proj.weight": mean(upper["v"]),
        "cross_decoder.kv_layer_norm.weight": mean(upper["norm"]),
    }
