"""What a model stores of each token, read from its configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.layer_map import LayerMap
from ..errors import ToolError
from .layers import BOTH, STATES, KVLayer, is_latent, layer_kinds, stored_layers

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
        part: The type of the language model inside a multimodal one, None = it is none.
        notes: What else takes memory and is not counted.
    """

    name: str
    architecture: str
    num_layers: int
    layers: tuple[KVLayer, ...]
    max_len: int | None = None
    mla: bool = False
    refusal: str | None = None
    part: str | None = None
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

    from ...models import register_configs

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
    kinds = layer_kinds(name, text)
    layers = stored_layers(text, kinds)
    return ModelKV(
        name=name,
        architecture=architecture,
        num_layers=len(kinds),
        layers=layers,
        max_len=_max_len(text),
        mla=is_latent(text),
        refusal="multimodal prefixes that look ahead cannot be compressed"
        if config.model_type in PREFIX_LM
        else _refusal(text, layers, layer_map),
        part=None if text is config else text.model_type,
        notes=tuple(_notes(text, kinds)),
    )


def _max_len(text: Any) -> int | None:
    names = ("max_position_embeddings", "max_seq_len")
    found = [getattr(text, name, None) for name in names]
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _refusal(
    text: Any, layers: Sequence[KVLayer], layer_map: LayerMap | None
) -> str | None:
    """Why `engine.enable` or `engine.layers` refuses the model."""
    nested = getattr(text, "attn_config", None)
    if is_latent(text):
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
