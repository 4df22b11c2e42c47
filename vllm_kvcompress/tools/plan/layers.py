"""The layers of a model that store keys and values, read from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ToolError

FULL = ("full_attention", "attention", "global_attention")
SLIDING = ("sliding_attention", "local_attention")
CHUNKED = "chunked_attention"
BOTH = "hybrid"  # attention and a state
STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
NO_MIXER = ("mlp", "moe")


@dataclass(frozen=True)
class KVLayer:
    """A layer that stores keys and values.

    Attributes:
        index: Among all layers, from 0 at the bottom.
        kv_heads: Its KV heads; 1 of a latent that all heads share (MLA).
        elements: Of a token's key and value of one KV head.
        window: Tokens that the layer looks back on, itself included; None = all.
        chunked: Whether windows do not slide, but begin anew (Llama 4).
        shared: Whether other layers read what it stores.
    """

    index: int
    kv_heads: int
    elements: int
    window: int | None = None
    chunked: bool = False
    shared: bool = False


def stored_layers(text: Any, kinds: Sequence[str]) -> tuple[KVLayer, ...]:
    """The layers with KV of their own; others read one of these, or have none.

    Args:
        text: The configuration of the language model.
        kinds: From `layer_kinds`.
    """
    layer_map = getattr(text, "layer_map", None)
    owners = _owners(text, kinds)
    found: list[KVLayer] = []
    for index, kind in enumerate(kinds):
        if kind in (*STATES, *NO_MIXER) or owners[index] != index:
            continue
        layer = replace(_layer(text, index, kind), shared=owners.count(index) > 1)
        if layer_map is not None:
            keeps = layer_map.keeps_window(index)
            window = getattr(text, "sliding_window", None) if keeps else None
            layer = replace(layer, window=window)
        found.append(layer)
    return tuple(found)


def _owners(text: Any, kinds: Sequence[str]) -> list[int]:
    """The layer whose keys and values each layer reads."""
    count = len(kinds)
    owners = list(range(count))
    if (layer_map := getattr(text, "layer_map", None)) is not None:
        return list(layer_map.owners)
    if text.model_type == "yoco":
        half = count // 2
        owners[half:] = [half] * (count - half)
    elif readers := getattr(text, "num_kv_shared_layers", None):
        first = count - readers
        last = {kind: layer for layer, kind in enumerate(kinds[:first])}
        owners[first:] = [last[kind] for kind in kinds[first:]]
    return owners


def layer_kinds(name: str, text: Any) -> list[str]:
    """The type of each layer, as transformers calls it.

    Raises:
        ToolError: One is not known.
    """
    count = getattr(text, "num_hidden_layers", None) or 0
    kinds = getattr(text, "layer_types", None)
    if getattr(text, "layer_map", None) is not None or not kinds:
        slides = getattr(text, "sliding_window", None) is not None
        slides = slides and getattr(text, "use_sliding_window", True)
        kinds = [SLIDING[0] if slides else FULL[0]] * count
        if not getattr(text, "num_attention_heads", None):
            kinds = [STATES[0]] * count
    known = (*FULL, *SLIDING, CHUNKED, BOTH, *STATES, *NO_MIXER)
    for kind in kinds:
        if kind not in known:
            raise ToolError(f"{name} has layers of type {kind!r}, which are not known")
    return list(kinds)


def _layer(text: Any, index: int, kind: str) -> KVLayer:
    own = (
        text.per_layer_config[index]
        if getattr(text, "is_heterogeneous", False)
        else text
    )
    kv_heads, elements = _heads(own)
    if isinstance(kv_heads, list):
        kv_heads = kv_heads[index]
    if text.model_type == "yoco":
        head_size = text.dim // (
            text.n_self_heads if kind in SLIDING else text.n_attn_heads
        )
        kv_heads = text.n_self_heads if kind in SLIDING else text.n_attn_kv_heads
        elements = 2 * head_size
    window = getattr(own, "sliding_window", None) if kind in SLIDING else None
    if kind == CHUNKED:
        window = own.attention_chunk_size
    return KVLayer(index, kv_heads, elements, window, kind == CHUNKED)


def is_latent(text: Any) -> bool:
    """Whether keys and values are one latent vector (MLA)."""
    return getattr(text, "kv_lora_rank", None) is not None


def _heads(text: Any) -> tuple[Any, int]:
    """KV heads (of each layer, if a list), and elements of a token's key and value."""
    if is_latent(text):
        return 1, text.kv_lora_rank + text.qk_rope_head_dim
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _kv_heads(text) or heads, 2 * head_size


def _kv_heads(text: Any) -> Any:
    if text.model_type == "falcon" and not text.new_decoder_architecture:
        return 1 if text.multi_query else None
    nested = getattr(text, "attn_config", None)
    names = ("num_kv_heads", "num_key_value_heads", "multi_query_group_num")
    found = (getattr(text, name, None) for name in names)
    return next(filter(None, found), getattr(nested, "kv_n_heads", None))
