"""Which layers of a model store keys and values, read from its configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models.layer_map import LayerMap
from .errors import ToolError

FULL = ("full_attention", "attention", "global_attention")
SLIDING = ("sliding_attention", "local_attention")
CHUNKED = "chunked_attention"
BOTH = "hybrid"  # attention and a state
STATES = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
NO_MIXER = ("mlp", "moe")
ALIBI = ("bloom", "mpt", "jais", "baichuan")
SINKS = ("gpt_oss",)
PREFIX_LM = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
"""Whose images see all of themselves, as vLLM lists them."""

WRONG = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What code that reads a config raises where the config makes no sense."""


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


@dataclass(frozen=True)
class ModelKV:
    """What a model stores of each token.

    Attributes:
        name: As the user gave it.
        architecture: vLLM's name of its class.
        num_layers: With those that store nothing.
        layers: Those that store keys and values.
        max_len: Longest sequence that the configuration allows, None = unknown.
        mla: Whether keys and values are one latent vector.
        refusal: Why its KV cannot be compressed, None if it can.
        notes: What else takes memory and is not counted.
    """

    name: str
    architecture: str
    num_layers: int
    layers: tuple[KVLayer, ...]
    max_len: int | None = None
    mla: bool = False
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def full(self) -> tuple[KVLayer, ...]:
        """The layers that store all tokens."""
        return tuple(layer for layer in self.layers if layer.window is None)


def load(source: str) -> Any:
    """Read a configuration; weights are not touched.

    Args:
        source: A folder with ``config.json``, such a file, or a name on the hub.

    Raises:
        ToolError: There is none, or transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from ..models import register_configs

    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ToolError(f"{source} is no folder of a model: it has no config.json")
    if not path.exists() and (path.is_absolute() or source.count("/") != 1):
        raise ToolError(f"{source} is no folder of a model: it does not exist")
    register_configs()
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, StrictDataclassError, *WRONG) as error:
        sentence = " ".join(str(error).split()).partition(". ")[0]
        raise ToolError(f"{source} has no readable config: {sentence}") from None


def model_kv(name: str, config: Any) -> ModelKV:
    """Find the layers that store keys and values.

    Args:
        name: For messages.
        config: Of transformers, from `load`.

    Raises:
        ToolError: The model stores none, or in a way that is not known.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ToolError(f"{name} is an encoder-decoder model, which is not planned for")
    try:
        model = _read(name, config)
    except WRONG as error:
        sentence = " ".join(str(error).split())
        raise ToolError(
            f"{name} has a config that cannot be used: {sentence}"
        ) from None
    if not model.layers:
        raise ToolError(f"{name} has no attention layer that stores keys and values")
    for layer in model.layers:
        for value in (
            layer.kv_heads,
            layer.elements,
            1 if layer.window is None else layer.window,
        ):
            if not isinstance(value, int) or value < 1:
                raise ToolError(f"{name} has a config that cannot be used: {layer}")
    return model


def _read(name: str, config: Any) -> ModelKV:
    text = config.get_text_config(decoder=True)
    architecture = (getattr(config, "architectures", None) or [config.model_type])[0]
    layer_map = getattr(text, "layer_map", None)
    kinds = _kinds(name, text)
    every = [_layer(text, index, kind) for index, kind in enumerate(kinds)]
    layers = _stored(text, kinds, every, layer_map)
    return ModelKV(
        name=name,
        architecture=architecture,
        num_layers=len(kinds),
        layers=layers,
        max_len=_max_len(text),
        mla=_mla(text),
        refusal="multimodal prefixes that look ahead cannot be compressed"
        if config.model_type in PREFIX_LM
        else _refusal(text, layers, layer_map),
        notes=tuple(_notes(text, kinds)),
    )


def _kinds(name: str, text: Any) -> list[str]:
    """The type of each layer, as transformers calls it."""
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


def _layer(text: Any, index: int, kind: str) -> KVLayer | None:
    """One layer, None if it has no attention."""
    if kind in (*STATES, *NO_MIXER):
        return None
    own = text.per_layer_config[index] if _varies(text) else text
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


def _max_len(text: Any) -> int | None:
    names = ("max_position_embeddings", "max_seq_len")
    found = [getattr(text, name, None) for name in names]
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _varies(text: Any) -> bool:
    return bool(getattr(text, "is_heterogeneous", False))


def _mla(text: Any) -> bool:
    return getattr(text, "kv_lora_rank", None) is not None


def _heads(text: Any) -> tuple[Any, int]:
    """KV heads (of each layer, if a list), and elements of a token's key and value."""
    if _mla(text):
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


def _stored(
    text: Any,
    kinds: Sequence[str],
    layers: Sequence[KVLayer | None],
    layer_map: LayerMap | None,
) -> tuple[KVLayer, ...]:
    """The layers with KV of their own; others read one of these, or have none."""
    count = len(layers)
    owners = list(range(count))
    if layer_map is not None:
        owners = list(layer_map.owners)
    elif text.model_type == "yoco":
        half = count // 2
        owners[half:] = [half] * (count - half)
    elif readers := getattr(text, "num_kv_shared_layers", None):
        first = count - readers
        last = {kind: layer for layer, kind in enumerate(kinds[:first])}
        owners[first:] = [last[kind] for kind in kinds[first:]]
    found: list[KVLayer] = []
    for index, layer in enumerate(layers):
        if layer is None or owners[index] != index:
            continue
        layer = replace(layer, shared=owners.count(index) > 1)
        if layer_map is not None:
            keeps = layer_map.keeps_window(index)
            window = getattr(text, "sliding_window", None) if keeps else None
            layer = replace(layer, window=window)
        found.append(layer)
    return tuple(found)


def _refusal(
    text: Any, layers: Sequence[KVLayer], layer_map: LayerMap | None
) -> str | None:
    """Why `engine.enable` or `engine.layers` refuses the model."""
    nested = getattr(text, "attn_config", None)
    if _mla(text):
        return "MLA attention cannot be compressed"
    if text.model_type in SINKS:
        return "attention sinks cannot be compressed yet"
    if getattr(text, "alibi", getattr(nested, "alibi", text.model_type in ALIBI)):
        return "ALiBi cannot be compressed yet"
    if layer_map and any(
        layer_map.sliding[reader] and not layer_map.keeps_window(writer)
        for writer in layer_map.writers
        for reader in layer_map.readers(writer)
    ):
        return "a sliding window over KV that others read all of cannot be compressed"
    if all(layer.window is not None for layer in layers):
        return "no layer looks at all tokens; sliding windows are not compressed"
    return None


def _notes(text: Any, kinds: Sequence[str]) -> Iterator[str]:
    states = sum(kind in (*STATES, BOTH) for kind in kinds)
    if states:
        yield (
            f"{states} of {len(kinds)} layers keep a state of fixed size per request, "
            "which is not counted; vLLM may also raise the block size to its size"
        )
    if getattr(text, "index_head_dim", None):
        yield "the keys of the sparse attention's indexer are not counted"
    if getattr(text, "num_nextn_predict_layers", None):
        yield "layers for multi-token prediction are not counted"
