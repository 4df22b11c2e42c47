"""Which attention layers of a loaded model are compressed."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.worker.utils import customize_attention_spec

from ..config import KEY, ConfigError, KVCompressionConfig
from .heads import held_heads
from .one_head import BACKENDS, LAYOUT, head_major
from .page_formats import has_scales
from .shared_pages import READERS, scale_dtype
from .spec import CompressedAttentionSpec, DraftAttentionSpec
from .stages import check_stages, number_layers


def compress_layers(vllm_config: VllmConfig, drafting: Collection[str] = ()) -> None:
    """Give full-attention layers the compressed spec; leave all others alone.

    Only these layer objects change, no class of vLLM does.

    Args:
        vllm_config: Of the engine; its model is loaded.
        drafting: Names of a draft model's layers, whose KV stays whole.

    Raises:
        ConfigError: A full-attention layer works in a way that is not supported, or
            budgets by layer do not fit this model.
    """
    config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
    uneven = any(scorer.uneven for scorer in config.scorers.values())
    if uneven:
        _check_layout(config.method)
    owners = _owners(vllm_config)
    own = [layer for layer in owners if layer.layer_name not in drafting]
    layers, num_layers = number_layers(own, vllm_config)
    for layer in layers.values():
        for reader in layer.kv_readers:
            if reason := _unsupported(reader):
                raise ConfigError(
                    f"{KEY}: layer {reader.layer_name} uses {reason}, which cannot be "
                    "compressed yet; start without --kv-compression"
                )
            _check_scales(reader)
            if uneven:
                _read_by_head(reader, config.method)
    if not num_layers:
        raise ConfigError(
            f"{KEY}: this model has no full-attention layer to compress; "
            "start without --kv-compression"
        )
    check_stages(config, layers, num_layers)
    pairs = [pair for pair in config.pairs(num_layers) if pair[0] in layers]
    for shallow, deep in pairs:
        _check_pair(config, layers[shallow], layers[deep], vllm_config)
        # Factors are applied to what 8-bit queries find only if these have no scale.
        layers[deep].query_quant = None
    most_tokens, tiers = config.most_tokens, config.tiers(num_layers)
    for tier in tiers:
        for index in layers.keys() & set(tier):
            layer = layers[index]
            layer.compressed_index, layer.compressed_layers = index, num_layers
            layer.held_heads = held_heads(layer, vllm_config)
            layer.get_kv_cache_spec = _Replaced(
                layer.get_kv_cache_spec,
                CompressedAttentionSpec,
                tier=tier,
                most_tokens=most_tokens,
            )
    drafters = [layer for layer in owners if layer.layer_name in drafting]
    if drafters:
        _check_drafters(vllm_config, len(drafters), tiers)
    for layer in drafters:
        layer.get_kv_cache_spec = _Replaced(layer.get_kv_cache_spec, DraftAttentionSpec)


def reads_from(layer: Any) -> str | None:
    """The layer whose KV cache an attention layer reads, None = its own."""
    return getattr(layer, "kv_sharing_target_layer_name", None)


def _owners(vllm_config: VllmConfig) -> list[Any]:
    """Layers with a full-attention KV cache, as models build them: from the bottom.

    Each is given ``kv_readers``, the layers that read its cache, itself among them.
    """
    context = vllm_config.compilation_config.static_forward_context
    every = {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase)
    }
    owners = [
        layer
        for layer in every.values()
        if reads_from(layer) is None
        and type(layer.get_kv_cache_spec(vllm_config)) is FullAttentionSpec
    ]
    for owner in owners:
        owner.kv_readers = [
            layer
            for name, layer in every.items()
            if layer is owner or every.get(reads_from(layer) or "") is owner
        ]
    return owners


def _read_by_head(layer: Any, method: str) -> None:
    """Let a layer read what `HeadPages` deals out."""
    if (backend := layer.attn_backend.get_name()) not in BACKENDS:
        raise ConfigError(
            f"{KEY}: method={method} does not work with the attention backend "
            f"{backend}; give --attention-backend {' or '.join(BACKENDS)}, or choose "
            "another method"
        )
    layer.attn_backend = head_major(layer.attn_backend)


def _check_scales(layer: Any) -> None:
    backend = layer.attn_backend.get_name()
    if has_scales(layer.kv_cache_dtype) and backend != "TRITON_ATTN":
        raise ConfigError(
            f"{KEY}: the attention backend {backend} does not work with "
            f"--kv-cache-dtype {layer.kv_cache_dtype}; give "
            "--attention-backend TRITON_ATTN or --kv-cache-dtype fp8"
        )


def _check_drafters(
    vllm_config: VllmConfig, drafters: int, tiers: Sequence[Sequence[int]]
) -> None:
    """Look whether a draft model's layers will be one KV cache group.

    vLLM cuts groups down to the smallest, or pads them to one that is little larger.
    """
    sizes = [*map(len, tiers), drafters]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    if drafters > size and not vllm_config.use_v2_model_runner:
        raise ConfigError(
            f"{KEY}: vLLM's V1 runner wants the KV of a draft model in one group, and "
            f"{drafters} layers are cut to groups of {size} here; use a draft model "
            "with fewer layers, raise layers_per_tier, or set "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )


def _check_pair(
    config: KVCompressionConfig, shallow: Any, deep: Any, vllm_config: VllmConfig
) -> None:
    for layer in (shallow, deep):
        backend = layer.attn_backend.get_name()
        if backend not in READERS:
            raise ConfigError(
                f"{KEY}: method={config.method} does not work with the attention "
                f"backend {backend}; give --attention-backend "
                f"{' or '.join(READERS)}, or choose another method"
            )
    names = [layer.layer_name for layer in (shallow, deep)]
    places = [extract_layer_index(name) for name in names]
    alike = shallow.get_kv_cache_spec(vllm_config) == deep.get_kv_cache_spec(
        vllm_config
    )
    if places[1] - places[0] != 1 or not alike:
        raise ConfigError(
            f"{KEY}: method={config.method} cannot merge {' and '.join(names)}, "
            "which are no neighbours with KV of one shape; choose another method"
        )
    for layer in (shallow, deep):
        if len(layer.kv_readers) > 1:
            raise ConfigError(
                f"{KEY}: method={config.method} cannot merge {layer.layer_name}, "
                "whose KV other layers read too; choose another method"
            )


def paired_layers(layers: Iterable[Any], config: KVCompressionConfig) -> dict[Any, Any]:
    """The deep layers of this stage's pairs, and the shallow one of each."""
    by_index = {
        layer.compressed_index: layer
        for layer in layers
        if hasattr(layer, "compressed_index")
    }
    if not by_index:
        return {}
    num_layers = next(iter(by_index.values())).compressed_layers
    pairs = config.scorer.layer_pairs(num_layers)
    return {by_index[b]: by_index[a] for a, b in pairs if b in by_index}


