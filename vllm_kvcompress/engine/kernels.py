"""Who runs operations in this worker: chosen, and run once, before any request."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..config import KEY, ConfigError, KVCompressionConfig
from ..methods.base import Scorer
from ..ops.merge import merge
from ..ops.providers import Pages, ProviderError, Setting, choose
from ..ops.select import select
from .heads import rate
from .page_formats import KEYS, VALUES, pages_of


def choose_kernels(
    config: KVCompressionConfig, layers: Sequence[Any], device: torch.device
) -> None:
    """Choose providers, now that the pages of the compressed layers are known.

    Raises:
        ConfigError: ``kernels`` asks for what cannot be had.
    """
    try:
        choose(Setting(device, frozenset(map(_met, layers))), config.kernels)
    except ProviderError as error:
        raise ConfigError(
            f"{KEY}: kernels: {error}; leave it out to have the fastest that works here"
        ) from None
    if device.type == "cuda":  # there kernels are compiled when they are first run
        warm_up(config.scorers.values(), layers)


def _met(layer: Any) -> Pages:
    """What kernels are told of the pages of a layer."""
    pages, cache = pages_of(layer), layer.kv_cache
    strides = [half.strides(cache) for half in pages.halves]
    return Pages(pages.code_type, cache.shape[2], cache.shape[3] // 2, *strides)


@torch.inference_mode()
def warm_up(scorers: Iterable[Scorer], layers: Sequence[Any]) -> None:
    """Run what a compression runs, on block 0, which holds nobody's tokens.

    Args:
        scorers: All that may be used.
        layers: Those that are compressed; of equal ones one is taken.
    """
    unlike = {(layer.kv_cache.shape, layer.num_heads): layer for layer in layers}
    for layer in unlike.values():
        for scorer in scorers:
            _run(scorer, layer)


def _run(scorer: Scorer, layer: Any) -> None:
    pages, heads = pages_of(layer, scorer.uneven), layer.num_kv_heads
    size, window = pages.block_size, scorer.needs_queries
    count = 2 + window // size
    source = torch.zeros(count, dtype=torch.long, device=layer.kv_cache.device)
    held, tokens = source.expand(heads, -1), count * size
    keys, values = (pages.vectors(half, held, tokens) for half in (KEYS, VALUES))
    if scorer.merges:
        merge(keys.dense(), values.dense(), 0.5)
    else:
        readers = len(getattr(layer, "kv_readers", (layer,)))
        shape = (window, layer.num_heads * readers, layer.head_size)
        queries = torch.zeros(shape, dtype=layer.dtype, device=source.device)
        kept = select(rate(scorer, layer, queries, keys, values.dense()), size)
        rows = pages.cache.shape[1]
        pages.compact(source, kept[:rows] % size, source[:1])