def scale_share(vllm_config: VllmConfig) -> float:
    """Bytes of the factors of merged pages, as a share of those of KV blocks.

    They lie beside vLLM's pool, and what they take is taken off it.
    """
    config = KVCompressionConfig.from_dict(vllm_config.additional_config[KEY])
    context = vllm_config.compilation_config.static_forward_context
    layers = [la for la in context.values() if hasattr(la, "compressed_index")]
    pairs = paired_layers(layers, config)
    if not pairs:
        return 0.0
    deep = next(iter(pairs))
    # Tiers have their factors over each other, as they have their pages.
    own = {layer.compressed_index for layer in layers}
    tiers = [own.intersection(tier) for tier in config.tiers(deep.compressed_layers)]
    deepest = {deep.compressed_index for deep in pairs}
    scaled = max(len(tier) for tier in tiers if deepest >= tier)
    spec = customize_attention_spec(
        deep.get_attn_backend(), deep.get_kv_cache_spec(vllm_config)
    )
    factors = 2 * spec.num_kv_heads * spec.block_size
    size = factors * scale_dtype(spec.dtype).itemsize
    return scaled * size / (max(map(len, tiers)) * spec.page_size_bytes)


def _check_layout(method: str) -> None:
    wanted = envs.VLLM_KV_CACHE_LAYOUT
    if wanted not in (None, "HND", LAYOUT.name):
        raise ConfigError(
            f"{KEY}: method={method} needs the KV cache laid out head by head, not "
            f"VLLM_KV_CACHE_LAYOUT={wanted}; set it to HND or leave it out"
        )


class _Replaced:
    """A layer's ``get_kv_cache_spec`` whose answer is one of our specs."""

    def __init__(
        self, get_kv_cache_spec: Any, spec: type[FullAttentionSpec], **fields: Any
    ) -> None:
        self._get, self._spec = get_kv_cache_spec, spec
        self._fields = fields

    def __call__(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return replace_as(self._get(vllm_config), self._spec, **self._fields)


def _unsupported(layer: Any) -> str | None:
    """What keeps a full-attention layer from being compressed, None if nothing."""
    if type(layer) is not Attention:
        return f"{type(layer).__name__} attention"
    if not hasattr(layer.attn_backend.get_builder_cls(), "row_shift"):
        return f"the attention backend {layer.attn_backend.get_name()}"
    if getattr(layer, "reads_window", layer.sliding_window) is not None:
        return "a sliding window over KV that others read all of"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if layer.has_sink:
        return "attention sinks"
    if layer.head_size_v != layer.head_size:
        return "values of another size than its keys"
    return None
